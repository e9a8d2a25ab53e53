"""Configurations of rubrics: which terms, how much each weighs, and the models that score them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where a frozen model is and how it runs."""

    model: str
    """Folder with weights and processor, or name on the hub."""
    revision: str | None = None
    """Commit of a hub model; None takes its newest."""
    batch_size: int = 16
    """Pictures in one forward pass; changes no score beyond rounding."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    device: str = "auto"
    """Where it runs, as torch names it; `auto` is the process's own GPU, else the CPU."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(bool(self.model), "model", self.model, "a folder or a name")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickScoreConfig(ModelConfig):
    """PickScore: which picture people would pick, times CLIP's scale."""

    kind: Literal["pickscore"] = "pickscore"
    """Tells the scorers apart."""
    model: str = "yuvalkirstain/PickScore_v1"
    """Folder with a CLIP model, its tokenizer and image processor, or name on the hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HPSConfig(ModelConfig):
    """HPS v2: human preference, in weights of transformers' CLIP layout."""

    kind: Literal["hps"] = "hps"
    """Tells the scorers apart."""
    model: str = "adams-story/HPSv2-hf"
    """Folder with a CLIP model, its tokenizer and image processor, or name on the hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig(ModelConfig):
    """CLIP alignment: cosine of picture and prompt."""

    kind: Literal["clip"] = "clip"
    """Tells the scorers apart."""
    model: str = "openai/clip-vit-large-patch14"
    """Folder with a CLIP model, its tokenizer and image processor, or name on the hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AestheticsConfig(ModelConfig):
    """LAION aesthetics."""

    kind: Literal["aesthetics"] = "aesthetics"
    """Tells the scorers apart."""
    model: str = "openai/clip-vit-large-patch14"
    """Folder with the CLIP model, its tokenizer and image processor, or name on the hub."""
    head: str = "sac+logos+ava1-l14-linearMSE.pth"
    """File with the head's state dict, as LAION gives it out or as safetensors."""

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check(bool(self.head), "head", self.head, "a file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig(ModelConfig):
    """A GenEval-style score by an open-vocabulary detector."""

    kind: Literal["geneval"] = "geneval"
    """Tells the scorers apart."""
    model: str = "google/owlv2-large-patch14-ensemble"
    """Folder with an OWLv2 or Grounding DINO model and its processor, or name on the hub."""
    batch_size: int = 4
    """Pictures in one forward pass; changes no score beyond rounding."""
    threshold: float = 0.3
    """Confidence above which a box counts."""
    counting_threshold: float | None = None
    """The same for prompts that count; GenEval is stricter there. None takes `threshold`."""
    max_overlap: float = 0.5
    """Intersection over union above which the weaker of two boxes of a noun is left out."""
    max_objects: int = 16
    """Objects kept on a picture, the surest."""
    strict: bool = True
    """1 where all is right and else 0, as GenEval counts; else the share of what is right, which
    gives a reward more to go by."""
    colors: AlignmentConfig = AlignmentConfig()
    """The CLIP model that tells colours; loaded by the first prompt that names one."""

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        for name in ("threshold", "counting_threshold", "max_overlap"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, name, value, "in [0, 1]")
        check(self.max_objects >= 1, "max_objects", self.max_objects, ">= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMConfig(ModelConfig):
    """A vision-language model, its question and the answers that count."""

    kind: Literal["vlm"] = "vlm"
    """Tells the scorers apart."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """Folder with the model and its processor, or name on the hub."""
    batch_size: int = 8
    """Pictures in one forward pass; changes no score beyond rounding."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights."""
    question: str = 'Does this image show "{prompt}"? Answer Yes or No.'
    """What is asked about a picture; `{prompt}` is replaced."""
    yes: tuple[str, ...] = ("Yes", "yes")
    """Answers that agree; the first token of each counts."""
    no: tuple[str, ...] = ("No", "no")
    """Answers that do not."""
    over: Literal["answers", "vocabulary"] = "answers"
    """What P(yes) is a share of: the answers above, or all tokens."""

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        once = self.question.count("{prompt}") == 1
        check(once, "question", self.question, "{prompt} once")
        for name in ("yes", "no"):
            words = getattr(self, name)
            check(bool(words) and all(words), name, words, "at least one word")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """A score of the shapes world, which needs no model."""

    kind: Literal["faithfulness", "crispness"] = "faithfulness"
    """Which one (`flowloom.score.scorers`)."""


ScorerConfig = (
    PickScoreConfig
    | HPSConfig
    | AlignmentConfig
    | AestheticsConfig
    | DetectorConfig
    | VLMConfig
    | ShapesConfig
)
"""What a term is scored by; `kind` tells them apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One term of a rubric."""

    scorer: ScorerConfig
    """What it is scored by."""
    name: str | None = None
    """Its column in the breakdown; None takes the scorer's kind."""
    weight: float | None = None
    """In (0, 1]: factor in a sum, or share of a product's score that it can take away; None, in a
    product alone: required, it multiplies."""
    low: float = 0.0
    """Raw value that counts 0: of PickScore, 18, say."""
    high: float = 1.0
    """Raw value that counts 1: of PickScore, 24, say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RubricConfig:
    """A rubric: how pictures are scored for their prompts."""

    terms: tuple[TermConfig, ...]
    """Its parts."""
    name: str = "custom"
    """What logs and errors call it."""
    kind: Literal["product", "sum"] = "sum"
    """How the terms make the score; see `flowloom.score.rubric`."""
    batch_size: int = 32
    """Pictures scored at once; a model may take fewer in one pass."""
    timeout_s: float | None = None
    """Seconds that a term may take for such a batch, first loading included; None: any time."""

    def __post_init__(self) -> None:
        """Check the fields; `flowloom.score.build.build_rubric` checks the terms."""
        check(bool(self.name), "name", self.name, "a name")
        check(bool(self.terms), "terms", self.terms, "at least one")
        check(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")

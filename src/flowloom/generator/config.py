"""Configurations of the generator's stages: `tune_generator` and `publish_generator`."""

from __future__ import annotations

# The defaults are frozen, so that instances may share them.
# ruff: noqa: RUF009
import dataclasses
from typing import Literal

from flowloom.config import check
from flowloom.dataset.config import digest_of
from flowloom.generator.judging_config import JudgingConfig
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.sd3_config import SD3Config
from flowloom.score.config import RubricConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Which prompts the generator is tuned and judged on."""

    kinds: tuple[str, ...] = ("single", "two", "counting", "colors")
    """Kinds of prompts; a kind named twice is drawn twice as often."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star")
    """Shapes that prompts may name."""
    file: str | None = None
    """A person's prompts (.txt, .csv or .jsonl) to use instead; a tenth of them is held out."""
    digest: str | None = dataclasses.field(init=False, default=None)
    """MD5 of that file, found when the configuration is made: a run is known by the content."""

    def __post_init__(self) -> None:
        """Check the fields, and digest the file."""
        object.__setattr__(self, "digest", digest_of("prompts.file", self.file))
        check(len(self.kinds) > 0, "kinds", self.kinds, "at least one kind")
        check(len(set(self.shapes)) >= 2, "shapes", self.shapes, "at least two shapes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FDFOConfig:
    """Finite Difference Flow Optimization (arXiv 2603.12893)."""

    num_branches: int = 2
    """Pictures of one noise; 2 is the paper's pair, more are our extension."""
    churn: float = 0.03
    """Noise per step, gamma: sets how far the pictures of a noise lie apart."""
    min_rms: float = 0.05
    """Distance of pictures (rms of half their difference) below which a pair fades out."""
    trust: float = 10.0
    """Size of the trust region; the surrogate's c of a pair is trust / (rms(dx) * sqrt(D))."""
    pull_frac: float = 1.0
    """Share of the solver steps, from noise on, whose velocity is pulled. What a picture shows is
    decided early; the penalty holds at all steps, and so keeps the late ones as they were."""
    kl_coef: float = 0.1
    """Weight of mean (v - v_base)^2."""
    keep_frac: float = 1.0
    """Share of the noises that are trained on: those with the largest gaps in reward."""
    train_frac: float = 1.0
    """Share of the (noise, step) units of these that are trained on, chosen at random."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.num_branches >= 2, "num_branches", self.num_branches, ">= 2")
        for name in ("churn", "min_rms", "trust"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        check(self.kl_coef >= 0, "kl_coef", self.kl_coef, ">= 0")
        for name in ("pull_frac", "keep_frac", "train_frac"):
            check(0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowGRPOConfig:
    """Flow-GRPO (arXiv 2505.05470): policy gradients on stochastic sampling steps."""

    group_size: int = 8
    """Pictures G of one prompt, whose rewards are compared."""
    noise_level: float = 0.7
    """a in the noise sigma_t = a sqrt(t / (1 - t)) of a sampling step."""
    window: int | None = None
    """Consecutive sampling steps with noise, placed at random; None: all but the last."""
    window_frac: float | None = None
    """Share of the steps, from noise on, in which a window may begin; None: wherever it fits."""
    shared_noise: bool = False
    """Whether the pictures of a prompt start from one noise; they then part at the window."""
    num_train_steps: int | None = None
    """Noisy steps of a picture that are trained on, drawn at random; None: all of them."""
    divide_by: Literal["group", "batch"] | None = "group"
    """Standard deviation that advantages are divided by: the group's, the batch's, or none."""
    clip: float = 0.01
    """Clip range of the ratio of a step's probabilities."""
    kl_coef: float = 0.0
    """Weight of the Kullback-Leibler divergence of a step from the base's."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.group_size >= 2, "group_size", self.group_size, ">= 2")
        for name in ("noise_level", "clip"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        check(self.kl_coef >= 0, "kl_coef", self.kl_coef, ">= 0")
        for name in ("window", "num_train_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, ">= 1 or null")
        if self.window is not None and self.num_train_steps is not None:
            expected = f"at most window = {self.window}"
            fits = self.num_train_steps <= self.window
            check(fits, "num_train_steps", self.num_train_steps, expected)
        share = self.window_frac
        check(share is None or 0 <= share <= 1, "window_frac", share, "in [0, 1] or null")

    @property
    def num_branches(self) -> int:
        """Pictures per prompt."""
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Looks at held-out prompts during tuning, against reward hacking."""

    every: int = 5
    """Epochs between looks; the first one is at the base."""
    rubric: str | RubricConfig = "shapes"
    """Score that is watched beside the trained one; best one that is not trained on."""
    num_prompts: int = 24
    """Held-out prompts per look."""
    num_seeds: int = 2
    """Pictures per held-out prompt."""
    max_drop: float | None = None
    """Stop when the watched score lies by more than this below its best; None never stops."""
    patience: int = 1
    """For how many looks in a row."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("every", "num_prompts", "num_seeds", "patience"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        fine = self.max_drop is None or self.max_drop >= 0
        check(fine, "max_drop", self.max_drop, ">= 0 or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneGeneratorConfig:
    """`tune_generator`: reward tuning of one generator, by one of two methods."""

    base: str = "shapes-base.safetensors"
    """Checkpoint of the catalogue to tune."""
    sd3: SD3Config | None = None
    """Tune this pipeline instead of a checkpoint of the catalogue."""
    name: str = "shapes-base-fdfo.safetensors"
    """File the tuned checkpoint becomes."""
    card: str = "the base tuned by FDFO on the shapes score: more faithful, less varied"
    """Card of the tuned checkpoint: what it is good for, in words."""
    prompts: PromptsConfig = PromptsConfig()
    """Prompts to tune on; the held-out ones are of the same kinds."""
    rubric: str | RubricConfig = "shapes"
    """Score to raise: one of `flowloom.score.rubric.RUBRICS`, or all of it."""
    balance_epochs: float | None = None
    """Divide each term's differences by their own scale, a mean over so many epochs, before they
    are weighted, so that an easy term starves no hard one. None: the rubric's own total."""
    score_timeout_s: float | None = None
    """Seconds a term of the score may take for a batch; None: any time."""
    method: FDFOConfig | FlowGRPOConfig = FDFOConfig()
    """How it is raised."""
    lora: LoRAConfig | None = None
    """Adapters to tune; None tunes all weights."""
    seed: int = 0
    """Seed of prompts, noise and shuffling; epoch e draws from (seed, e) alone."""
    num_epochs: int = 30
    """Rollouts; each is followed by `num_minibatches` optimiser steps."""
    images_per_epoch: int = 64
    """Pictures per rollout, those of a prompt counted one by one."""
    num_steps: int = 10
    """Solver steps T of a rollout."""
    time_shift: float = 1.0
    """Moves the steps of a rollout toward noise, as SD3 does; 1 is equal steps."""
    guidance: float | None = None
    """Guidance scale inside the tuned velocity; None tunes the conditional velocity itself."""
    num_minibatches: int = 4
    """Optimiser steps per rollout."""
    sample_rows: int = 32
    """Rows sampled at once; they are scored while the next ones are sampled."""
    units_per_pass: int | None = None
    """Units of one backward pass; None takes a minibatch at once."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """Course of the learning rate after the warm-up: down to 0, or as it is."""
    warmup_steps: int = 8
    """Optimiser steps over which the learning rate rises; Adam's first steps are blind to scale."""
    beta2: float = 0.999
    """AdamW's decay of squared gradients."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    average_epochs: float | None = None
    """Watch, judge and export the mean of the weights over about so many epochs; None: the last."""
    watch: WatchConfig | None = None
    """Looks at held-out prompts during tuning; None takes none."""
    judging: JudgingConfig = JudgingConfig()
    """How the generator is judged before and after."""
    checkpoint_every: int = 3
    """Epochs between checkpoints of an unfinished run."""
    num_threads: int = 1
    """Torch threads; more than one is faster here and no longer gives the same bytes each time."""

    def __post_init__(self) -> None:
        """Check the fields."""
        positive = ("num_epochs", "images_per_epoch", "num_steps", "num_minibatches")
        positive += ("checkpoint_every", "sample_rows")
        for name in (*positive, "num_threads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("time_shift", "lr", "grad_clip"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        check(self.guidance is None or self.guidance > 0, "guidance", self.guidance, "> 0 or null")
        for name in ("units_per_pass", "score_timeout_s", "balance_epochs"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "> 0 or null")
        mean = self.average_epochs
        check(mean is None or mean >= 1, "average_epochs", mean, ">= 1 or null")
        branches = self.method.num_branches
        expected = f"a multiple of the {branches} pictures per prompt"
        whole = self.images_per_epoch % branches == 0
        check(whole, "images_per_epoch", self.images_per_epoch, expected)
        fine = self.sd3 is None or self.lora is not None
        check(fine, "lora", self.lora, "adapters where a pipeline is tuned")
        check(self.base != self.name, "name", self.name, "another name than base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishGeneratorConfig:
    """`publish_generator`: the catalogue with the tuned files, and the files themselves."""

    catalogue: str = "embedded"
    """Catalogue that the files join."""
    roles: tuple[Literal["checkpoint", "lora"], ...] = ("checkpoint",)
    """Which of the tuned files join it; there is a LoRA where one was tuned."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(len(self.roles) > 0, "roles", self.roles, "at least one role")

    @property
    def wanted_inputs(self) -> tuple[str, ...]:
        """Optional inputs of the stage that a command which makes what is missing makes."""
        return ("generator",)

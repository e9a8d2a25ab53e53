"""Prompt to workflows: the registered model at work, and the policies it is compared with."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from flowloom.dataset.tokenizer import split_words
from flowloom.designer.loading import load_pair
from flowloom.designer.policy import VOCABULARY_FILE, Policy
from flowloom.designer.rollout import rollout
from flowloom.reward.ensemble import Ensemble
from flowloom.workflow import (
    Catalogue,
    Grammar,
    Vocabulary,
    Workflow,
    decode,
    encode,
    random_workflows,
)

PolicyName = Literal["grpo", "sft", "best_fixed", "retrieval", "random"]
MAX_ROUNDS = 8
"""Times a policy is sampled again for a prompt that still lacks distinct designs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """One workflow designed for a prompt."""

    workflow: Workflow
    """A template: `fill` puts prompt and seed in."""
    tokens: list[int]
    """Its code."""
    fingerprint: str
    """Its template fingerprint."""
    score: float
    """Predicted score of a single render, in rubric units."""
    interval: tuple[float, float]
    """Where a single render's score will lie, at the level the ensemble was calibrated for."""


class Designer:
    """A designer with its reward ensemble, over the catalogue it was trained for."""

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: Vocabulary,
        tuned: Policy,
        reference: Policy,
        ensemble: Ensemble,
        policies: Mapping[str, Any],
    ):
        """Put the parts together; `load` and `from_parts` read them.

        Args:
            catalogue: What is installed.
            vocabulary: Of the policies and the ensemble.
            tuned: The policy after GRPO.
            reference: The policy after SFT.
            ensemble: Predicts scores.
            policies: `best_fixed`, a template (API JSON); `retrieval`, lists `prompts` and
                `workflows`.
        """
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.tuned, self.reference = tuned, reference
        self.ensemble, self.policies = ensemble, policies

    @classmethod
    def load(cls, model_dir: str | Path) -> Designer:
        """Load a registered model's folder.

        Raises:
            ValueError: A part of the folder is missing.
        """
        folder = Path(model_dir)
        for name in ("model", "adapter", "reward", "catalogue.json.gz", "policies.json"):
            if not (folder / name).exists():
                raise ValueError(f"model: got no {name} in {str(folder)!r}, expected a model")
        policies = json.loads((folder / "policies.json").read_text())
        return cls.from_parts(
            folder, folder / "model", folder / "adapter", folder / "reward", policies
        )

    @classmethod
    def from_parts(
        cls,
        catalogue_dir: Path,
        designer_dir: Path,
        adapter_dir: Path,
        reward_dir: Path,
        policies: Mapping[str, Any],
    ) -> Designer:
        """Load artifacts: `publish_generator`, `train_sft`, `train_grpo`, `calibrate_reward`."""
        return cls(
            Catalogue.load(catalogue_dir / "catalogue.json.gz"),
            Vocabulary.from_json(json.loads((designer_dir / VOCABULARY_FILE).read_text())),
            *load_pair(designer_dir, adapter_dir),
            Ensemble.load(reward_dir),
            policies,
        )

    def extended(self, catalogue: Catalogue) -> Designer:
        """The same designer where other files are installed.

        A new file starts as the mean of the files of its role and family: nothing else is known of
        it until the designer is trained again.

        Raises:
            VocabularyError: More new files than reserved rows.
        """
        vocabulary = self.vocabulary.extend(catalogue)
        heirs = file_heirs(self.vocabulary, vocabulary)
        return Designer(
            catalogue,
            vocabulary,
            self.tuned.extended(heirs),
            self.reference.extended(heirs),
            self.ensemble.extended(catalogue, vocabulary),
            self.policies,
        )

    def design(
        self,
        prompts: Sequence[str],
        n: int = 4,
        guidance: float = 1.5,
        temperature: float = 1.0,
        seed: int = 0,
        policy: PolicyName = "grpo",
        catalogue: Catalogue | None = None,
        require: Iterable[str] = (),
        forbid: Iterable[str] = (),
    ) -> list[list[Design]]:
        """Design workflows.

        Args:
            prompts: What the pictures should show.
            n: Designs per prompt, distinct by fingerprint; fewer where a policy has no more.
            guidance: For `grpo`: 0 is the SFT policy, 1 the tuned one, above 1 extrapolates.
            temperature: For `grpo` and `sft`: below 1 sharper.
            seed: Of the samples.
            policy: Who designs.
            catalogue: What is installed, if not what the designer was trained for.
            require: Inputs that must have a value where they occur, "name=value".
            forbid: Classes or files that must not occur.

        Returns:
            For each prompt its designs, best predicted score first.

        Raises:
            ValueError: An unknown policy, or no design satisfies the constraints.
        """
        if policy not in get_args(PolicyName):
            names = ", ".join(get_args(PolicyName))
            raise ValueError(f"policy: got {policy!r}, expected one of {names}")
        if catalogue is not None and catalogue.hash != self.catalogue.hash:
            return self.extended(catalogue).design(
                prompts, n, guidance, temperature, seed, policy, None, require, forbid
            )
        budget = self.tuned.config.num_workflow_tokens
        grammar = Grammar(self.catalogue, self.vocabulary, budget, require=require, forbid=forbid)

        if policy == "best_fixed":
            found = [self._known([self.policies["best_fixed"]], grammar, 1)] * len(prompts)
        elif policy == "retrieval":
            found = self._retrieve(prompts, grammar, n)
        else:
            drawer = _Drawer(self, policy, grammar, guidance, temperature)
            found = _distinct(drawer, grammar, prompts, n, seed)

        rows = [(i, *design) for i, designs in enumerate(found) for design in designs]
        scores, lows, highs = self.ensemble.score_and_interval(
            [prompts[i] for i, *_ in rows], [tokens for _, tokens, *_ in rows]
        )
        designs: list[list[Design]] = [[] for _ in prompts]
        for (i, tokens, workflow, fingerprint), score, low, high in zip(
            rows, scores, lows, highs, strict=True
        ):
            designs[i].append(
                Design(
                    workflow=workflow,
                    tokens=tokens,
                    fingerprint=fingerprint,
                    score=float(score),
                    interval=(float(low), float(high)),
                )
            )
        return [sorted(row, key=lambda d: (-d.score, d.fingerprint)) for row in designs]

    def _known(self, templates: Iterable[Any], grammar: Grammar, num: int) -> list[tuple]:
        """The first `num` distinct stored templates that the grammar accepts."""
        found: dict[str, tuple] = {}
        for template in templates:
            workflow = Workflow.from_api(template)
            fingerprint = workflow.template_fingerprint()
            if fingerprint not in found:
                tokens = encode(workflow, grammar).tokens
                if grammar.accepts(tokens):
                    found[fingerprint] = (tokens, workflow, fingerprint)
            if len(found) == num:
                break
        if not found:
            raise ValueError("design: no stored workflow satisfies catalogue, require and forbid")
        return list(found.values())

    def _retrieve(self, prompts: Sequence[str], grammar: Grammar, num: int) -> list[list[tuple]]:
        """Workflows that did best on the most similar train prompts."""
        known = self.policies["retrieval"]
        similarity = prompt_similarity(known["prompts"])
        found = []
        for prompt in prompts:
            scores = similarity(prompt)
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
            found.append(self._known((known["workflows"][i] for i in order), grammar, num))
        return found


@dataclasses.dataclass(frozen=True)
class _Drawer:
    """How a policy draws designs."""

    designer: Designer
    policy: str
    grammar: Grammar
    guidance: float
    temperature: float

    def __call__(self, prompts: Sequence[str], num: int, seed: int) -> list[list[int]]:
        """Tokens of `num` designs for each prompt."""
        if self.policy == "random":
            rows = random_workflows(self.grammar, len(prompts) * num, seed)
            return [row.tokens for row in rows]
        tuned, reference = self.designer.tuned, self.designer.reference
        return rollout(
            reference if self.policy == "sft" else tuned,
            self.grammar,
            prompts,
            num,
            temperature=self.temperature,
            reference=reference,
            guidance=1.0 if self.policy == "sft" else self.guidance,
            seed=seed,
        ).tokens


def file_heirs(older: Vocabulary, vocabulary: Vocabulary) -> dict[int, list[int]]:
    """For each new file's token the known ones of its role and family, or else of its folder."""
    known = {k: token for k, token in enumerate(older.tokens) if token.group == "file"}
    heirs = {}
    for index, token in enumerate(vocabulary.tokens):
        if token.group == "file" and index not in known:
            folder = [k for k, other in known.items() if other.kind == token.kind]
            same = [
                k for k in folder if (known[k].role, known[k].family) == (token.role, token.family)
            ]
            if folder:
                heirs[index] = same or folder
    return heirs


def prompt_similarity(known: Sequence[str]) -> Callable[[str], list[float]]:
    """Similarity of a prompt to each known one: cosine of their words weighted by rarity.

    A word in k of n prompts weighs log((n + 1) / (k + 1)), so openings and articles hardly count.
    """
    bags = [set(split_words(text)) for text in known]
    counts = Counter(word for bag in bags for word in bag)
    weight = {w: math.log((len(bags) + 1) / (k + 1)) ** 2 for w, k in counts.items()}
    norms = [math.sqrt(sum(weight[word] for word in bag)) or 1.0 for bag in bags]

    def similarity(prompt: str) -> list[float]:
        words = set(split_words(prompt))
        return [
            sum(weight[word] for word in bag & words) / norm
            for bag, norm in zip(bags, norms, strict=True)
        ]

    return similarity


def _distinct(
    draw: _Drawer,
    grammar: Grammar,
    prompts: Sequence[str],
    num: int,
    seed: int,
) -> list[list[tuple]]:
    """Sample until each prompt has `num` designs that differ by fingerprint."""
    found: list[dict[str, tuple]] = [{} for _ in prompts]
    lacking = list(range(len(prompts)))
    for attempt in range(MAX_ROUNDS):
        rows = draw([prompts[i] for i in lacking], num, (seed << 32) + attempt)
        for row, tokens in enumerate(rows):
            designs = found[lacking[row // num]]
            workflow = decode(tokens, grammar)
            fingerprint = workflow.template_fingerprint()
            if len(designs) < num and fingerprint not in designs:
                designs[fingerprint] = (tokens, workflow, fingerprint)
        lacking = [i for i in lacking if len(found[i]) < num]
        if not lacking:
            break
    return [list(designs.values()) for designs in found]

"""Prompt to workflows: the registered model at work, and the policies it is compared with.

Loaded from the folder of a registered model, or from one of `train_sft` alone: that has no tuned
weights and no reward ensemble, so it answers as `sft`, without scores, likeliest designs first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from flowloom.config import check
from flowloom.designer import loading
from flowloom.designer.baselines import prompt_similarity
from flowloom.designer.candidates import Budget, Design, Drawer, Gate, distinct
from flowloom.designer.extension import CATALOGUE_FILE, file_heirs, read_vocabulary
from flowloom.designer.policy import VOCABULARY_FILE, Policy
from flowloom.reward.ensemble import Ensemble
from flowloom.workflow import (
    Catalogue,
    Grammar,
    Vocabulary,
    Workflow,
    encode,
)

PolicyName = Literal["grpo", "sft", "best_fixed", "retrieval", "random"]


class Designer:
    """A designer with its reward ensemble, over the catalogue it was trained for."""

    def __init__(
        self,
        catalogue: Catalogue,
        vocabulary: Vocabulary,
        tuned: Policy,
        reference: Policy,
        ensemble: Ensemble | None,
        policies: Mapping[str, Any],
    ):
        """Put the parts together; `load` and `from_parts` read them.

        Args:
            catalogue: What is installed.
            vocabulary: Of the policies and the ensemble.
            tuned: The policy after GRPO; the reference itself where there was none.
            reference: The policy after SFT.
            ensemble: Predicts scores; None where there is none.
            policies: `best_fixed`, a template (API JSON); `retrieval`, lists `prompts` and
                `workflows`; without them these policies are missing.
        """
        self.catalogue, self.vocabulary = catalogue, vocabulary
        self.tuned, self.reference = tuned, reference
        self.policies = policies
        self._ensemble = ensemble

    @property
    def ensemble(self) -> Ensemble:
        """Predicts scores.

        Raises:
            ValueError: The designer has none.
        """
        if self._ensemble is None:
            raise ValueError("model: got a designer without a reward ensemble, expected one")
        return self._ensemble

    @property
    def policy_names(self) -> tuple[PolicyName, ...]:
        """The policies that this designer has."""
        lacking = {name for name in ("best_fixed", "retrieval") if name not in self.policies}
        if self.tuned is self.reference:
            lacking.add("grpo")
        return tuple(name for name in get_args(PolicyName) if name not in lacking)

    @classmethod
    def load(cls, model_dir: str | Path, catalogue: Catalogue | None = None) -> Designer:
        """Load the folder of a registered model, or of `train_sft`.

        Args:
            model_dir: The folder.
            catalogue: What is installed, for a folder of `train_sft` that names no catalogue.

        Raises:
            ValueError: A part of the folder is missing.
        """
        folder = Path(model_dir)
        if is_untuned(folder):
            return cls._load_untuned(folder, catalogue)
        for name in ("model", "adapter", "reward", CATALOGUE_FILE, "policies.json"):
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
            Catalogue.load(catalogue_dir / CATALOGUE_FILE),
            read_vocabulary(designer_dir),
            *loading.load_pair(designer_dir, adapter_dir),
            Ensemble.load(reward_dir),
            policies,
        )

    @classmethod
    def _load_untuned(cls, folder: Path, catalogue: Catalogue | None) -> Designer:
        path, vocabulary = folder / CATALOGUE_FILE, read_vocabulary(folder)
        facts = Catalogue.load(path) if path.is_file() else catalogue
        if facts is None:
            raise ValueError(
                f"model: got no {CATALOGUE_FILE} in {str(folder)!r}, expected one, or a catalogue"
            )
        policy = loading.load_policy(folder)
        designer = cls(facts, vocabulary, policy, policy, None, {})
        return designer if vocabulary.catalogue_hash == facts.hash else designer.extended(facts)

    def extended(self, catalogue: Catalogue) -> Designer:
        """The same designer where other files are installed.

        A new file starts as the mean of the files of its role and family: nothing else is known of
        it until the designer is trained again.

        Raises:
            VocabularyError: More new files than reserved rows.
        """
        vocabulary = self.vocabulary.extend(catalogue)
        new = (file_heirs(self.vocabulary, vocabulary), vocabulary, catalogue)
        reference = loading.extended(self.reference, *new)
        is_tuned = self.tuned is not self.reference
        ensemble = self._ensemble
        return Designer(
            catalogue,
            vocabulary,
            loading.extended(self.tuned, *new) if is_tuned else reference,
            reference,
            None if ensemble is None else ensemble.extended(catalogue, vocabulary),
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
        *,
        top_p: float | None = None,
        candidates: int | None = None,
        budget: Budget | None = None,
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
            top_p: For `grpo` and `sft`: mass of the nucleus that tokens are drawn from.
            candidates: Distinct designs drawn per prompt, of which the best n are kept; None is n.
            budget: What a render may take; designs beyond it are not counted.

        Returns:
            For each prompt its designs, best predicted score first; likeliest first where there is
            no reward ensemble.

        Raises:
            ValueError: A number out of its bounds, a policy that the designer lacks, or no design
                satisfies constraints or budget.
        """
        candidates = n if candidates is None else candidates
        check(n >= 1, "n", n, "an integer >= 1")
        check(candidates >= n, "candidates", candidates, f"an integer >= n = {n}")
        check(0 <= guidance < math.inf, "guidance", guidance, "a finite number >= 0")
        check(0 < temperature < math.inf, "temperature", temperature, "a finite number > 0")
        check(top_p is None or 0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
        check(policy in get_args(PolicyName), "policy", policy, _listed(get_args(PolicyName)))
        here = f"{_listed(self.policy_names)}: the model has no other"
        check(policy in self.policy_names, "policy", policy, here)
        if catalogue is not None and catalogue.hash != self.catalogue.hash:
            return self.extended(catalogue).design(
                prompts, n, guidance, temperature, seed, policy, None, require, forbid,
                top_p=top_p, candidates=candidates, budget=budget,
            )  # fmt: skip
        num_tokens = self.reference.config.num_workflow_tokens
        grammar = Grammar(
            self.catalogue, self.vocabulary, num_tokens, require=require, forbid=forbid
        )
        gate = Gate(budget, seed)
        if policy == "best_fixed":
            templates = [self.policies["best_fixed"]]
            found = [self._known(templates, grammar, 1, prompt, gate) for prompt in prompts]
        elif policy == "retrieval":
            found = self._retrieve(prompts, grammar, candidates, gate)
        else:
            tuned = {"grpo": self.tuned, "sft": self.reference}.get(policy)
            guidance = guidance if policy == "grpo" else 1.0
            drawer = Drawer(tuned, self.reference, grammar, guidance, temperature, top_p)
            found = distinct(drawer, prompts, candidates, seed, gate)
        return [row[:n] for row in self._ranked(prompts, found)]

    def _ranked(
        self, prompts: Sequence[str], found: Sequence[Sequence[Design]]
    ) -> list[list[Design]]:
        """Designs with what the ensemble says of them, best first."""
        if self._ensemble is None:
            return [
                sorted(row, key=lambda d: (-(d.logprob or 0.0), d.fingerprint)) for row in found
            ]
        texts = [prompt for prompt, row in zip(prompts, found, strict=True) for _ in row]
        tokens = [design.tokens for row in found for design in row]
        scored = zip(
            *self._ensemble.score_and_interval(texts, tokens),
            self._ensemble.unfamiliar(texts, tokens),
            strict=True,
        )
        judged = []
        for row in found:
            designs = []
            for design in row:
                score, low, high, strange = next(scored)
                interval = (float(low), float(high))
                designs.append(
                    dataclasses.replace(
                        design, score=float(score), interval=interval, unfamiliar=bool(strange)
                    )
                )
            judged.append(sorted(designs, key=lambda d: (-d.score, d.fingerprint)))
        return judged

    def _known(
        self, templates: Iterable[Any], grammar: Grammar, num: int, prompt: str, gate: Gate
    ) -> list[Design]:
        """The first `num` distinct stored templates that grammar and budget allow."""
        found: dict[str, Design] = {}
        for template in templates:
            workflow = Workflow.from_api(template)
            fingerprint = workflow.template_fingerprint()
            if fingerprint not in found:
                tokens = encode(workflow, grammar).tokens
                design = Design(workflow=workflow, tokens=tokens, fingerprint=fingerprint)
                if grammar.accepts(tokens) and (design := gate.passed(prompt, design)):
                    found[fingerprint] = design
            if len(found) == num:
                break
        gate.check(prompt, found)
        if not found:
            raise ValueError("design: no stored workflow satisfies catalogue, require and forbid")
        return list(found.values())

    def _retrieve(
        self, prompts: Sequence[str], grammar: Grammar, num: int, gate: Gate
    ) -> list[list[Design]]:
        """Workflows that did best on the most similar train prompts."""
        known = self.policies["retrieval"]
        similarity = prompt_similarity(known["prompts"])
        found = []
        for prompt in prompts:
            scores = similarity(prompt)
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
            templates = (known["workflows"][i] for i in order)
            found.append(self._known(templates, grammar, num, prompt, gate))
        return found


def is_untuned(folder: Path) -> bool:
    """Whether a folder is one of `train_sft` alone, not a registered model."""
    return (folder / VOCABULARY_FILE).is_file() and not (folder / "model").exists()


def _listed(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}"

"""Designs on their way: drawn by a policy until they differ and fit a budget of seconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from flowloom.config import check
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import rollout
from flowloom.workflow import Grammar, Workflow, decode, random_workflows

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
    score: float | None = None
    """Predicted score of a single render, in rubric units; None without a reward ensemble."""
    interval: tuple[float, float] | None = None
    """Where a single render's score will lie, at the level the ensemble was calibrated for."""
    unfamiliar: bool = False
    """Whether the ensemble's members differ more than they did in calibration: the score is then
    no more than a guess."""
    logprob: float | None = None
    """Log-probability under the policy that drew it; None where none did."""
    seconds: float | None = None
    """Predicted seconds of a render, where a budget was asked for."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a render of a design may take."""

    seconds: float
    """The most."""
    seconds_of: Callable[[Workflow], float]
    """Predicted seconds of a filled workflow, as `render.cost` has them."""

    def __post_init__(self) -> None:
        """Check the bound."""
        positive = 0 < self.seconds < math.inf
        check(positive, "budget_seconds", self.seconds, "a finite number > 0")


class Gate:
    """Lets designs within the budget pass; all of them where there is none."""

    def __init__(self, budget: Budget | None, seed: int):
        self._budget, self._seed = budget, seed
        self._seconds: dict[tuple[str, str], float] = {}

    def passed(self, prompt: str, design: Design) -> Design | None:
        """The design with its seconds, or None if these are too many."""
        if self._budget is None:
            return design
        key = (prompt, design.fingerprint)
        if key not in self._seconds:
            filled = design.workflow.fill(prompt, seed=self._seed)
            self._seconds[key] = self._budget.seconds_of(filled)
        seconds = self._seconds[key]
        within = seconds <= self._budget.seconds
        return dataclasses.replace(design, seconds=seconds) if within else None

    def check(self, prompt: str, found: Mapping[str, Design]) -> None:
        """Say what the cheapest design takes where the budget left none."""
        seconds = [value for (text, _), value in self._seconds.items() if text == prompt]
        if self._budget is not None and seconds and not found:
            raise ValueError(
                f"budget_seconds: got {self._budget.seconds:g}, expected at least "
                f"{min(seconds):.3g}: so long takes the cheapest of {len(seconds)} designs for "
                f"{prompt!r}"
            )


@dataclasses.dataclass(frozen=True)
class Drawer:
    """How a policy draws designs."""

    tuned: Policy | None
    """The policy that guidance extrapolates to; None is random workflows."""
    reference: Policy
    grammar: Grammar
    guidance: float
    temperature: float
    top_p: float | None

    def __call__(
        self, prompts: Sequence[str], num: int, seed: int
    ) -> list[tuple[list[int], float | None]]:
        """Tokens and log-probability of `num` designs for each prompt."""
        if self.tuned is None:
            rows = random_workflows(self.grammar, len(prompts) * num, seed)
            return [(row.tokens, None) for row in rows]
        drawn = rollout(
            self.tuned,
            self.grammar,
            prompts,
            num,
            temperature=self.temperature,
            top_p=self.top_p,
            reference=self.reference,
            guidance=self.guidance,
            seed=seed,
        )
        return list(zip(drawn.tokens, drawn.logprobs_BT.sum(1).tolist(), strict=True))


def distinct(
    draw: Drawer, prompts: Sequence[str], num: int, seed: int, gate: Gate
) -> list[list[Design]]:
    """Sample until each prompt has `num` designs that differ by fingerprint and pass the gate."""
    found: list[dict[str, Design]] = [{} for _ in prompts]
    lacking = list(range(len(prompts)))
    for attempt in range(MAX_ROUNDS):
        rows = draw([prompts[i] for i in lacking], num, (seed << 32) + attempt)
        for row, (tokens, logprob) in enumerate(rows):
            i = lacking[row // num]
            workflow = decode(tokens, draw.grammar)
            fingerprint = workflow.template_fingerprint()
            if len(found[i]) < num and fingerprint not in found[i]:
                design = Design(
                    workflow=workflow, tokens=tokens, fingerprint=fingerprint, logprob=logprob
                )
                if passed := gate.passed(prompts[i], design):
                    found[i][fingerprint] = passed
        lacking = [i for i in lacking if len(found[i]) < num]
        if not lacking:
            break
    for prompt, designs in zip(prompts, found, strict=True):
        gate.check(prompt, designs)
    return [list(designs.values()) for designs in found]

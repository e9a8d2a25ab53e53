"""Policies by name: who designs, how often, at which temperature, and which design is rendered.

    <who>[_cold|_greedy][_one]

`who` is `grpo` (GRPO with guidance), `grpo_unguided` (w = 1), `sft` or `conditioned` (SFT on all
cells after a word for their score, asked for the best). Alone it writes several designs of which
the best by predicted score is rendered, as `flowloom design` lists it first; `_one` writes a single
one. `_cold` samples at a low temperature, `_greedy` takes the likeliest token. `retrieval`,
`best_fixed` and `random` have one design as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from flowloom.designer.design import Designer, PolicyName
from flowloom.designer.loading import load_policy
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import rollout
from flowloom.designer.score_levels import load_levels, prompt_for_best
from flowloom.evaluation.config import CONDITIONED, EvaluateConfig, parse_policy
from flowloom.evaluation.frame import Choice
from flowloom.workflow import Grammar, decode

GREEDY_TEMPERATURE = 1e-4
"""Tokens less likely by a thousandth of a nat are never taken."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """How one policy samples."""

    who: str
    """`grpo`, `sft`, `conditioned`, `retrieval`, `best_fixed` or `random`."""
    num: int = 1
    """Designs per prompt."""
    guidance: float = 1.0
    """Weight w, for `grpo`."""
    temperature: float = 1.0
    """Divides log-probabilities."""


class Conditioned:
    """A designer that was trained on scores, asked for the best one."""

    def __init__(self, policy: Policy, levels: int | None):
        """Take the policy and the number of levels of its training."""
        self.policy, self.levels = policy, levels

    @classmethod
    def load(cls, designer_dir: Path) -> Conditioned:
        """Read a folder of `train_sft`."""
        return cls(load_policy(designer_dir), load_levels(designer_dir))

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        """What the policy reads."""
        return [prompt_for_best(prompt, self.levels) for prompt in prompts]


def draw_of(name: str, config: EvaluateConfig) -> Draw:
    """What a policy's name stands for.

    Raises:
        ValueError: No policy has this name.
    """
    who, temperature, single = parse_policy(name)
    if who in ("retrieval", "best_fixed", "random"):
        return Draw(who)
    guidance = {"grpo": config.guidance}.get(who, 1.0)
    value = {"": 1.0, "cold": config.cold_temperature, "greedy": GREEDY_TEMPERATURE}[temperature]
    num = 1 if single else config.num_designs
    return Draw("grpo" if who == "grpo_unguided" else who, num, guidance, value)


def choose(
    designer: Designer,
    draw: Draw,
    prompts: Sequence[str],
    seed: int,
    conditioned: Conditioned | None = None,
) -> list[Choice]:
    """The design of a policy for each prompt.

    Raises:
        ValueError: `conditioned` is wanted and was not given.
    """
    if draw.who in ("retrieval", "best_fixed", "random"):
        policy = cast(PolicyName, draw.who)
        designs = designer.design(prompts, n=1, seed=seed, policy=policy)
        return [Choice.of(found[0]) for found in designs]
    if draw.num > 1 and draw.who != CONDITIONED:
        designs = designer.design(
            prompts,
            n=draw.num,
            guidance=draw.guidance,
            temperature=draw.temperature,
            seed=seed,
            policy=cast(PolicyName, draw.who),
        )
        return [Choice.of(found[0]) for found in designs]
    rows = sample(designer, draw, prompts, seed, conditioned)
    repeated = [prompt for prompt in prompts for _ in range(draw.num)]
    choices = choices_of(designer, repeated, rows)
    best = []
    for first in range(0, len(choices), draw.num):
        group = choices[first : first + draw.num]
        best.append(min(group, key=lambda choice: (-choice.predicted, choice.fingerprint)))
    return best


def sample(
    designer: Designer,
    draw: Draw,
    prompts: Sequence[str],
    seed: int,
    conditioned: Conditioned | None = None,
) -> list[list[int]]:
    """Tokens of `draw.num` designs for each prompt, those of a prompt together."""
    # Far from the seeds that `design` counts up from.
    options: dict[str, Any] = {"temperature": draw.temperature, "seed": (seed << 32) + (1 << 31)}
    grammar = grammar_of(designer)
    if draw.who == CONDITIONED:
        if conditioned is None:
            raise ValueError("policies: got conditioned, expected its designer as an input")
        return rollout(
            conditioned.policy, grammar, conditioned.prompts(prompts), draw.num, **options
        ).tokens
    if draw.who == "sft":
        return rollout(designer.reference, grammar, prompts, draw.num, **options).tokens
    return rollout(
        designer.tuned,
        grammar,
        prompts,
        draw.num,
        reference=designer.reference,
        guidance=draw.guidance,
        **options,
    ).tokens


def choices_of(
    designer: Designer, prompts: Sequence[str], rows: Sequence[Sequence[int]]
) -> list[Choice]:
    """Token rows as designs with predicted score and interval, one per prompt."""
    assert designer.ensemble is not None
    grammar = grammar_of(designer)
    predicted = designer.ensemble.score_and_interval(prompts, rows)
    choices = []
    for tokens, score, low, high in zip(rows, *predicted, strict=True):
        workflow = decode(tokens, grammar)
        choices.append(
            Choice(
                workflow=workflow,
                fingerprint=workflow.template_fingerprint(),
                predicted=float(score),
                interval=(float(low), float(high)),
                num_tokens=len(tokens),
            )
        )
    return choices


def grammar_of(designer: Designer) -> Grammar:
    """The grammar of a designer's catalogue, vocabulary and budget."""
    budget = designer.tuned.config.num_workflow_tokens
    return Grammar(designer.catalogue, designer.vocabulary, budget)

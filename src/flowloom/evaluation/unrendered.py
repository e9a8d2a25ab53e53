"""Designs that are not rendered: are they all valid, can all be read back, how many differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowloom.designer.design import Designer
from flowloom.designer.rollout import rollout
from flowloom.evaluation.diversity import Known, distinct
from flowloom.evaluation.policies import Conditioned, Draw, grammar_of, sample
from flowloom.workflow import Grammar, decode, encode, random_workflows, validate

AT_ONCE = 512
"""Designs sampled in one call; fixes the sequence of random numbers."""


def check_policies(
    designer: Designer, prompts: Sequence[str], number: int, guidance: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Check `number` designs of the candidate over all prompts in turn, and as many random ones.

    Returns:
        For `candidate` and `random`, what `check_designs` counts.
    """
    grammar = grammar_of(designer)
    sampled: list[list[int]] = []
    for start in range(0, number, AT_ONCE):
        drawn = rollout(
            designer.tuned,
            grammar,
            [prompts[i % len(prompts)] for i in range(start, min(start + AT_ONCE, number))],
            reference=designer.reference,
            guidance=guidance,
            seed=(seed << 32) + start,
        )
        sampled += drawn.tokens
    random = [encoded.tokens for encoded in random_workflows(grammar, number, seed)]
    return {
        "candidate": check_designs(sampled, grammar),
        "random": check_designs(random, grammar),
    }


def check_designs(rows: Sequence[Sequence[int]], grammar: Grammar) -> dict[str, Any]:
    """Count valid and decodable token rows, and the share of distinct workflows among them.

    A row is decodable if it reads as a workflow which, written and read again, has the same
    fingerprint; it is valid if the independent checker finds no error.
    """
    valid = decodable = 0
    fingerprints = set()
    for tokens in rows:
        try:
            workflow = decode(tokens, grammar)
            again = decode(encode(workflow, grammar).tokens, grammar)
        except ValueError:
            continue
        decodable += again.fingerprint() == workflow.fingerprint()
        problems = validate(workflow, grammar.catalogue)
        valid += not any(problem.severity == "error" for problem in problems)
        fingerprints.add(workflow.template_fingerprint())
    unique_frac = len(fingerprints) / len(rows) if rows else 0.0
    return {"n": len(rows), "valid": valid, "decodable": decodable, "unique_frac": unique_frac}


def diversity(
    designer: Designer,
    draw: Draw,
    prompts: Sequence[str],
    seed: int,
    known: Known,
    conditioned: Conditioned | None = None,
) -> dict[str, Any]:
    """One design for each prompt: how many differ, and how like training workflows they are.

    Returns:
        `n`, `raw`, `collapsed` (see `distinct`); `similarity`, the mean likeness to the nearest
        known workflow, and `known`, the share that are known; `num_tokens`, the mean length.
    """
    rows = sample(designer, draw, prompts, seed, conditioned)
    grammar = grammar_of(designer)
    workflows = [decode(tokens, grammar) for tokens in rows]
    nearest = known.nearest(workflows)
    return {
        **distinct(workflows),
        "similarity": float(nearest.mean()),
        "known": float((nearest == 1.0).mean()),
        "num_tokens": float(np.mean([len(tokens) for tokens in rows])),
    }

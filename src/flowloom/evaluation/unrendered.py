"""Designs that are not rendered: are they all valid, can all be read back, how many differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowloom.designer.design import Designer
from flowloom.designer.rollout import rollout
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
    budget = designer.tuned.config.num_workflow_tokens
    grammar = Grammar(designer.catalogue, designer.vocabulary, budget)
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

"""What a policy has learned, in one table: which model files it loads, by words of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowloom.dataset.tokenizer import split_words
from flowloom.workflow import Workflow

ALL = "all"
MIN_COUNT = 8
"""Prompts a word must be in."""
MAX_WORDS = 12
"""Words shown."""
MIN_SHARE = 0.02
"""Share of designs a file must be in to get a column."""


def choices(prompts: Sequence[str], workflows: Sequence[Workflow]) -> dict[str, Any]:
    """Shares of designs that load each checkpoint, over all prompts and by word.

    The words shown are those whose shares differ most from the overall ones, weighted by how often
    the word occurs (chi-square), and by more than chance; so openings and articles drop out.

    Args:
        prompts: One per design.
        workflows: The designs.

    Returns:
        `models`, file names by use, and `rows` with `word`, `n` and `shares` by model; the first
        row is `all`.
    """
    loaded = [_checkpoints(workflow) for workflow in workflows]
    names = sorted({name for used in loaded for name in used})
    uses_PM = np.array([[name in used for name in names] for used in loaded], float)
    uses_PM = uses_PM.reshape(len(prompts), len(names))
    kept = [
        m for m in np.argsort(-uses_PM.sum(0), kind="stable") if uses_PM[:, m].mean() >= MIN_SHARE
    ]
    names, uses_PM = [names[m] for m in kept], uses_PM[:, kept]
    overall_M = uses_PM.mean(0)
    words = [set(split_words(prompt)) for prompt in prompts]

    rows = []
    for word in sorted(set().union(*words)):
        has_P = np.array([word in of_prompt for of_prompt in words])
        # A word of every prompt says nothing.
        if has_P.sum() < MIN_COUNT or has_P.all():
            continue
        shares_M = uses_PM[has_P].mean(0)
        spread_M = np.maximum(overall_M * (1 - overall_M), 1e-9)
        weight = float(has_P.sum() * ((shares_M - overall_M) ** 2 / spread_M).sum())
        # About the 99.9 % quantile if the word did not matter: of many words some look as if.
        if weight > 9.0 + 2.5 * len(names):
            rows.append((-weight, word, int(has_P.sum()), shares_M))
    rows.sort(key=lambda row: row[:2])
    shown = [{"word": ALL, "n": len(prompts), "shares": overall_M.tolist()}]
    shown += [{"word": w, "n": n, "shares": s.tolist()} for _, w, n, s in rows[:MAX_WORDS]]
    return {"models": names, "rows": shown}


def _checkpoints(workflow: Workflow) -> set[str]:
    nodes = (workflow.nodes[node_id] for node_id in workflow.order())
    return {str(node.inputs["ckpt_name"]) for node in nodes if "ckpt_name" in node.inputs}

"""Keeps whatever a grammar writes within the limit on pixels x batch x steps.

The work of a workflow is not followed token by token. Instead no token is legal with which a budget
full of the costliest nodes could exceed the limit: large batches go first, then large pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flowloom.workflow.tables import Tables


class _Worker(NamedTuple):
    """A class that works in steps: most steps per token of its own, most pixels, its batches."""

    steps_per_token: float
    pixels: float
    batched: bool


def bound_work(tables: Tables, budget: int) -> float:
    """Narrow the rows of batch sizes, and give the most pixels that a picture may have.

    Args:
        tables: Tables before any restriction, which so can only narrow.
        budget: Most tokens of a workflow.
    """
    limits, workers = tables.catalogue.limits, _workers(tables)
    rows = [r for r, hole in enumerate(tables.holes) if hole.step.name == "batch_size"]
    grids = [values for r in rows if len(values := _numbers(tables, r))]

    def most_work(pixels: float, batch: float) -> float:
        return (budget - 2) * max(
            (
                worker.steps_per_token
                * min(pixels, worker.pixels)
                * (batch if worker.batched else 1.0)
                for worker in workers
            ),
            default=0.0,
        )

    pixels = float(limits.pixels)
    # Every batch size keeps at least its least value.
    batch = max((float(values.min()) for values in grids), default=1.0)
    for larger in np.unique(np.concatenate([[1.0], *grids])).tolist():
        if larger > batch and most_work(pixels, larger) <= limits.work:
            batch = larger
    if (work := most_work(pixels, batch)) > limits.work:
        pixels *= limits.work / work
    too_large = np.nan_to_num(tables.token_number, nan=0.0) > batch
    for r in rows:
        tables.allowed[r, too_large] = False
    return pixels


def _numbers(tables: Tables, row: int) -> np.ndarray:
    values = tables.token_number[tables.allowed[row]]
    return values[values > 0]


def _workers(tables: Tables) -> list[_Worker]:
    t, found = tables, []
    positions: dict[int, list[int]] = {}
    for at in t.positions:
        positions.setdefault(int(t.owner[at]), []).append(at)
    for c, places in positions.items():
        rows = {t.schema.program[at].name: int(t.row[at]) for at in places}
        inputs = t.catalogue.nodes[t.class_names[c]].inputs
        if "steps" not in rows:
            continue
        # Each input takes a token, but for a seed and what a growing one brings.
        tokens = 1 + sum(spec.element is None and spec.name in rows for spec in inputs)
        steps = max(_numbers(t, rows["steps"]).max(initial=1.0), 1.0)
        sides = [_numbers(t, rows[n]).max(initial=1.0) for n in ("width", "height") if n in rows]
        reads = any(t.sized[t.type[at]].any() for at in places)
        area = float(np.prod(sides)) if len(sides) == 2 else 0.0
        batched = reads or "batch_size" in rows
        found.append(_Worker(steps / tokens, np.inf if reads else area, batched))
    return found

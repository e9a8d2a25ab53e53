"""Keeps whatever a grammar writes within the limit on pixels x batch x steps of one sampling run.

The work is not followed token by token. Instead the limit is divided once: so large a batch and so
large a picture that a usual number of steps fits, and then as many steps as fit these two. That
depends on the catalogue alone, so a restricted grammar only writes less.
"""

from __future__ import annotations

import numpy as np

from flowloom.workflow.tables import Tables

USUAL_STEPS = 20


def bound_work(tables: Tables) -> float:
    """Narrow the rows of batch sizes and steps; returns the most pixels that a picture may have."""
    limits = tables.catalogue.limits
    room = limits.work / USUAL_STEPS
    batch = max(1.0, min(float(limits.batch), room // limits.pixels))
    pixels = min(float(limits.pixels), room / batch)
    most = {"batch_size": batch, "steps": limits.work / (pixels * batch)}
    numbers = np.nan_to_num(tables.token_number, nan=0.0)
    for row, hole in enumerate(tables.holes):
        if hole.step.name in most:
            tables.allowed[row, numbers > most[hole.step.name]] = False
    return pixels

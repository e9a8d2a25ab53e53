"""What a workflow costs to render on the embedded engine, without rendering it.

The engine runs every node as it would, but its transformers answer at once with nothing, while what
they would have computed is counted as always. So the counts are the render's own, whatever a
workflow does: samplers, guidance, texts with times of their own, merges, upscalers.

Seconds of a workflow that is rendered on its own, one after the other, follow from two counts,

    seconds = call_s * network calls + flop_s * FLOPs,

since a small network's call costs its overhead first. Both constants are fitted to a few renders on
the machine at hand, and raised until none of these took longer than was said.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from flowloom.render.engine import Engine, RenderJob
from flowloom.render.models import ModelStore, Weights
from flowloom.shapes.model import ShapesModel
from flowloom.workflow import Workflow

NUM_TIMINGS = 3
"""Timed renders of each workflow; the fastest counts: other load only makes them slower."""


class Counted(NamedTuple):
    """What one render takes."""

    calls: int
    """Calls of a transformer, a batch of guided texts being one."""
    flops: int
    """As `RenderResult.flops`."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a machine renders."""

    call_s: float
    """Seconds of a network call, whatever it computes."""
    flop_s: float
    """Seconds of a FLOP."""

    def seconds(self, counted: Counted) -> float:
        """Seconds of a render."""
        return self.call_s * counted.calls + self.flop_s * counted.flops


class CostMeter:
    """Counts and times workflows over the models of one store."""

    def __init__(self, store: ModelStore):
        """Take the models."""
        self._store = store
        self._idle = _Idle(store.catalogue, store.roots)
        self._engine = Engine(self._idle)

    def count(self, workflow: Workflow) -> Counted:
        """What a filled workflow takes.

        Raises:
            ValueError: It cannot be executed: names node, class and reason.
        """
        before = self._idle.num_calls
        (result,) = self._engine.render([RenderJob(workflow, "counted")])
        return Counted(self._idle.num_calls - before, result.flops)

    def measure(self, workflows: Sequence[Workflow]) -> Speed:
        """Time filled workflows on this machine, their models loaded.

        Raises:
            ValueError: One cannot be executed, or none calls a network.
        """
        engine, counts, spent_s = Engine(self._store), [], []
        for workflow in workflows:
            counted = self.count(workflow)
            if counted.calls:
                counts.append(counted)
                spent_s.append(_seconds(engine, workflow))
        if not counts:
            raise ValueError(f"cost: got {len(workflows)} workflows without a sampler to time")
        return fit(counts, spent_s)


def fit(counts: Sequence[Counted], spent_s: Sequence[float]) -> Speed:
    """The speed that explains timed renders and underrates none.

    Least squares with constants >= 0: where one would be negative, the other explains alone. Then
    both are raised by the largest ratio of seconds spent to seconds explained.
    """
    counts_R2, spent_R = np.array(counts, float), np.array(spent_s)
    best = np.linalg.lstsq(counts_R2, spent_R, rcond=None)[0]
    if best.min() < 0:
        alone = [(spent_R @ column) / (column @ column) for column in counts_R2.T]
        options = np.diag(alone)
        errors = ((counts_R2 @ options - spent_R[:, None]) ** 2).sum(0)
        best = options[:, int(errors.argmin())]
    best = best * (spent_R / (counts_R2 @ best)).max()
    return Speed(float(best[0]), float(best[1]))


def _seconds(engine: Engine, workflow: Workflow) -> float:
    job = RenderJob(workflow, "timed")
    engine.render([job])  # loads the models
    spent_s = []
    for _ in range(NUM_TIMINGS):
        started_s = time.perf_counter()
        engine.render([job])
        spent_s.append(time.perf_counter() - started_s)
    return min(spent_s)


class _Idle(ModelStore):
    """A store whose transformers do nothing; texts are encoded, since nodes work on them."""

    num_calls = 0

    def transformer(self, weights: Weights) -> ShapesModel:
        model = self.checkpoint(weights.parts[0].checkpoint)
        return cast(ShapesModel, _NoModel(self, model))


class _NoModel:
    """What a denoiser asks of a transformer, without its work."""

    def __init__(self, store: _Idle, model: ShapesModel):
        self.config, self._store = model.config, store

    def text_keys(self, conditioning: Any) -> _NoKeys:
        return _NoKeys()

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, keys: Any) -> Tensor:
        self._store.num_calls += 1
        return torch.zeros_like(x_BCHW)


class _NoKeys:
    """Keys of any texts."""

    def __getitem__(self, rows: Tensor) -> _NoKeys:
        return self

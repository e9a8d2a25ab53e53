"""The embedded engine: executes ComfyUI workflows over the shapes world's models, in batches.

All jobs of a call are one plan in which every different node is computed once
(`flowloom.render.plan`). Texts of one encoder are encoded in one batch. Sampler runs that wait are
grouped by model, picture size and sampler, and run in batches of up to `batch_size` rows, which may
differ in steps, schedule, guidance and texts. What a row becomes is the same to the bit in any
batch where the network has whole vectors of channels (multiples of 32, as the shipped models have)
on the CPUs that were looked at; elsewhere pictures depend on the list of jobs through rounding, and
not at all where the list is equal.

What the nodes do is in `flowloom.render.nodes` and `flowloom.render.sampler_nodes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.render import batch, conditioning
from flowloom.render.batch import SamplerTask
from flowloom.render.models import ModelStore, Weights
from flowloom.render.nodes import NODES, Costly, Encoding
from flowloom.render.plan import Plan, Step
from flowloom.render.sampler_nodes import SAMPLER_NODES
from flowloom.render.sorting import batch_key
from flowloom.workflow import Workflow

__all__ = ["BATCH_SIZE", "Engine", "RenderJob", "RenderResult", "batch_key"]

BATCH_SIZE = 32
FUNCTIONS = NODES | SAMPLER_NODES


@dataclasses.dataclass(frozen=True)
class RenderJob:
    """One workflow to render."""

    workflow: Workflow
    """Filled in: texts and seeds in place."""
    id: str
    """Named in errors; any text."""


@dataclasses.dataclass(frozen=True)
class RenderResult:
    """One picture."""

    image: np.ndarray
    """`[3, H, W]` float32 in [-1, 1]."""
    flops: int
    """Multiply-adds times two of the network calls that it takes on its own."""


class Engine:
    """Renders filled workflows with the models of one store."""

    def __init__(self, store: ModelStore, batch_size: int = BATCH_SIZE):
        """Take the store and the number of sampler rows per batch."""
        self.store = store
        self.batch_size = batch_size

    @torch.inference_mode()
    def render(self, jobs: Sequence[RenderJob]) -> list[RenderResult]:
        """Render workflows, results in their order.

        Raises:
            ValueError: A workflow cannot be executed: names job, node, class and reason.
            FloatingPointError: A sampler gave something that is not finite; names the batch's jobs.
        """
        plan = Plan(FUNCTIONS)
        added = [plan.add(job.workflow, job.id) for job in jobs]
        pending = plan.steps
        while pending:
            pending = self._advance(pending)
        results = []
        for steps, root in added:
            assert root.outputs is not None
            image: Tensor = root.outputs[0]
            flops = sum(step.flops for step in steps)
            results.append(RenderResult(image.contiguous().numpy().copy(), flops))
        return results

    def _advance(self, steps: Sequence[Step]) -> list[Step]:
        """Compute what can be computed now; what is left."""
        texts: dict[Weights, list[tuple[Step, str]]] = {}
        samplers: dict[tuple, list[tuple[Step, SamplerTask]]] = {}
        left = []
        for step in steps:
            if not step.is_ready:
                left.append(step)
                continue
            try:
                result = step.function(self.store, **step.inputs())
            except ValueError as error:
                raise ValueError(f"{step.where}: {error}") from error
            if isinstance(result, Encoding):
                texts.setdefault(result.encoder, []).append((step, result.text))
            elif isinstance(result, SamplerTask):
                samplers.setdefault(result.group, []).append((step, result))
            elif isinstance(result, Costly):
                step.outputs, step.flops = result.outputs, result.flops
            else:
                step.outputs = result
        for encoder, waiting in texts.items():
            self._encode(encoder, waiting)
        for waiting in samplers.values():
            # Long schedules first, so that a batch shrinks and does not drag short rows along.
            waiting.sort(key=lambda item: -len(item[1].times))
            for first in range(0, len(waiting), self.batch_size):
                self._sample(waiting[first : first + self.batch_size])
        return left

    def _encode(self, encoder: Weights, waiting: Sequence[tuple[Step, str]]) -> None:
        """Encode the texts of one encoder, each different one once."""
        different = list(dict.fromkeys(text for _, text in waiting))
        try:
            encoded = conditioning.encode(self.store.text_encoder(encoder), different)
        except ValueError as error:
            raise ValueError(f"{waiting[0][0].where}: {error}") from error
        by_text = dict(zip(different, encoded, strict=True))
        for step, text in waiting:
            step.outputs = ((by_text[text],),)

    def _sample(self, waiting: Sequence[tuple[Step, SamplerTask]]) -> None:
        """Run one batch; all tasks are of one group."""
        steps, tasks = [step for step, _ in waiting], [task for _, task in waiting]
        try:
            model = self.store.transformer(tasks[0].guider.model.weights)
            results = batch.run(model, tasks)
        except ValueError as error:
            raise ValueError(f"{steps[0].where}: {error}") from error
        except FloatingPointError as error:
            names = "; ".join(step.where for step in steps)
            raise FloatingPointError(f"{error}: {names}") from error
        for step, task, result in zip(steps, tasks, results, strict=True):
            outputs = (result.latent_CHW, result.denoised_CHW)
            step.outputs, step.flops = outputs[: task.num_outputs], result.flops

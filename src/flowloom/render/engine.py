"""The embedded engine: executes ComfyUI workflows over the shapes world's models, in batches.

Each workflow runs as a coroutine that stops where it needs a sampler. The samplers that wait are
grouped by model, picture size and sampler, and run in batches of up to `batch_size` rows, which may
differ in steps, schedule, guidance and start. So pictures depend on the list of jobs only through
float rounding, and not at all where the list is equal.

What the nodes do is in `flowloom.render.nodes`.

Shapes: B rows, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.render import sampling
from flowloom.render.models import ModelStore
from flowloom.render.nodes import ModelRef, SamplerTask, TextRef, execute
from flowloom.shapes import prompts
from flowloom.shapes.model import Conditioning, flops_per_call
from flowloom.workflow import Workflow

BATCH_SIZE = 32


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
    """Multiply-adds times two of the network calls it took."""


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
        runs = [_Run(self.store, job) for job in jobs]
        waiting = {index: task for index, run in enumerate(runs) if (task := run.start())}
        while waiting:
            groups: dict[tuple, list[int]] = {}
            for index, task in waiting.items():
                groups.setdefault(task.group, []).append(index)
            finished: dict[int, tuple[Tensor, int]] = {}
            for members in groups.values():
                # Long schedules first, so that a batch shrinks and does not drag short rows along.
                members = sorted(members, key=lambda index: -len(waiting[index].times))
                for first in range(0, len(members), self.batch_size):
                    rows = members[first : first + self.batch_size]
                    try:
                        outcome = self._sample([waiting[index] for index in rows])
                    except FloatingPointError as error:
                        names = ", ".join(jobs[index].id for index in rows)
                        raise FloatingPointError(f"{error}; jobs {names}") from None
                    finished.update(zip(rows, outcome, strict=True))
            waiting = {
                index: task for index in waiting if (task := runs[index].resume(*finished[index]))
            }
        return [run.result() for run in runs]

    def _sample(self, tasks: Sequence[SamplerTask]) -> list[tuple[Tensor, int]]:
        """Run one batch: final latents and FLOPs by row. All tasks are of one group."""
        model = self.store.model(tasks[0].model.checkpoint, tasks[0].model.patches)
        latent_BCHW = torch.stack([task.latent_CHW for task in tasks])
        noise_BCHW = torch.stack([noise(task.seed, task.latent_CHW.shape) for task in tasks])
        start_B = torch.tensor([task.times[0] for task in tasks])
        x_BCHW = sampling.add_noise(latent_BCHW, noise_BCHW, start_B)
        positive = self._encode([task.positive for task in tasks])
        negative = self._encode([task.negative for task in tasks])
        cfg_B = torch.tensor([task.cfg for task in tasks])
        guided_B = torch.tensor([task.guided for task in tasks])

        def velocity(x_NCHW: Tensor, t_N: Tensor, rows_N: Tensor) -> Tensor:
            twice = torch.nonzero(guided_B[rows_N]).flatten()
            if not len(twice):
                return model.velocity(x_NCHW, t_N, positive[rows_N])
            cond = Conditioning.cat([positive[rows_N], negative[rows_N[twice]]])
            v = model.velocity(
                torch.cat([x_NCHW, x_NCHW[twice]]), torch.cat([t_N, t_N[twice]]), cond
            )
            v_NCHW, v_negative = v[: len(rows_N)], v[len(rows_N) :]
            v_NCHW[twice] = sampling.guide(v_NCHW[twice], v_negative, cfg_B[rows_N[twice]])
            return v_NCHW

        times = [task.times for task in tasks]
        x_BCHW = sampling.sample(velocity, x_BCHW, times, tasks[0].sampler)
        height, width = latent_BCHW.shape[2:]
        call = flops_per_call(model.config, (height, width), model.config.max_tokens)
        flops = [
            call * (1 + task.guided) * sampling.num_evaluations(task.sampler, len(task.times) - 1)
            for task in tasks
        ]
        return list(zip(x_BCHW.unbind(), flops, strict=True))

    def _encode(self, texts: Sequence[TextRef]) -> Conditioning:
        """Encode texts, each different one once."""
        rows: dict[tuple[ModelRef, str], int] = {}
        parts, order = [], {}
        for text in texts:
            order.setdefault(text.clip, {})[text.text] = None
        for clip, different in order.items():
            encoder = self.store.model(clip.checkpoint, clip.patches)
            parts.append(encoder.encode_text([prompts.tokenize(text) for text in different]))
            for text in different:
                rows[clip, text] = len(rows)
        cond = Conditioning.cat(parts)[torch.tensor([rows[t.clip, t.text] for t in texts])]
        kept_B = torch.tensor([float(not text.zeroed) for text in texts])
        return Conditioning(
            cond.tokens_BLD * kept_B[:, None, None], cond.mask_BL, cond.pooled_BD * kept_B[:, None]
        )


def batch_key(workflow: Workflow) -> tuple:
    """Sorts workflows so that those whose samplers can share a batch lie together."""
    files, samplers, scales = [], [], []
    for node_id in workflow.order():
        inputs = workflow.nodes[node_id].inputs
        for name in ("ckpt_name", "lora_name"):
            if name in inputs:
                files.append([inputs[name], inputs.get("strength_model")])
        if "sampler_name" in inputs:
            samplers.append([inputs["sampler_name"], inputs.get("steps")])
        if "scale_by" in inputs:
            scales.append(inputs["scale_by"])
    return str(files), len(samplers), str(scales), str(samplers)


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one job: a function of its seed and shape alone."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    return torch.randn(tuple(shape), generator=generator)


class _Run:
    """One workflow on its way."""

    def __init__(self, store: ModelStore, job: RenderJob):
        self.job = job
        self.flops = 0
        self._image: Tensor | None = None
        self._steps = execute(store, job.workflow)

    def start(self) -> SamplerTask | None:
        """Go on until the first sampler; None once the picture is there."""
        return self._send(None)

    def resume(self, latent_CHW: Tensor, flops: int) -> SamplerTask | None:
        """Hand the sampler's result in and go on until the next one."""
        self.flops += flops
        return self._send(latent_CHW)

    def _send(self, value: Tensor | None) -> SamplerTask | None:
        try:
            return self._steps.send(value)
        except StopIteration as stop:
            self._image = stop.value
            return None
        except ValueError as error:
            raise ValueError(f"job {self.job.id}: {error}") from error

    def result(self) -> RenderResult:
        assert self._image is not None
        image = self._image.contiguous().numpy().copy()
        return RenderResult(image=image, flops=self.flops)

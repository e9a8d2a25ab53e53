"""The embedded engine: executes ComfyUI workflows over the shapes world's models, in batches.

Each workflow runs as a coroutine that stops where it needs a sampler. The samplers that wait are
grouped by model, picture size and sampler, and run in batches of up to `batch_size` rows, which may
differ in steps, schedule, guidance and start. So pictures depend on the list of jobs only through
float rounding, and not at all where the list is equal.

What nodes mean is what ComfyUI does, with these differences: pixels are the latents, so `VAEDecode`
only clamps to [-1, 1]; `EmptyLatentImage` and `LatentUpscaleBy` round sizes to whole patches; a
KSampler with denoise 0 returns its latent unchanged; one picture per workflow, the first of its
first output.

Shapes: B rows, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowloom.render import images, sampling
from flowloom.render.models import ModelStore, Patch
from flowloom.shapes import prompts
from flowloom.shapes.model import Conditioning, flops_per_call
from flowloom.workflow import Link, Node, Workflow

BATCH_SIZE = 32
CHANNELS = 3


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


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a MODEL or CLIP link carries: a checkpoint and the LoRAs on it."""

    checkpoint: str
    patches: tuple[Patch, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Text:
    """What a CONDITIONING link carries; encoded where a sampler needs it."""

    clip: _Model
    text: str
    zeroed: bool = False


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """A KSampler that waits for its batch."""

    model: _Model
    positive: _Text
    negative: _Text
    latent_CHW: Tensor
    seed: int
    cfg: float
    sampler: str
    times: tuple[float, ...]

    @property
    def group(self) -> tuple:
        return (self.model, tuple(self.latent_CHW.shape), self.sampler)

    @property
    def guided(self) -> bool:
        # ComfyUI leaves the negative call out where its weight is 0.
        return not math.isclose(self.cfg, 1.0)


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

    def _sample(self, tasks: Sequence[_Sampling]) -> list[tuple[Tensor, int]]:
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

    def _encode(self, texts: Sequence[_Text]) -> Conditioning:
        """Encode texts, each different one once."""
        rows: dict[tuple[_Model, str], int] = {}
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
        self._steps = _execute(store, job.workflow)

    def start(self) -> _Sampling | None:
        """Go on until the first sampler; None once the picture is there."""
        return self._send(None)

    def resume(self, latent_CHW: Tensor, flops: int) -> _Sampling | None:
        """Hand the sampler's result in and go on until the next one."""
        self.flops += flops
        return self._send(latent_CHW)

    def _send(self, value: Tensor | None) -> _Sampling | None:
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


def _execute(store: ModelStore, workflow: Workflow) -> Generator[_Sampling, Any, Tensor]:
    """Evaluate nodes; yields each sampler, is sent its latent, returns the image `[C, H, W]`."""
    roots = workflow.roots()
    if not roots:
        raise ValueError("workflow: got no output node, expected a SaveImage")
    values: dict[str, tuple[Any, ...]] = {}
    for node_id in workflow.order():
        node = workflow.nodes[node_id]
        where = f"node {node_id} ({node.class_type})"
        if node.class_type != "KSampler" and node.class_type not in _NODES:
            known = ", ".join(sorted([*_NODES, "KSampler"]))
            raise ValueError(
                f"{where}: class not known to the embedded engine, expected one of {known}"
            )
        try:
            inputs = _inputs(node, values)
            if node.class_type == "KSampler":
                task = _sampling(store, **inputs)
                values[node_id] = (inputs["latent_image"] if task is None else (yield task),)
            else:
                values[node_id] = _NODES[node.class_type](store, **inputs)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return values[roots[0]][0]


def _inputs(node: Node, values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Literals of a node and what its links carry; inputs its class does not know are ignored."""
    function = _sampling if node.class_type == "KSampler" else _NODES[node.class_type]
    inputs = {}
    for name, required in _parameters(function).items():
        if name not in node.inputs:
            if required:
                raise ValueError(f"{name}: input is missing")
            continue
        value = node.inputs[name]
        if isinstance(value, Link):
            if value.node not in values or not 0 <= value.slot < len(values[value.node]):
                raise ValueError(
                    f"{name}: got link {list(value)}, expected an output of another node"
                )
            value = values[value.node][value.slot]
        if name in _LINKED and not isinstance(value, _LINKED[name]):
            raise ValueError(f"{name}: got {type(value).__name__}, expected a link of another type")
        inputs[name] = value
    return inputs


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Inputs a node's function takes, and whether each is required."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.default is p.empty for p in parameters}


def _sampling(
    store: ModelStore,
    *,
    model: _Model,
    positive: _Text,
    negative: _Text,
    latent_image: Tensor,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
) -> _Sampling | None:
    """The task of a KSampler, or None where it has nothing to do."""
    if sampler_name not in sampling.SAMPLERS:
        expected = ", ".join(sampling.SAMPLERS)
        raise ValueError(f"sampler_name: got {sampler_name!r}, expected one of {expected}")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected >= 1")
    times = sampling.schedule(scheduler, int(steps), float(denoise))
    if not times:
        return None
    # Only the strengths that act on the transformer distinguish batches.
    patches = tuple(p._replace(strength_clip=0.0) for p in model.patches if p.strength_model)
    return _Sampling(
        model=_Model(model.checkpoint, patches),
        positive=positive,
        negative=negative,
        latent_CHW=latent_image,
        seed=int(seed),
        cfg=float(cfg),
        sampler=sampler_name,
        times=tuple(times),
    )


def _checkpoint_loader(store: ModelStore, *, ckpt_name: str):
    store.path("checkpoints", ckpt_name)
    return _Model(ckpt_name), _Model(ckpt_name), "vae"


def _lora_loader(
    store: ModelStore,
    *,
    model: _Model,
    clip: _Model,
    lora_name: str,
    strength_model: float,
    strength_clip: float,
):
    store.path("loras", lora_name)
    patch = Patch(lora_name, float(strength_model), float(strength_clip))
    return (
        dataclasses.replace(model, patches=(*model.patches, patch)),
        dataclasses.replace(clip, patches=(*clip.patches, patch)),
    )


def _text_encode(store: ModelStore, *, text: str, clip: _Model):
    # Only the strengths that act on the text encoder distinguish encodings.
    patches = tuple(
        p._replace(strength_model=0.0)
        for p in clip.patches
        if p.strength_clip and store.touches_text(p.lora)
    )
    return (_Text(_Model(clip.checkpoint, patches), str(text)),)


def _zero_out(store: ModelStore, *, conditioning: _Text):
    return (dataclasses.replace(conditioning, zeroed=True),)


def _empty_latent(store: ModelStore, *, width: int, height: int, batch_size: int = 1):
    if batch_size != 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1")
    height, width = (max(int(value) // _PATCH, 1) * _PATCH for value in (height, width))
    _check_pixels(store, height, width)
    return (torch.zeros(CHANNELS, height, width),)


def _latent_upscale(store: ModelStore, *, samples: Tensor, upscale_method: str, scale_by: float):
    height, width = (max(round(side / _PATCH * scale_by), 1) * _PATCH for side in samples.shape[1:])
    _check_pixels(store, height, width)
    return (images.resize(samples[None], height, width, upscale_method)[0],)


def _decode(store: ModelStore, *, samples: Tensor, vae: str):
    return (samples.clamp(-1, 1),)


def _image_scale(store: ModelStore, *, image: Tensor, upscale_method: str, scale_by: float):
    height, width = (max(round(side * scale_by), 1) for side in image.shape[1:])
    _check_pixels(store, height, width)
    # Bicubic and lanczos overshoot.
    return (images.resize(image[None], height, width, upscale_method)[0].clamp(-1, 1),)


def _image_sharpen(
    store: ModelStore, *, image: Tensor, sharpen_radius: int, sigma: float, alpha: float
):
    return (images.sharpen(image[None], int(sharpen_radius), sigma, alpha)[0],)


def _image_blur(store: ModelStore, *, image: Tensor, blur_radius: int, sigma: float):
    return (images.blur(image[None], int(blur_radius), sigma)[0],)


def _save_image(store: ModelStore, *, images: Tensor, filename_prefix: str = ""):
    return (images,)


def _preview_image(store: ModelStore, *, images: Tensor):
    return (images,)


def _check_pixels(store: ModelStore, height: int, width: int) -> None:
    limit = store.catalogue.limits.pixels
    if height * width > limit:
        raise ValueError(f"size: got {width} x {height} pixels, expected at most {limit} in all")


_PATCH = 4
_LINKED = {
    "model": _Model,
    "clip": _Model,
    "vae": str,
    "positive": _Text,
    "negative": _Text,
    "conditioning": _Text,
    "latent_image": Tensor,
    "samples": Tensor,
    "image": Tensor,
    "images": Tensor,
}
_NODES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "CheckpointLoaderSimple": _checkpoint_loader,
    "LoraLoader": _lora_loader,
    "CLIPTextEncode": _text_encode,
    "ConditioningZeroOut": _zero_out,
    "EmptyLatentImage": _empty_latent,
    "LatentUpscaleBy": _latent_upscale,
    "VAEDecode": _decode,
    "ImageScaleBy": _image_scale,
    "ImageSharpen": _image_sharpen,
    "ImageBlur": _image_blur,
    "SaveImage": _save_image,
    "PreviewImage": _preview_image,
}

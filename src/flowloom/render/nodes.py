"""What the embedded node classes do. Every link carries a value of one of a few kinds.

What nodes mean is what ComfyUI does, with these differences: pixels are the latents, so `VAEDecode`
only clamps to [-1, 1]; `EmptyLatentImage` and `LatentUpscaleBy` round sizes to whole patches; a
KSampler with denoise 0 returns its latent unchanged; one picture per workflow, the first of its
first output.

Values: MODEL and CLIP are a `ModelRef`, CONDITIONING a `TextRef`, LATENT and IMAGE a tensor
`[C, H, W]`, VAE a name without meaning.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from flowloom.render import images, sampling
from flowloom.render.models import ModelStore, Patch
from flowloom.workflow import Link, Node, Workflow

CHANNELS = 3
_PATCH = 4


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """What a MODEL or CLIP link carries: a checkpoint and the LoRAs on it."""

    checkpoint: str
    """File name."""
    patches: tuple[Patch, ...] = ()
    """LoRAs in the order of their loaders."""


@dataclasses.dataclass(frozen=True)
class TextRef:
    """What a CONDITIONING link carries; encoded where a sampler needs it."""

    clip: ModelRef
    """Whose text encoder."""
    text: str
    """What it says."""
    zeroed: bool = False
    """Whether ConditioningZeroOut emptied it."""


@dataclasses.dataclass(frozen=True)
class SamplerTask:
    """A KSampler that waits for its batch."""

    model: ModelRef
    """With the LoRAs that act on the transformer."""
    positive: TextRef
    negative: TextRef
    latent_CHW: Tensor
    """What it starts from, before noise."""
    seed: int
    cfg: float
    sampler: str
    """One of `sampling.SAMPLERS`."""
    times: tuple[float, ...]
    """Schedule, not empty."""

    @property
    def group(self) -> tuple:
        """Tasks with equal groups may share a batch."""
        return (self.model, tuple(self.latent_CHW.shape), self.sampler)

    @property
    def guided(self) -> bool:
        """Whether the negative is needed; ComfyUI leaves its call out where its weight is 0."""
        return not math.isclose(self.cfg, 1.0)


def execute(store: ModelStore, workflow: Workflow) -> Generator[SamplerTask, Any, Tensor]:
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
                task = _sampler_task(store, **inputs)
                values[node_id] = (inputs["latent_image"] if task is None else (yield task),)
            else:
                values[node_id] = _NODES[node.class_type](store, **inputs)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return values[roots[0]][0]


def _inputs(node: Node, values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Literals of a node and what its links carry; inputs its class does not know are ignored."""
    function = _sampler_task if node.class_type == "KSampler" else _NODES[node.class_type]
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


def _sampler_task(
    store: ModelStore,
    *,
    model: ModelRef,
    positive: TextRef,
    negative: TextRef,
    latent_image: Tensor,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
) -> SamplerTask | None:
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
    return SamplerTask(
        model=ModelRef(model.checkpoint, patches),
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
    return ModelRef(ckpt_name), ModelRef(ckpt_name), "vae"


def _lora_loader(
    store: ModelStore,
    *,
    model: ModelRef,
    clip: ModelRef,
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


def _text_encode(store: ModelStore, *, text: str, clip: ModelRef):
    # Only the strengths that act on the text encoder distinguish encodings.
    patches = tuple(
        p._replace(strength_model=0.0)
        for p in clip.patches
        if p.strength_clip and store.touches_text(p.lora)
    )
    return (TextRef(ModelRef(clip.checkpoint, patches), str(text)),)


def _zero_out(store: ModelStore, *, conditioning: TextRef):
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


_LINKED = {
    "model": ModelRef,
    "clip": ModelRef,
    "vae": str,
    "positive": TextRef,
    "negative": TextRef,
    "conditioning": TextRef,
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

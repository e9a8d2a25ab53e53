"""What the embedded node classes do, but for sampling. Every link carries a value of its type.

What nodes mean is what ComfyUI does, with these differences: pixels are the latents, so `VAEDecode`
only clamps to [-1, 1] and `VAEEncode` cuts to whole patches; latents are rounded to whole patches;
one picture per workflow, the first of its first output.

Values: MODEL a `guidance.Model`, CLIP a `models.Weights`, CONDITIONING `conditioning.Texts`, LATENT
and IMAGE a tensor `[C, H, W]`, UPSCALE_MODEL an `Upscaler`, VAE a name without meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowloom.render import conditioning as text_ops
from flowloom.render import images as pixel_ops
from flowloom.render import sizes
from flowloom.render.conditioning import Texts
from flowloom.render.guidance import Model
from flowloom.render.models import ModelStore, Weights
from flowloom.shapes.upscaler import Upscaler, flops_per_picture

CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A text that waits to be encoded in one batch with others."""

    encoder: Weights
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Costly:
    """Outputs that took network calls."""

    outputs: tuple[Any, ...]
    flops: int
    """Multiply-adds times two."""


def checkpoint_loader(store: ModelStore, *, ckpt_name: str):
    """A transformer, its text encoder, and pixels for latents."""
    store.checkpoint(ckpt_name)
    return Model(Weights.of(ckpt_name)), Weights.of(ckpt_name), "pixels"


def lora_loader(
    store: ModelStore,
    *,
    model: Model,
    clip: Weights,
    lora_name: str,
    strength_model: float,
    strength_clip: float,
):
    """A LoRA on top of those that are there, on both parts."""
    (patched,) = lora_loader_model_only(
        store, model=model, lora_name=lora_name, strength_model=strength_model
    )
    # Encodings are told apart by what acts on the text encoder alone.
    touched = strength_clip if store.touches_text(lora_name) else 0.0
    return patched, clip.patched(lora_name, touched)


def lora_loader_model_only(
    store: ModelStore, *, model: Model, lora_name: str, strength_model: float
):
    """A LoRA on the transformer alone."""
    store.lora(lora_name)
    return (dataclasses.replace(model, weights=model.weights.patched(lora_name, strength_model)),)


def model_merge(store: ModelStore, *, model1: Model, model2: Model, ratio: float):
    """The first model times `ratio` plus the second times 1 - `ratio`; the first one's options."""
    return (dataclasses.replace(model1, weights=model1.weights.merged(model2.weights, ratio)),)


def model_sampling(store: ModelStore, *, model: Model, shift: float):
    """Another time shift; the last one counts."""
    if shift <= 0:
        raise ValueError(f"shift: got {shift:g}, expected a number > 0: at 0 there are no times")
    return (dataclasses.replace(model, shift=shift),)


def rescale_cfg(store: ModelStore, *, model: Model, multiplier: float):
    """Guidance that keeps the deviation; the last one counts."""
    return (dataclasses.replace(model, rescale=multiplier),)


def text_encode(store: ModelStore, *, text: str, clip: Weights):
    """Waits for its batch."""
    return Encoding(clip, text)


def zero_out(store: ModelStore, *, conditioning: Texts):
    """See `conditioning.zero_out`."""
    return (text_ops.zero_out(conditioning),)


def combine(store: ModelStore, *, conditioning_1: Texts, conditioning_2: Texts):
    """See `conditioning.combine`."""
    return (text_ops.combine(conditioning_1, conditioning_2),)


def concat(store: ModelStore, *, conditioning_to: Texts, conditioning_from: Texts):
    """See `conditioning.concat`."""
    return (text_ops.concat(conditioning_to, conditioning_from),)


def average(
    store: ModelStore,
    *,
    conditioning_to: Texts,
    conditioning_from: Texts,
    conditioning_to_strength: float,
):
    """See `conditioning.average`."""
    return (text_ops.average(conditioning_to, conditioning_from, conditioning_to_strength),)


def set_range(store: ModelStore, *, conditioning: Texts, start: float, end: float):
    """See `conditioning.set_range`."""
    return (text_ops.set_range(conditioning, start, end),)


def empty_latent(store: ModelStore, *, width: int, height: int, batch_size: int = 1):
    """Nothing, in whole patches."""
    if batch_size != 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1")
    height, width = sizes.whole_patches(height), sizes.whole_patches(width)
    sizes.check_pixels(store.catalogue, height, width)
    return (torch.zeros(CHANNELS, height, width),)


def latent_upscale(
    store: ModelStore, *, samples: Tensor, upscale_method: str, width: int, height: int, crop: str
):
    """Resample a latent to given sides."""
    sides = sizes.wanted((samples.shape[1], samples.shape[2]), height, width)
    height, width = (sizes.whole_patches(side) for side in sides)
    sizes.check_pixels(store.catalogue, height, width)
    return (sizes.resized(samples, height, width, upscale_method, crop),)


def latent_upscale_by(store: ModelStore, *, samples: Tensor, upscale_method: str, scale_by: float):
    """Resample a latent by a factor."""
    height, width = sizes.scaled((samples.shape[1], samples.shape[2]), scale_by)
    sizes.check_pixels(store.catalogue, height, width)
    return (sizes.resized(samples, height, width, upscale_method),)


def decode(store: ModelStore, *, samples: Tensor, vae: str):
    """A latent as a picture."""
    return (samples.clamp(-1, 1),)


def encode(store: ModelStore, *, pixels: Tensor, vae: str):
    """A picture as a latent."""
    return (sizes.cut_to_patches(pixels),)


def upscale_model_loader(store: ModelStore, *, model_name: str):
    """A learned upscaler."""
    return (store.upscaler(model_name),)


def image_upscale(store: ModelStore, *, upscale_model: Upscaler, image: Tensor):
    """Run a learned upscaler."""
    height, width = image.shape[1:]
    sizes.check_pixels(store.catalogue, height * upscale_model.scale, width * upscale_model.scale)
    picture = upscale_model(image[None])[0].clamp(-1, 1)
    return Costly((picture,), flops_per_picture(upscale_model, height, width))


def image_scale(
    store: ModelStore, *, image: Tensor, upscale_method: str, width: int, height: int, crop: str
):
    """Resample a picture to given sides."""
    height, width = sizes.wanted((image.shape[1], image.shape[2]), height, width)
    sizes.check_pixels(store.catalogue, height, width)
    # Bicubic and lanczos overshoot.
    return (sizes.resized(image, height, width, upscale_method, crop).clamp(-1, 1),)


def image_scale_by(store: ModelStore, *, image: Tensor, upscale_method: str, scale_by: float):
    """Resample a picture by a factor."""
    height, width = (max(round(side * scale_by), 1) for side in image.shape[1:])
    sizes.check_pixels(store.catalogue, height, width)
    return (sizes.resized(image, height, width, upscale_method).clamp(-1, 1),)


def image_sharpen(
    store: ModelStore, *, image: Tensor, sharpen_radius: int, sigma: float, alpha: float
):
    """See `images.sharpen`."""
    return (pixel_ops.sharpen(image[None], sharpen_radius, sigma, alpha)[0],)


def image_blur(store: ModelStore, *, image: Tensor, blur_radius: int, sigma: float):
    """See `images.blur`."""
    return (pixel_ops.blur(image[None], blur_radius, sigma)[0],)


def image_blend(
    store: ModelStore, *, image1: Tensor, image2: Tensor, blend_factor: float, blend_mode: str
):
    """See `images.blend`; the second picture takes the sides of the first."""
    if image2.shape != image1.shape:
        height, width = image1.shape[1:]
        image2 = sizes.resized(image2, height, width, "bicubic", "center")
    return (pixel_ops.blend(image1, image2, blend_factor, blend_mode),)


def save_image(store: ModelStore, *, images: Tensor, filename_prefix: str = ""):
    """The workflow's picture; whoever asked for it names the file."""
    return (images,)


def preview_image(store: ModelStore, *, images: Tensor):
    """The workflow's picture."""
    return (images,)


NODES: dict[str, Callable[..., Any]] = {
    "CheckpointLoaderSimple": checkpoint_loader,
    "LoraLoader": lora_loader,
    "LoraLoaderModelOnly": lora_loader_model_only,
    "UpscaleModelLoader": upscale_model_loader,
    "ModelMergeSimple": model_merge,
    "ModelSamplingSD3": model_sampling,
    "ModelSamplingAuraFlow": model_sampling,
    "RescaleCFG": rescale_cfg,
    "CLIPTextEncode": text_encode,
    "ConditioningZeroOut": zero_out,
    "ConditioningCombine": combine,
    "ConditioningConcat": concat,
    "ConditioningAverage": average,
    "ConditioningSetTimestepRange": set_range,
    "EmptyLatentImage": empty_latent,
    "LatentUpscale": latent_upscale,
    "LatentUpscaleBy": latent_upscale_by,
    "VAEDecode": decode,
    "VAEEncode": encode,
    "ImageUpscaleWithModel": image_upscale,
    "ImageScale": image_scale,
    "ImageScaleBy": image_scale_by,
    "ImageSharpen": image_sharpen,
    "ImageBlur": image_blur,
    "ImageBlend": image_blend,
    "PreviewImage": preview_image,
    "SaveImage": save_image,
}

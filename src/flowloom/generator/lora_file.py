"""A tuned adapter as a file, in the two forms that its users read, and back again.

`shapes`, for the embedded renderer:

    <module path>.lora_A.weight [R, in], <module path>.lora_B.weight [out, R], <module path>.alpha

`diffusers`, as diffusers writes and reads the LoRA of an SD3 transformer and as ComfyUI loads it:

    transformer.<module path>.lora_A.weight, transformer.<module path>.lora_B.weight

There alpha / rank is folded into B: diffusers refuses keys without `lora` in their names, and both
take a scale of 1 where no alpha is given.

Shapes: R = rank.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowloom.generator.adapters import Adapter, check_tensors

Form = Literal["shapes", "diffusers"]
PREFIX = "transformer."
MAX_ERROR = 2e-3
"""Largest change of a layer's B A by rounding, in Frobenius norms, as a share of the most
tuned layer's B A; float16 of plain values changes it by 3e-4."""
# safetensors writes several entries in a random order; one keeps equal content equal bytes.
_METADATA = {"format": "pt"}

# What ComfyUI maps to its own SD3 modules, by diffusers' names. It leaves out other keys and only
# logs them. Times and texts enter once (outer), the rest is repeated in every block.
_OUTER = (
    r"context_embedder|proj_out|norm_out\.linear"
    r"|time_text_embed\.(timestep|text)_embedder\.linear_[12]"
)
_INNER = (
    r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|attn2\.(to_[qkv]|to_out\.0)"
    r"|(ff|ff_context)\.net\.(0\.proj|2)|(norm1|norm1_context)\.linear"
)
_COMFYUI_SD3 = re.compile(rf"{_OUTER}|transformer_blocks\.\d+\.({_INNER})")


def write_lora(
    path: Path, adapter: Adapter, form: Form, dtype: torch.dtype = torch.float16
) -> None:
    """Write an adapter, then read the file back and compare.

    Args:
        path: File to write; a reader sees the old one or the whole new one.
        adapter: What was tuned.
        form: Who is to read it.
        dtype: Of A and B in the file.

    Raises:
        ValueError: ComfyUI has no place for one of the layers, or the type cannot hold its numbers.
    """
    if form == "diffusers":
        check_sd3_paths(adapter)
    tensors = _to_file(adapter, form, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial), metadata=_METADATA)
    try:
        _verify(partial, path, adapter, form)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_lora(path: Path, adapter: Adapter, form: Form) -> None:
    """Put a file's tensors into an adapter of the same model, layers and rank.

    The adapter's own alpha stays: B is rescaled where the file's differs.

    Raises:
        ValueError: The file is damaged, a key is missing or unexpected, or a shape does not fit.
    """
    adapter.load_state_dict(_from_file(path, path, adapter, form))


def check_sd3_paths(adapter: Adapter) -> None:
    """Whether ComfyUI loads a LoRA of each layer into an SD3 model.

    Raises:
        ValueError: It would leave some out.
    """
    lost = [layer for layer in adapter.layers if not _COMFYUI_SD3.fullmatch(layer)]
    if lost:
        raise ValueError(
            f"LoRA: got {len(lost)} of {len(adapter.layers)} layers that ComfyUI has no SD3 module "
            f"for ({lost[0]}, ...), expected those of an SD3 transformer of diffusers"
        )


def _to_file(adapter: Adapter, form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    scale = adapter.config.alpha / adapter.config.rank
    tensors = {}
    for key, value in adapter.state_dict().items():
        if form == "diffusers" and key.endswith(".lora_B.weight"):
            value = scale * value
        name = PREFIX + key if form == "diffusers" else key
        # A copy even where the type stays: safetensors refuses views of shared memory.
        tensors[name] = value.to("cpu", dtype, copy=True).contiguous()
    if form == "shapes":
        for layer in adapter.layers:
            tensors[f"{layer}.alpha"] = torch.tensor(float(adapter.config.alpha))
    return tensors


def _from_file(source: Path, path: Path, adapter: Adapter, form: Form) -> dict[str, Tensor]:
    """The file's tensors as `Adapter.state_dict` names and scales them, float32."""
    try:
        found = load_file(str(source))
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: got a damaged file ({said}), expected safetensors") from error
    expected = _to_file(adapter, form, torch.float16)
    check_tensors(str(path), found, {key: tuple(value.shape) for key, value in expected.items()})
    scale = adapter.config.alpha / adapter.config.rank
    tensors = {}
    for key in adapter.state_dict():
        if form == "diffusers":
            tensors[key] = found[PREFIX + key].float()
            factor = 1 / scale
        else:
            tensors[key] = found[key].float()
            alpha = float(found[f"{key.rsplit('.lora_', 1)[0]}.alpha"])
            factor = alpha / adapter.config.alpha
        if key.endswith(".lora_B.weight"):
            tensors[key] *= factor
    return tensors


def _verify(source: Path, path: Path, adapter: Adapter, form: Form) -> None:
    """Compare B A of the file with the adapter's, layer by layer."""
    read, own = _from_file(source, path, adapter, form), adapter.state_dict()
    sizes, errors = {}, {}
    for layer in adapter.layers:
        down, up = (f"{layer}.{part}.weight" for part in ("lora_A", "lora_B"))
        want = own[up].cpu() @ own[down].cpu()
        sizes[layer] = float(want.norm())
        errors[layer] = float((read[up] @ read[down] - want).norm())
    largest = max(sizes.values())
    for layer, error in errors.items():
        # Not "error > bound": that would let NaN pass.
        if not error <= MAX_ERROR * largest:
            raise ValueError(
                f"{path}: {layer}: got an update that differs by {error:.3g} from the tuned one, "
                f"expected at most {MAX_ERROR} of the largest, {largest:.3g}; write float32"
            )

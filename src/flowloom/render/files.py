"""Model files read with suspicion: names that stay in their folder, tensors of known shapes.

Files come from strangers. Each fault is one line: which file, what it holds, what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowloom.shapes import model as shapes_model
from flowloom.shapes import upscaler as shapes_upscaler
from flowloom.shapes.model import ShapesConfig, ShapesModel
from flowloom.shapes.upscaler import UPSCALER_FORMAT, Upscaler

MAX_SIZE = 1024
"""Largest number in the sizes that a file gives of itself; keeps a hostile one from taking all."""
Module = TypeVar("Module", bound=nn.Module)
_LORA_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|alpha)")


def check_name(name: str) -> str:
    """A file name as a workflow or a catalogue gives it, possibly with folders before it.

    Raises:
        ValueError: It could lead out of its folder.
    """
    leaves = name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:", name)
    if not name or leaves or "\\" in name or "\0" in name:
        raise ValueError(
            f"got {name[:80]!r}, expected a name inside its folder: no absolute path, no '..', "
            "no backslash"
        )
    return name


def read_checkpoint(path: Path) -> ShapesModel:
    """A checkpoint of the shapes world: float32, evaluation mode, no gradients.

    Raises:
        ValueError: The file is damaged, or not a checkpoint of this world.
    """
    with _opened(path) as file:
        sizes = _record(file, path, shapes_model.FORMAT).get("config")
        known = {field.name for field in dataclasses.fields(ShapesConfig)}
        if not isinstance(sizes, dict) or not set(sizes) <= known:
            raise ValueError(f"{path}: got config {str(sizes)[:80]}, expected {sorted(known)}")
        _check_sizes(path, sizes)
        config = ShapesConfig(**sizes)
        if config.width % config.num_heads:
            raise ValueError(
                f"{path}: got width {config.width}, expected a multiple of {config.num_heads} heads"
            )
        with torch.device("meta"), _Unfilled():
            expected = ShapesModel(config)
        _check_shapes(path, file, expected)
    return _check_finite(path, shapes_model.load(path))


def read_upscaler(path: Path) -> Upscaler:
    """An upscaler of the shapes world.

    Raises:
        ValueError: The file is damaged, or not an upscaler of this world.
    """
    with _opened(path) as file:
        record = _record(file, path, UPSCALER_FORMAT)
        if set(record) != {"width"}:
            raise ValueError(f"{path}: got {sorted(record)}, expected the width of an upscaler")
        _check_sizes(path, record)
        with torch.device("meta"), _Unfilled():
            expected = Upscaler(record["width"])
        _check_shapes(path, file, expected)
    return _check_finite(path, shapes_upscaler.load(path))


def read_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA's tensors by key, float32; see `flowloom.shapes.model.apply_lora`.

    Raises:
        ValueError: The file is damaged, a factor lacks its partner, or ranks differ.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    if not tensors:
        raise ValueError(f"{path}: got no tensors, expected lora_A.weight and lora_B.weight")
    for key, value in tensors.items():
        found = _LORA_KEY.fullmatch(key)
        if not found:
            raise ValueError(
                f"{path}: got key {key[:80]!r}, expected lora_A.weight, lora_B.weight or alpha"
            )
        down, up = (tensors.get(f"{found[1]}.{part}.weight") for part in ("lora_A", "lora_B"))
        if down is None or up is None:
            raise ValueError(f"{path}: got {key[:80]!r}, expected lora_A and lora_B of it")
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise ValueError(
                f"{path}: got {found[1][:80]!r} of shapes {tuple(up.shape)} and "
                f"{tuple(down.shape)}, expected [out, rank] and [rank, in]"
            )
        if not torch.isfinite(value).all() or (found[2] == "alpha" and value.numel() != 1):
            raise ValueError(f"{path}: got {key[:80]!r} with no finite value, expected numbers")
    return tensors


class _Unfilled(TorchFunctionMode):
    """Modules whose tensors have shapes and no values: initialisers do nothing.

    On the device `meta` they would do nothing either, but load torch's tracing, for seconds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: got a damaged file ({said}), expected safetensors as they were published"
        ) from error


def _record(file: Any, path: Path, entry: str) -> dict[str, Any]:
    """The JSON object in one entry of the metadata."""
    info = file.metadata() or {}
    if entry not in info:
        raise ValueError(f"{path}: got metadata {sorted(info)[:5]}, expected an entry {entry!r}")
    try:
        record = json.loads(info[entry])
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: metadata {entry!r}: got no JSON object, expected one")
    return record


def _check_sizes(path: Path, sizes: Mapping[str, Any]) -> None:
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise ValueError(
                f"{path}: {name}: got {str(value)[:40]}, expected an integer from 1 to {MAX_SIZE}"
            )


def _check_shapes(path: Path, file: Any, expected: nn.Module) -> None:
    """Names and shapes, read from the header alone, against a module's."""
    found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wanted = {key: tuple(value.shape) for key, value in expected.state_dict().items()}
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            got, want = found.get(key, "no such tensor"), wanted.get(key, "no such tensor")
            raise ValueError(f"{path}: tensor {key[:80]!r}: got {got}, expected {want}")


def _check_finite(path: Path, module: Module) -> Module:
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: tensor {name!r}: got values that are not finite")
    return module

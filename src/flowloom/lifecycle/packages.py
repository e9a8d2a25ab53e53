"""The packages whose versions may change the bytes of an artifact."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

PYTHON = "python"
DECISIVE = (
    "diffusers", "numpy", "peft", "pillow", "pyarrow", "safetensors", "scipy", "torch",
    "transformers",
)  # fmt: skip


def installed(name: str) -> str:
    """Version of a package, or of `python`; `none` where there is no such package."""
    if name == PYTHON:
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of all of them, as a run is recorded with."""
    return {name: installed(name) for name in (PYTHON, *DECISIVE)}

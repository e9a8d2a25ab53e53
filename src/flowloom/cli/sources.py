"""Workflows from paths: files, folders, .jsonl rows and PNG pictures."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowloom.workflow import Workflow

WRAPPERS = ("prompt", "graph", "workflow")
"""Keys under which a row holds its graph."""
_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".png")


@dataclasses.dataclass(frozen=True)
class Source:
    """One workflow that was asked about, or why it cannot be read."""

    path: str
    """Where it lies; a row of a .jsonl is `FILE:LINE`, counted from 1."""
    api: Any = None
    """What should be API JSON, as it was read."""
    error: str | None = None
    """Why there is nothing."""

    def workflow(self) -> Workflow:
        """The workflow.

        Raises:
            ValueError: If what was read has not the shape of one.
        """
        if self.error is not None:
            raise ValueError(self.error)
        return Workflow.from_api(self.api)


def read_sources(paths: Sequence[str]) -> list[Source]:
    """Read every workflow under `paths`, in order; folders are read in name order, at any depth.

    Raises:
        ValueError: If a path does not exist, or a folder holds no workflow.
    """
    sources: list[Source] = []
    for text in paths:
        path = Path(text)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.name.endswith(_SUFFIXES) and f.is_file())
            if not files:
                raise ValueError(f"{path}: got a folder without {', '.join(_SUFFIXES)} files")
            for file in files:
                sources += _read_file(file)
        elif path.is_file():
            sources += _read_file(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return sources


def _read_file(path: Path) -> Iterator[Source]:
    try:
        if path.name.endswith(".png"):
            yield Source(str(path), _png(path))
            return
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode()
    except (OSError, EOFError, ValueError) as error:
        yield Source(str(path), error=_cause(error))
        return
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _parse(f"{path}:{number}", line)
    else:
        yield _parse(str(path), text)


def _parse(where: str, text: str) -> Source:
    try:
        return Source(where, graph(json.loads(text)))
    except ValueError as error:  # bad JSON is one
        return Source(where, error=_cause(error))


def graph(value: Any) -> Any:
    """What a parsed row or file holds as its graph: itself, or the value under a key of `WRAPPERS`.

    Raises:
        ValueError: If it is in UI format.
    """
    if not isinstance(value, Mapping):
        return value
    if isinstance(value.get("nodes"), list):
        raise ValueError(
            "got a workflow in UI format, which is not supported yet; expected API format "
            "(in ComfyUI: Workflow > Export (API))"
        )
    for key in WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, str) and inner.lstrip().startswith("{"):
            inner = json.loads(inner)
        # A node may have the id "graph"; then it names its class.
        if isinstance(inner, Mapping) and "class_type" not in inner:
            return graph(inner)
    return value


def _png(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        chunks = getattr(picture, "text", {})
    if "prompt" in chunks:
        return graph(json.loads(chunks["prompt"]))
    if "workflow" in chunks:
        return graph(json.loads(chunks["workflow"]))
    raise ValueError("got a PNG without a workflow, expected a text chunk 'prompt'")


def _cause(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    return " ".join(str(error).split())

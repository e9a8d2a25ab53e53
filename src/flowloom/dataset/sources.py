"""Workflows from paths: files, folders, .jsonl rows and PNG pictures, read one by one."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, Any

from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.canvas import Converted, from_ui, is_ui

API, UI = "api", "ui"
WRAPPERS = ("prompt", "graph", "workflow")
"""Keys under which a row, and chunks in which a PNG, holds its graph."""
_ROWS = (".jsonl", ".jsonl.gz")
_SUFFIXES = (".json", ".json.gz", *_ROWS, ".png")
# Broken JSON and broken UTF-8 are ValueErrors; JSON may be nested deeper than Python reads.
_BROKEN = (ValueError, OSError, EOFError, zlib.error, RecursionError)


@dataclasses.dataclass(frozen=True)
class Source:
    """One workflow that was asked about, or why it cannot be read."""

    path: str
    """Where it lies; a row of a .jsonl is `FILE:LINE`, counted from 1."""
    name: PurePath
    """What it is called below the path that was given, without suffix; a row is `NAME-LINE`."""
    value: Any = None
    """What was read: API JSON, or the editor's format."""
    error: str | None = None
    """Why there is nothing."""

    def read(self, catalogue: Catalogue) -> Converted:
        """The workflow, converted from the editor's format where it is in that.

        Raises:
            CanvasError: If it cannot be converted.
            ValueError: If there is nothing, or what was read has not the shape of a workflow.
        """
        if self.error is not None:
            raise ValueError(self.error)
        try:
            if is_ui(self.value):
                return from_ui(self.value, catalogue)
            return Converted(Workflow.from_api(self.value), titles=_titles(self.value))
        except RecursionError:
            raise ValueError("got a workflow nested too deeply to be read") from None

    def workflow(self, catalogue: Catalogue) -> Workflow:
        """The workflow alone; see `read`."""
        return self.read(catalogue).workflow


@dataclasses.dataclass(frozen=True)
class _Found:
    path: Path
    name: PurePath
    error: str | None = None


class Inputs:
    """The workflows under paths, in order; folders are read in name order, at any depth.

    A .jsonl is never held in memory. What cannot be read is a `Source` with an error.
    """

    def __init__(self, paths: Sequence[str], prefer: str = API) -> None:
        """Find the files.

        Args:
            paths: Files and folders.
            prefer: The format that is taken where a PNG or a row holds both.
        """
        self._keys = WRAPPERS if prefer == API else ("workflow", *WRAPPERS)
        self._found = [found for path in paths for found in _find(Path(path))]
        self.files = [found.path for found in self._found if found.error is None]
        """Every file that will be read."""
        self.size = sum(path.stat().st_size for path in self.files)
        """Bytes of all files."""
        self._file: IO[bytes] | None = None
        self._done = 0

    def position(self) -> int:
        """How many of the bytes have been read."""
        return self._done + (0 if self._file is None else _told(self._file))

    def __iter__(self) -> Iterator[Source]:
        """Read on."""
        for found in self._found:
            if found.error is not None:
                yield Source(str(found.path), found.name, error=found.error)
                continue
            try:
                with found.path.open("rb") as self._file:
                    yield from self._read(found, self._file)
                    self._done += _told(self._file)
            except _BROKEN as error:
                yield Source(str(found.path), found.name, error=_cause(error))
            self._file = None

    def _read(self, found: _Found, file: IO[bytes]) -> Iterator[Source]:
        suffixes = found.path.name.lower()
        if suffixes.endswith(".png"):
            yield Source(str(found.path), found.name, self._picture(file.read()))
            return
        plain = gzip.GzipFile(fileobj=file) if suffixes.endswith(".gz") else file
        if suffixes.endswith(_ROWS):
            yield from self._rows(found, plain)
        else:
            yield Source(str(found.path), found.name, self._graph(_parse(plain.read())))

    def _rows(self, found: _Found, lines: Any) -> Iterator[Source]:
        empty = True
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            path = f"{found.path}:{number}"
            name = found.name.with_name(f"{found.name.name}-{number}")
            try:
                source = Source(path, name, self._graph(_parse(line)))
            except _BROKEN as error:
                source = Source(path, name, error=_cause(error))
            yield source
        if empty:
            raise ValueError("got no rows, expected one workflow per line")

    def _picture(self, data: bytes) -> Any:
        from flowloom.workflow.png import read_chunks

        chunks = read_chunks(data)
        key = next((key for key in self._keys if key in chunks), None)
        if key is None:
            raise ValueError(
                "got a PNG without a workflow, expected a text chunk 'prompt' or 'workflow'"
            )
        try:
            return self._graph(json.loads(chunks[key]))
        except _BROKEN as error:
            raise ValueError(f"chunk {key!r}: {_cause(error)}") from error

    def _graph(self, value: Any) -> Any:
        """What parsed JSON holds as its graph: itself, or the value under a key."""
        while isinstance(value, Mapping) and not is_ui(value):
            inner = next(filter(_holds_graph, map(_opened, map(value.get, self._keys))), None)
            if inner is None:
                break
            value = inner
        return value


def _find(path: Path) -> Iterator[_Found]:
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.name.lower().endswith(_SUFFIXES) and f.is_file()]
        for file in sorted(files):
            yield _Found(file, _stem(file.relative_to(path)))
        if not files:
            expected = ", ".join(_SUFFIXES)
            yield _Found(path, PurePath(path.name), f"got a folder without {expected} files")
    elif path.exists():  # or a pipe
        yield _Found(path, _stem(PurePath(path.name)))
    else:
        yield _Found(path, PurePath(path.name), "no such file or folder")


def _told(file: IO[bytes]) -> int:
    return file.tell() if file.seekable() else 0


def _stem(path: PurePath) -> PurePath:
    suffix = next((s for s in _SUFFIXES if path.name.lower().endswith(s)), path.suffix)
    return path.with_name(path.name[: len(path.name) - len(suffix)] or path.name)


def _parse(data: bytes) -> Any:
    return json.loads(data.decode("utf-8-sig"))


def _opened(value: Any) -> Any:
    """A graph may be written as a text; other texts stay as they are."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _holds_graph(value: Any) -> bool:
    # A node may have the id "graph"; then it names its class.
    return isinstance(value, Mapping) and "class_type" not in value


def _titles(api: Any) -> dict[str, str]:
    metas = {node_id: node.get("_meta") for node_id, node in api.items()}
    titles = {k: meta.get("title") for k, meta in metas.items() if isinstance(meta, Mapping)}
    return {node_id: title for node_id, title in titles.items() if isinstance(title, str)}


def _cause(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deeply to be read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__

"""Pointers: what names a published artifact, with the fields of an output in a `.dvc` file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowloom.lifecycle import remotes
from flowloom.lifecycle.objects import FOLDER, is_digest

TAG = "flowloom.artifact"
"""Tag of an MLflow run that holds its artifact's pointer."""


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Names a published folder, with the fields of an output in a `.dvc` file."""

    md5: str
    """Digest of the folder, as DVC writes it (`<md5>.dir`)."""
    size: int
    """Bytes of all its files."""
    nfiles: int
    """Number of its files."""
    remote: str = remotes.STORE
    """Name of the DVC remote that has it."""

    def __post_init__(self) -> None:
        """Raises `ValueError` where a field is not what DVC writes."""
        if not is_digest(self.md5, FOLDER):
            raise ValueError(
                f"pointer: md5: got {self.md5!r}, expected a folder's: 32 hexadecimal digits.dir"
            )
        for name in ("size", "nfiles"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"pointer: {name}: got {value!r}, expected an integer >= 0")
        if not isinstance(self.remote, str) or not re.fullmatch(r"[\w.-]+", self.remote):
            raise ValueError(f"pointer: remote: got {self.remote!r}, expected a remote's name")


def read_pointer(source: str | Path | Mapping[str, Any], remote: str | None = None) -> Pointer:
    """A pointer from wherever one is written.

    Args:
        source: A `.dvc` file, a JSON file such as a run's `pointer.json`, JSON text, or a
            mapping: the pointer's fields, or the tags of an MLflow run.
        remote: Name of the remote to use instead of the pointer's own.

    Raises:
        ValueError: It is none, or names no remote.
    """
    near = None
    if isinstance(source, Mapping):
        fields, where = source, "pointer"
    elif isinstance(source, str) and source.lstrip().startswith("{"):
        fields, where = _json(source, "pointer"), "pointer"
    else:
        path, where = Path(source), str(source)
        near = path.absolute().parent
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(
                f"pointer: got {where!r}, expected a .dvc file, a JSON file or JSON text"
            ) from None
        except UnicodeDecodeError:
            raise ValueError(f"{where}: got no text, expected a .dvc or JSON file") from None
        fields = _dvc_fields(text, where) if path.suffix == ".dvc" else _json(text, where)
    if TAG in fields:
        fields = _json(fields[TAG], f"{where}: {TAG}")
    for name in ("md5", "size", "nfiles"):
        if name not in fields:
            raise ValueError(f"{where}: got no field {name!r}, expected a folder's pointer")
    name = remote or fields.get("remote") or (remotes.default_name(near) if near else None)
    if name is None:
        raise ValueError(f"{where}: got no field 'remote', expected it there or as an argument")
    return Pointer(fields["md5"], fields["size"], fields["nfiles"], name)


def dvc_file(pointer: Pointer, path: str) -> str:
    """Text of a `.dvc` file with which `dvc pull` writes the artifact as `path`."""
    return (
        "outs:\n"
        f"- md5: {pointer.md5}\n"
        f"  size: {pointer.size}\n"
        f"  nfiles: {pointer.nfiles}\n"
        "  hash: md5\n"
        f"  path: {json.dumps(path)}\n"
        f"  remote: {pointer.remote}\n"
    )


def _json(text: object, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object with md5, size, nfiles and remote")
    return value


def _dvc_fields(text: str, where: str) -> dict[str, Any]:
    """The fields of the one output of a `.dvc` file."""
    import yaml

    try:
        outs = yaml.safe_load(text)["outs"]
        (fields,) = outs
        hashed = fields.get("hash")
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"{where}: expected a .dvc file with one output") from None
    if hashed != "md5":
        raise ValueError(f"{where}: hash: got {hashed!r}, expected 'md5', as DVC 3 writes")
    return fields

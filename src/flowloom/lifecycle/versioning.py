"""Publish artifacts to the DVC remote `store`, and fetch them back by pointer.

The store holds what DVC's own remotes hold: `files/md5/ab/cdef...` for a file, and a manifest
(`.dir`) for a folder. So plain `dvc pull` gets an artifact from the text `dvc_file` gives. DVC
itself takes seconds to import; a stage publishes in milliseconds without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

from flowloom.runs import file_md5, folder_entries, home, write_json

REMOTE = "store"
"""Name of the DVC remote that the store is."""


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Names a published folder, with the fields of an output in a `.dvc` file."""

    md5: str
    """Digest of the folder, as DVC writes it (`<md5>.dir`)."""
    size: int
    """Bytes of all its files."""
    nfiles: int
    """Number of its files."""
    remote: str = REMOTE
    """Name of the DVC remote that has it."""


def store_dir() -> Path:
    """The store's folder: `FLOWLOOM_STORE`, else `store` in the home folder.

    Raises:
        ValueError: If `FLOWLOOM_STORE` is a URL.
    """
    given = os.environ.get("FLOWLOOM_STORE")
    if given and "://" in given:
        raise ValueError(f"FLOWLOOM_STORE: got {given!r}, expected a folder (URLs come later)")
    return Path(given).absolute() if given else home() / "store"


def publish(folder: Path) -> Pointer:
    """Copy `folder` into the store; what the store already has is not copied again.

    A run's artifact (`<run>/out`) gets its pointer written beside it as `<run>/pointer.json`.
    """
    root = store_dir()
    entries = folder_entries(folder)
    size = 0
    for entry in entries:
        source = folder / entry["relpath"]
        size += source.stat().st_size
        target = _object_path(root, entry["md5"])
        if not target.is_file():
            partial = _partial(target)
            shutil.copyfile(source, partial)
            os.replace(partial, target)
    # The manifest comes last: where it is, everything it names is.
    manifest = json.dumps(entries, sort_keys=True).encode()
    digest = hashlib.md5(manifest, usedforsecurity=False).hexdigest() + ".dir"
    target = _object_path(root, digest)
    if not target.is_file():
        partial = _partial(target)
        partial.write_bytes(manifest)
        os.replace(partial, target)
    pointer = Pointer(md5=digest, size=size, nfiles=len(entries))
    if folder.name == "out":
        write_json(folder.parent / "pointer.json", dataclasses.asdict(pointer))
    return pointer


def fetch(pointer: Pointer, into: Path) -> Path:
    """Bring a published folder back as `into`; it appears whole or not at all.

    Raises:
        ValueError: If `into` exists, or the store lacks an object or holds a damaged one.
    """
    if into.exists():
        raise ValueError(f"fetch: got {str(into)!r}, expected a path where nothing is yet")
    root = store_dir()
    entries = json.loads(_stored(root, pointer.md5).read_bytes())
    partial = into.with_name(f"{into.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for entry in entries:
        target = partial / entry["relpath"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_stored(root, entry["md5"]), target)
    os.replace(partial, into)
    return into


def dvc_file(pointer: Pointer, path: str) -> str:
    """Text of a `.dvc` file with which `dvc pull` writes the artifact as `path`."""
    return (
        "outs:\n"
        f"- md5: {pointer.md5}\n"
        f"  size: {pointer.size}\n"
        f"  nfiles: {pointer.nfiles}\n"
        "  hash: md5\n"
        f"  path: {path}\n"
        f"  remote: {pointer.remote}\n"
    )


def _object_path(root: Path, digest: str) -> Path:
    return root / "files" / "md5" / digest[:2] / digest[2:]


def _partial(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}.{os.getpid()}.partial")


def _stored(root: Path, digest: str) -> Path:
    path = _object_path(root, digest)
    if not path.is_file():
        raise ValueError(f"store {str(root)!r}: got no object {digest}, expected it published")
    found = file_md5(path)
    if found != digest.removesuffix(".dir"):
        raise ValueError(f"store {str(root)!r}: object {digest} has digest {found}: damaged")
    return path

"""What a DVC 3 remote holds: objects named by their MD5, and a manifest (`.dir`) for a folder.

`files/md5/ab/cdef...` is a file's bytes; a manifest is JSON, `[{"md5", "relpath"}]` in the order of
`relpath`, byte for byte what DVC writes, named by its own MD5 and `.dir`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from flowloom.runs import folder_entries

FOLDER = ".dir"
"""Ends the digest of a folder."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_UNSAFE = re.compile(r"[\x00-\x1f\\]")


def md5_of(data: bytes) -> str:
    """MD5 of bytes, in hexadecimal."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def is_digest(text: object, ending: str = "") -> bool:
    """Whether `text` is an MD5 in hexadecimal followed by `ending`."""
    return (
        isinstance(text, str)
        and text.endswith(ending)
        and bool(_MD5.fullmatch(text.removesuffix(ending)))
    )


def object_key(digest: str) -> str:
    """Where a DVC 3 remote keeps an object, below the remote's own place."""
    return f"files/md5/{digest[:2]}/{digest[2:]}"


def manifest_of(entries: list[dict[str, str]]) -> tuple[str, bytes]:
    """The digest and the bytes of the manifest of a folder's entries."""
    data = json.dumps(entries, sort_keys=True).encode()
    return md5_of(data) + FOLDER, data


def parse_manifest(data: bytes, digest: str) -> dict[str, str]:
    """Digest by relative path, of a manifest's bytes.

    Raises:
        ValueError: The bytes are not those of `digest`, or name a path that would lead out of the
            folder or cannot be made.
    """
    if md5_of(data) != digest.removesuffix(FOLDER):
        raise ValueError(
            f"manifest {digest}: got {len(data)} bytes of digest {md5_of(data)}: damaged"
        )
    try:
        rows = json.loads(data)
        found = [(row["relpath"], row["md5"]) for row in rows]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"manifest {digest}: got no list of md5 and relpath, expected a DVC 3 manifest"
        ) from None
    entries: dict[str, str] = {}
    for relpath, md5 in found:
        problem = name_problem(relpath)
        if problem is None and not is_digest(md5):
            problem = f"got md5 {md5!r}, expected 32 hexadecimal digits"
        if problem is None and relpath in entries:
            problem = "is there twice"
        if problem:
            raise ValueError(f"manifest {digest}: {relpath!r}: {problem}")
        entries[relpath] = md5
    for relpath in entries:
        parent = next((p.as_posix() for p in Path(relpath).parents if p.as_posix() in entries), "")
        if parent:
            raise ValueError(f"manifest {digest}: {relpath!r}: {parent!r} is a file")
    return entries


def name_problem(relpath: object) -> str | None:
    """Why no file of an artifact may be called so, or `None` where it may."""
    if not isinstance(relpath, str) or not relpath:
        return "expected a relative path"
    if _UNSAFE.search(relpath):
        return "has a backslash or a control character"
    try:
        relpath.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if any(part in ("", ".", "..") for part in relpath.split("/")):
        return "leads out of the folder, expected a plain relative path"
    return None


def read_folder(folder: Path) -> tuple[list[dict[str, str]], int]:
    """The entries of a folder's manifest, and the bytes of all its files.

    Raises:
        ValueError: There is no such folder, it has no file, or holds what a store cannot: links,
            devices, or names that are not portable.
    """
    if not folder.is_dir():
        raise ValueError(f"got {str(folder)!r}, expected a folder")
    size, number = 0, 0
    for path in _walk(folder):
        relpath = path.relative_to(folder).as_posix()
        found = path.lstat()
        problem = name_problem(relpath)
        if stat.S_ISLNK(found.st_mode):
            problem = "is a symbolic link, expected a copy of what it points to"
        elif not stat.S_ISREG(found.st_mode):
            problem = "is no regular file"
        if problem:
            raise ValueError(f"{folder}: {relpath!r}: {problem}")
        size, number = size + found.st_size, number + 1
    if not number:
        raise ValueError(f"{folder}: got an empty folder, expected at least one file")
    return folder_entries(folder), size


def by_digest(entries: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Relative paths by digest, of (relative path, digest): equal files are one object."""
    found: dict[str, list[str]] = {}
    for relpath, md5 in entries:
        found.setdefault(md5, []).append(relpath)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder but plain folders; links are not followed."""
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        if item.is_dir(follow_symlinks=False):
            yield from _walk(Path(item.path))
        else:
            yield Path(item.path)

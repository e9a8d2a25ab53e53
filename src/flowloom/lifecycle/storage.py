"""The objects a remote holds, with their age, and folders that somebody may hold."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from flowloom.lifecycle.objects import FOLDER, is_digest, object_key
from flowloom.lifecycle.remotes import LocalRemote, Remote

_PREFIX = "files/md5/"


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object of a remote."""

    digest: str
    """Its name: the digest of its content; of a manifest it ends in `.dir`."""
    size: int
    """Bytes."""
    modified_s: float
    """When it was written or found by a publisher, in seconds since the epoch."""


def objects(remote: Remote) -> Iterator[Stored]:
    """Every object of a remote.

    Raises:
        ValueError: It cannot be listed.
    """
    if isinstance(remote, LocalRemote):
        root = Path(remote.place) / _PREFIX
        for path in root.glob("??/*"):
            digest = path.parent.name + path.name
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if _is_object(digest):
                    yield Stored(digest, found.st_size, found.st_mtime)
        return
    for key, size, modified in _s3(remote).listed(_PREFIX):
        digest = key.removeprefix(_PREFIX).replace("/", "")
        if _is_object(digest):
            yield Stored(digest, size, modified.timestamp())


def remove(remote: Remote, digest: str, before_s: float) -> bool:
    """Delete an object, unless it was written or found since.

    Args:
        remote: Where.
        digest: Which.
        before_s: The moment, in seconds since the epoch.

    Returns:
        Whether it was deleted.
    """
    if not isinstance(remote, LocalRemote):
        moment = datetime.datetime.fromtimestamp(before_s, datetime.UTC)
        return _s3(remote).remove(digest, moment)
    path = Path(remote.place) / object_key(digest)
    # Out of sight first: a publisher that finds an object touches it, and one that does not writes
    # it. So either it was touched before this rename, and comes back, or is written again after it.
    aside = Path(remote.place) / "partial" / f"{digest}.{secrets.token_hex(4)}.deleted"
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.stat().st_mtime > before_s:
            return False
        os.replace(path, aside)
    except FileNotFoundError:
        return False
    if aside.stat().st_mtime > before_s:
        os.replace(aside, path)
        return False
    aside.unlink()
    return True


def touched_s(folder: Path) -> float:
    """When something in a folder was last written, in seconds since the epoch."""
    latest_s = 0.0
    for path in (folder, *folder.rglob("*")):
        # The lock file is opened by whoever looks whether it is held; others vanish meanwhile.
        if path.name != "lock":
            with contextlib.suppress(FileNotFoundError):
                latest_s = max(latest_s, path.lstat().st_mtime)
    return latest_s


def is_held(folder: Path) -> bool:
    """Whether a process holds a run's, a turn's or a reproduction's folder."""
    with holding(folder) as mine:
        return not mine


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[bool]:
    """Hold a folder if nobody does; says whether it is held. A folder without a lock is free."""
    path = folder / "lock"
    if not path.is_file():
        yield True
        return
    with path.open("rb") as file:  # for writing it would look as if just used
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _is_object(digest: str) -> bool:
    return is_digest(digest) or is_digest(digest, FOLDER)


def _s3(remote: Remote):
    from flowloom.lifecycle.s3 import S3Remote

    if not isinstance(remote, S3Remote):
        raise ValueError(f"remote {remote.name!r}: got {remote.place!r}, expected a folder or S3")
    return remote

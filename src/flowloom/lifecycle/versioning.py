"""Publish artifacts to a DVC remote, fetch them back by pointer, and say what differs.

The remote holds what DVC's own hold, so plain `dvc pull` gets an artifact from the text that
`pointer.dvc_file` gives, and `fetch` gets what `dvc push` wrote. No git checkout is needed and DVC,
which takes seconds to import, is not either: a stage publishes in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from flowloom.lifecycle import remotes
from flowloom.lifecycle.objects import (
    FOLDER,
    by_digest,
    manifest_of,
    md5_of,
    parse_manifest,
    read_folder,
)
from flowloom.lifecycle.pointer import Pointer
from flowloom.lifecycle.remotes import Remote, UnreachableError
from flowloom.runs import file_md5, folder_entries, write_json

ItemT = TypeVar("ItemT")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A file that is not as an artifact's manifest has it."""

    relpath: str
    """Which, within the artifact."""
    expected: str | None
    """Its digest in the manifest; `None` if it is not part of the artifact."""
    got: str | None
    """Its digest as found; `None` if it is missing."""

    def __str__(self) -> str:
        """For a person."""
        if self.got is None:
            return f"{self.relpath}: missing, expected digest {self.expected}"
        if self.expected is None:
            return f"{self.relpath}: not part of it, digest {self.got}"
        return f"{self.relpath}: got digest {self.got}, expected {self.expected}"


def publish(folder: Path, remote: str = remotes.STORE) -> Pointer:
    """Copy `folder` into a remote; what is there already is not copied again.

    Killed at any moment, it leaves whole objects, and partial ones that the next call removes or
    goes on with. A run's artifact (`<run>/out`) gets its pointer beside it as `pointer.json`.

    Raises:
        ValueError: Nothing can be published from `folder` (missing, empty, links in it, changed
            meanwhile), or the remote is unknown, read-only, refuses or does not answer.
    """
    if remote == remotes.SEED:
        raise ValueError(f"remote {remote!r}: is read-only, expected another to publish to")
    entries, size = read_folder(folder)
    there = remotes.find(remote)
    there.sweep()

    def send(item: tuple[str, list[str]]) -> None:
        digest, relpaths = item
        source = folder / relpaths[0]
        if not there.has(digest, source.stat().st_size):
            there.put(digest, source)

    _in_threads(send, by_digest((e["relpath"], e["md5"]) for e in entries).items(), there)
    # The manifest comes last: where it is, everything it names is.
    digest, data = manifest_of(entries)
    if not there.has(digest, len(data)):
        there.put_manifest(digest, data)
    pointer = Pointer(digest, size, len(entries), remote)
    if folder.name == "out":
        write_json(folder.parent / "pointer.json", dataclasses.asdict(pointer))
    return pointer


def fetch(pointer: Pointer, into: Path, near: Path | None = None) -> Path:
    """Bring a published folder back as `into`; it appears whole or not at all.

    Every file's digest is checked. Interrupted, the same call goes on where it stopped.

    Args:
        pointer: What to fetch.
        into: Where to; nothing may be there.
        near: See `remotes.find`.

    Raises:
        ValueError: `into` exists; the remote is unknown, does not answer, or lacks an object or
            holds a damaged one, which is named.
    """
    _expect_nothing(into)
    remote = remotes.find(pointer.remote, near)
    entries = _manifest(remote, pointer)
    with _landing(into, pointer) as landing:
        _expect_nothing(into)  # nor did another process put it there

        def land(item: tuple[str, list[str]]) -> None:
            _land(remote, item[0], item[1], landing)

        (landing / "files").mkdir(exist_ok=True)
        _in_threads(land, by_digest(entries.items()).items(), remote)
        os.replace(landing / "files", into)
    return into


def verify(folder: Path, pointer: Pointer, near: Path | None = None) -> list[Difference]:
    """How a folder differs from what a pointer names; empty if it does not.

    The remote is asked, for the names, only if it does.

    Raises:
        ValueError: There is no such folder, or the manifest cannot be had.
    """
    if not folder.is_dir():
        raise ValueError(f"got {str(folder)!r}, expected a folder")
    entries = folder_entries(folder)
    if manifest_of(entries)[0] == pointer.md5:
        return []
    got = {entry["relpath"]: entry["md5"] for entry in entries}
    return _differences(_manifest(remotes.find(pointer.remote, near), pointer), got)


def verify_remote(pointer: Pointer, near: Path | None = None) -> list[Difference]:
    """Which objects of a published folder its remote lacks or holds damaged; reads them all.

    Raises:
        ValueError: The remote is unknown or does not answer, or the manifest cannot be had.
    """
    remote = remotes.find(pointer.remote, near)
    entries = _manifest(remote, pointer)
    found: dict[str, str | None] = {}

    def look(digest: str) -> None:
        found[digest] = remote.digest_of(digest)

    _in_threads(look, set(entries.values()), remote)
    return _differences(entries, {name: found[digest] for name, digest in entries.items()})


def _manifest(remote: Remote, pointer: Pointer) -> dict[str, str]:
    said = f"remote {remote.name!r} ({remote.place})"
    data = remote.read(pointer.md5)
    if data is not None and md5_of(data) != pointer.md5.removesuffix(FOLDER):
        data = remote.read(pointer.md5)  # it may have been damaged on the way only
    if data is None:
        raise ValueError(f"{said}: got no manifest {pointer.md5}, expected it published there")
    try:
        entries = parse_manifest(data, pointer.md5)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
    if len(entries) != pointer.nfiles:
        raise ValueError(
            f"pointer: nfiles: got {pointer.nfiles}, expected {len(entries)}, as in its manifest"
        )
    return entries


def _differences(expected: Mapping[str, str], got: Mapping[str, str | None]) -> list[Difference]:
    found = (Difference(n, expected.get(n), got.get(n)) for n in sorted({*expected, *got}))
    return [item for item in found if item.expected != item.got]


def _land(remote: Remote, digest: str, relpaths: list[str], landing: Path) -> None:
    """Bring one object as the files that have its content."""
    there: Path | None = None
    for relpath in relpaths:
        target = landing / "files" / relpath
        if target.is_file() and file_md5(target) == digest:  # by an interrupted call
            there = target
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if there is None:
            partial = landing / digest
            _bring(remote, digest, relpath, partial)
            os.replace(partial, target)
        else:
            shutil.copyfile(there, target)
        there = target


def _bring(remote: Remote, digest: str, relpath: str, partial: Path, again: bool = True) -> None:
    said = f"remote {remote.name!r} ({remote.place}): {relpath}"
    if not remote.get(digest, partial):
        raise ValueError(f"{said}: got no object {digest}, expected it published there")
    got = file_md5(partial)
    if got != digest:
        size = partial.stat().st_size
        partial.unlink()
        if again:  # the damage may have come on the way, or be in what an earlier call left
            return _bring(remote, digest, relpath, partial, again=False)
        raise ValueError(
            f"{said}: object {digest}: got {size} bytes of digest {got}, expected {digest}: damaged"
        )


@contextlib.contextmanager
def _landing(into: Path, pointer: Pointer) -> Iterator[Path]:
    """A folder beside `into` for what is on its way; it stays only for a call to go on with it."""
    ending = rf"{re.escape(into.name)}\.[0-9a-f]{{12}}\.partial"
    folder = into.with_name(f"{into.name}.{pointer.md5[:12]}.partial")
    into.parent.mkdir(parents=True, exist_ok=True)
    for other in into.parent.iterdir():
        if other != folder and re.fullmatch(ending, other.name):
            with remotes.held(other / "lock", wait=False) as dead:
                if dead:
                    shutil.rmtree(other, ignore_errors=True)
    with remotes.held(folder / "lock", wait=True):
        try:
            yield folder
        except (UnreachableError, KeyboardInterrupt):
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _in_threads(function: Callable[[ItemT], None], items: Iterable[ItemT], remote: Remote) -> None:
    """Call a function on every item, several at once; the first error ends them all."""
    with ThreadPoolExecutor(remotes.WORKERS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            remote.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _expect_nothing(into: Path) -> None:
    if os.path.lexists(into):
        raise ValueError(f"got {str(into)!r}, expected a path where nothing is yet")

"""Publish artifacts to a DVC remote, fetch them back by pointer, and say what differs.

The remote holds what DVC's own hold, so plain `dvc pull` gets an artifact from the text `dvc_file`
gives, and `fetch` gets what `dvc push` wrote. No git checkout is needed and DVC, which takes
seconds to import, is not either: a stage publishes in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from flowloom.lifecycle import remotes
from flowloom.lifecycle.objects import (
    FOLDER,
    by_digest,
    is_digest,
    manifest_of,
    md5_of,
    parse_manifest,
    read_folder,
)
from flowloom.lifecycle.remotes import Remote, UnreachableError
from flowloom.runs import file_md5, folder_entries, write_json

ItemT = TypeVar("ItemT")

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

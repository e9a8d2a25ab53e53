"""What is still needed of runs, cached models and published artifacts; the rest can be deleted.

Needed is the lineage of every version with an alias, of every earlier champion (a rollback may give
it back its alias), of pinned runs and of the latest turn; and what is unfinished, running, or waits
to be recorded. Objects of a remote are needed if the manifest of a needed artifact names them.

Others may publish meanwhile, so what is younger than an age limit stays, and a publisher that finds
an object makes it young (see `Remote.has`): what is deleted is old, and is looked at once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowloom.lifecycle import journal, lineage, remotes, spool, storage, turns
from flowloom.lifecycle.objects import FOLDER, is_digest, parse_manifest
from flowloom.lifecycle.record import Record, read_folder
from flowloom.lifecycle.records import PINNED, Records, asked, entries_of
from flowloom.lifecycle.versions import NAME, aliases, get_version
from flowloom.runs import data_dir, home

UNFINISHED = "unfinished"
RUN, MODEL, OBJECT, LEFTOVER = "run", "model cache", "object", "reproduction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Something that nothing needs."""

    kind: str
    """`run`, `model cache`, `object` or `reproduction`."""
    name: str
    """Its path, or the object's digest."""
    size: int
    """Bytes."""
    why: str
    """Since when nobody touched it."""
    age_s: float
    """The same in seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What is needed and what is not."""

    items: tuple[Item, ...]
    """What can be deleted."""
    kept: Mapping[str, int]
    """Number of artifacts kept, by reason; each counts once, for the first."""
    young: int
    """Number of things that nothing needs but that are too young to delete."""
    remote: str
    """Name of the remote whose objects were looked at."""
    min_age_s: float
    """The age limit."""

    @property
    def size(self) -> int:
        """Bytes of all that can be deleted."""
        return sum(item.size for item in self.items)

    def summary(self) -> str:
        """In one line."""
        number = Counter(item.kind for item in self.items)
        said = ", ".join(f"{count} of kind {kind}" for kind, count in number.items()) or "nothing"
        young = f" ({self.young} more are younger than {self.min_age_s / 3600:g} h)"
        return f"not needed: {said}{young if self.young else ''}:"

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "items": [dataclasses.asdict(item) for item in self.items],
            "bytes": self.size,
            "kept": dict(self.kept),
            "young": self.young,
            "remote": self.remote,
        }


def pin(records: Records, run_id: str, pinned: bool) -> str:
    """Tag an MLflow run, of a stage or a turn, as one to keep; or take the tag away.

    Raises:
        ValueError: There is no such run.
    """
    if records.client is None:
        raise ValueError(f"run: got {run_id!r}, but nothing at {spool.tracking_uri()}")
    with asked():
        run = records.client.get_run(run_id)
        if pinned:
            records.client.set_tag(run_id, PINNED, "true")
        elif PINNED in run.data.tags:
            records.client.delete_tag(run_id, PINNED)
    return run_id


def look(records: Records, *, remote: str = remotes.STORE, min_age_s: float) -> Findings:
    """What is not needed; deletes nothing.

    Args:
        records: Where runs are looked up.
        remote: Name of the remote whose objects are looked at.
        min_age_s: What is younger stays.

    Raises:
        ValueError: The tracker or the remote does not answer, or the remote is not to be touched.
    """
    store = _store(records, remote)
    reasons = _needed(records)
    needed_objects = _objects(records, reasons, store)
    now_s = time.time()
    found, young = [], 0
    for item in (*_folders(reasons, now_s), *_unneeded(store, needed_objects, now_s, min_age_s)):
        if item.age_s < min_age_s:
            young += 1
        else:
            found.append(item)
    return Findings(
        items=tuple(found), kept=Counter(reasons.values()), young=young, remote=remote,
        min_age_s=min_age_s,
    )  # fmt: skip


def delete(found: Findings) -> int:
    """Delete what was found; what is held or was touched meanwhile stays.

    Returns:
        Bytes deleted.
    """
    before_s = time.time() - found.min_age_s
    store = remotes.find(found.remote)
    done = 0
    for item in found.items:
        if item.kind == OBJECT:
            deleted = storage.remove(store, item.name, before_s)
        else:
            deleted = _remove(Path(item.name), before_s)
        done += item.size if deleted else 0
    return done


def _store(records: Records, name: str) -> remotes.Remote:
    store = remotes.find(name)
    seeds = {data_dir().parent / "data-seed"}
    with contextlib.suppress(ValueError):  # there may be none to mistake it for
        seeds.add(Path(remotes.find(remotes.SEED).place))
    if name == remotes.SEED or Path(store.place).absolute() in seeds:
        raise ValueError(f"remote {name!r}: what a fresh clone needs is never deleted")
    if records.client is None and not Path(store.place).is_relative_to(home()):
        raise ValueError(
            f"remote {name!r} ({store.place}): got no registry at {spool.tracking_uri()}, which "
            "knows what others need; expected MLFLOW_TRACKING_URI to name it"
        )
    return store


def _needed(records: Records) -> dict[str, str]:
    """Why each needed artifact is needed, by digest."""
    reasons: dict[str, str] = {}
    for reason, roots in (
        *_versions(records),
        *_pins(records),
        ("of the latest turn, or of one under way", [*_turns(), *_running(records)]),
        ("unfinished, or not yet recorded", _unfinished()),
    ):
        # Which of several makers somebody will ask about is not known here.
        for digest in lineage.trace(records, list(dict.fromkeys(roots)), every=True).artifacts:
            reasons.setdefault(digest, reason)
    return reasons


def _versions(records: Records) -> Iterator[tuple[str, list[str]]]:
    if records.client is None:
        return
    with asked():
        named = {version: f"{NAME}@{alias}" for alias, version in aliases(records.client).items()}
        if not named:
            return
        earlier = journal.read(records.client).champions
        for version in dict.fromkeys((*named, *earlier)):
            title = named.get(version, f"an earlier champion, version {version}")
            yield f"of {title}", [get_version(records.client, version).digest]


def _pins(records: Records) -> Iterator[tuple[str, list[str]]]:
    for run in records.search(f"tags.`{PINNED}` = 'true'"):
        tags, run_id = run.data.tags, run.info.run_id
        below = records.search(f"tags.`mlflow.parentRunId` = '{run_id}'")
        digests = [_digest_of(each) for each in (run, *below)]
        name = tags.get("mlflow.runName", run_id)
        yield f"of pinned run {name}", [digest for digest in digests if digest]


def _digest_of(run: Any) -> str | None:
    tags = run.data.tags
    if tags.get("flowloom.digest"):
        return tags["flowloom.digest"]
    pointer = tags.get("flowloom.artifact")
    return json.loads(pointer)["md5"] if pointer else None


def _turns() -> Iterator[str]:
    """What the latest turn of this home made, and every turn that did not end well."""
    latest = turns.latest()
    for path in sorted(home().glob("turns/*/turn.json")):
        turn = turns.load(path.parent.name)
        last = latest is not None and turn.name == latest.name
        if last or turn.record["status"] != "finished" or storage.is_held(turn.dir):
            yield from (step["digest"] for step in turn.steps())


def _running(records: Records) -> Iterator[str]:
    """What runs of any machine read that are under way, and the latest turn that was recorded."""
    running = records.search("attributes.status = 'RUNNING'")
    for run in running:
        for name, value in run.data.tags.items():
            if name.startswith("flowloom.input."):
                yield from (digest for digest in value.split(",") if is_digest(digest, FOLDER))
    for turn in records.search("tags.`flowloom.kind` = 'turn'")[-1:]:
        steps = records.search(f"tags.`mlflow.parentRunId` = '{turn.info.run_id}'")
        yield from filter(None, map(_digest_of, steps))


def _unfinished() -> Iterator[str]:
    """What runs of this home read or made that are not finished, held, or not yet recorded."""
    entries = [spool.read(path)[0] for path in spool.waiting()]
    waiting = {str(Path(entry.dir).absolute()) for entry in entries}
    for folder in _run_folders():
        record = _record(folder)
        if record is None:
            continue
        if record.digest is None or str(folder) in waiting or storage.is_held(folder):
            yield from (digest for digests in record.artifacts.values() for digest in digests)
            if record.digest:
                yield record.digest


def _run_folders() -> list[Path]:
    return sorted(path for path in home().glob("runs/*/*") if path.is_dir())


def _record(folder: Path) -> Record | None:
    try:
        return read_folder(folder)
    except ValueError:
        return None


def _objects(records: Records, reasons: Mapping[str, str], store: remotes.Remote) -> set[str]:
    """The objects that needed artifacts are made of, manifests too.

    Raises:
        ValueError: A manifest cannot be read, so that nobody can tell.
    """
    needed = set(reasons)
    for path in data_dir().parent.glob("*.dvc"):
        if path.is_file():  # .dvc is a folder
            needed |= {word for word in path.read_text().split() if is_digest(word, FOLDER)}
    found = set(needed)
    for digest in needed:
        manifest = store.read(digest)
        if manifest is not None:
            found |= set(parse_manifest(manifest, digest).values())
            continue
        # It may be under way to this remote, its manifest last.
        makers = records.by_digest(digest)
        entries = entries_of(digest, makers[0] if makers else None)
        found |= set((entries or {}).values())
    return found


def _folders(reasons: Mapping[str, str], now_s: float) -> Iterator[Item]:
    for folder in _run_folders():
        record = _record(folder)
        # A folder without a record is being made, or no run's.
        if record is not None and record.digest is not None and record.digest not in reasons:
            yield _item(RUN, folder, now_s)
    for folder in sorted(home().glob("models/*")):
        if folder.is_dir() and f"{folder.name}{FOLDER}" not in reasons:
            yield _item(MODEL, folder, now_s)
    for folder in sorted(home().glob("reproduce/*")):
        if folder.is_dir() and not storage.is_held(folder):
            yield _item(LEFTOVER, folder, now_s)


def _unneeded(
    store: remotes.Remote, needed: set[str], now_s: float, min_age_s: float
) -> Iterator[Item]:
    protected: set[str] = set()
    listed = list(storage.objects(store))
    # A manifest comes last, so what a young one names may be old.
    for item in listed:
        if item.digest.endswith(FOLDER) and now_s - item.modified_s < min_age_s:
            data = store.read(item.digest)
            protected |= set(parse_manifest(data, item.digest).values()) if data else set()
    for item in sorted(listed, key=lambda item: item.digest):
        if item.digest not in needed and item.digest not in protected:
            age_s = now_s - item.modified_s
            yield Item(
                kind=OBJECT, name=item.digest, size=item.size, why=_since(age_s), age_s=age_s
            )


def _item(kind: str, folder: Path, now_s: float) -> Item:
    age_s = now_s - storage.touched_s(folder)
    size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
    return Item(kind=kind, name=str(folder), size=size, why=_since(age_s), age_s=age_s)


def _since(age_s: float) -> str:
    hours = age_s / 3600
    return f"untouched for {hours / 24:.0f} days" if hours > 48 else f"untouched for {hours:.0f} h"


def _remove(folder: Path, before_s: float) -> bool:
    """Delete a folder, unless somebody holds it or touched it; it vanishes at once."""
    if not folder.is_dir():  # somebody else deleted it
        return False
    with storage.holding(folder) as mine:
        if not mine or storage.touched_s(folder) > before_s:
            return False
        trash = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(folder, trash)
    shutil.rmtree(trash)
    return True

"""Make an artifact again from what its run recorded, and say whether the bytes are the same.

Nothing is needed but the run id, the tracker and the remote: configurations come from the tracker,
inputs by their digest from the remote. The stages run in this checkout's code, each in a process of
its own, in a fresh home: nothing but inputs is reused, and nothing is recorded or published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowloom.lifecycle import remotes, surroundings
from flowloom.lifecycle.lineage import Lineage, trace
from flowloom.lifecycle.record import Record, Subject
from flowloom.lifecycle.records import (
    Records,
    bring,
    entries_of,
    first_difference,
)
from flowloom.lifecycle.run_facts import flatten
from flowloom.runs import home

REGISTER = "register"
"""The stage that puts a registered model's folder together."""
UNREPEATABLE = ("promote",)
"""Stages whose result depends on the registry as it was."""
LOG_TAIL_LINES = 5
# What a stage must not take from its surroundings: where to record, publish and find turns.
_FORGOTTEN = (
    "FLOWLOOM_TURN", "FLOWLOOM_STEP", "FLOWLOOM_STORE", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """An artifact that was made again."""

    stage: str
    """Name of the stage."""
    key: str
    """Key of the recorded run."""
    expected: str
    """Digest of its artifact then."""
    got: str | None
    """Digest of the artifact now; `None` where the stage failed."""
    seconds: float
    """How long it took, with start-up."""
    difference: str | None = None
    """The first file that differs, with both digests; or why the stage failed."""

    @property
    def equal(self) -> bool:
        """Whether the bytes are the same."""
        return self.got == self.expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What reproducing gave."""

    changes: tuple[str, ...]
    """What is not as it was when the runs were made."""
    outcomes: tuple[Outcome, ...]
    """In the order they were made; the last may differ, and then nothing came after it."""
    left: tuple[str, ...]
    """Stages that were not reached."""

    @property
    def failed(self) -> bool:
        """Whether a stage ended without an artifact."""
        return any(outcome.got is None for outcome in self.outcomes)

    @property
    def equal(self) -> bool:
        """Whether every artifact is the same, byte by byte."""
        return all(outcome.equal for outcome in self.outcomes) and not self.left

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        rows = [dataclasses.asdict(item) | {"equal": item.equal} for item in self.outcomes]
        differing = next((row for row in rows if not row["equal"]), None)
        return {
            "equal": self.equal,
            "changes": list(self.changes),
            "artifacts": rows,
            "first_difference": differing,
            "left": list(self.left),
        }


def plan(
    records: Records, subject: Subject, only: str | None = None, from_inputs: bool = False
) -> list[Record]:
    """The runs to repeat, what something is made from before it.

    A run alone is repeated from its inputs; a model version from data on.

    Args:
        records: Where runs are looked up.
        subject: What to reproduce.
        only: Repeat only the runs of this stage.
        from_inputs: Repeat the last run alone.

    Raises:
        ValueError: No run made it, or one that is needed made nothing or cannot be repeated.
    """
    last = subject.record
    if last is None or subject.digest is None:
        raise ValueError(f"{subject.title}: no recorded run made it; nothing to reproduce")
    if last.stage in UNREPEATABLE:
        raise ValueError(f"{last}: decides by the registry as it is, expected a stage that makes")
    if only is None and (from_inputs or not subject.version):
        return [last]
    chain = _chain(trace(records, [subject.digest], {subject.digest: last}))
    if only is not None:
        chosen = [record for record in chain if record.stage == only]
        if not chosen:
            stages = ", ".join(dict.fromkeys(record.stage for record in chain))
            raise ValueError(f"--only: got {only!r}, expected one of {stages}")
        return chosen
    return chain


def reproduce(
    records: Records,
    chain: Sequence[Record],
    overrides: Mapping[str, Any] | None = None,
    *,
    say: Callable[[str], None],
    keep: bool = False,
) -> Reproduction:
    """Repeat runs in order, until an artifact differs.

    Args:
        records: Where they are looked up.
        chain: What `plan` gave.
        overrides: Fields of the last run's configuration to replace, which is then said.
        say: Called with each line worth telling at once: changes first, then each artifact.
        keep: Leave the fresh home, with what was made, where it is.

    Raises:
        ValueError: A configuration or an input cannot be had.
    """
    identities = [dict(records.identity(record)) for record in chain]
    used = [identity["config"] for identity in identities]
    used[-1] = _replaced(used[-1], overrides or {})
    changes = surroundings.changes(records, chain)
    for record, identity, config in zip(chain, identities, used, strict=True):
        changes += surroundings.config_changes(records, record, identity, config)
    for line in changes:
        say(f"not as it was: {line}")
    outcomes: list[Outcome] = []
    with _fresh_home(keep, say) as fresh:
        made: dict[str, Path] = {}
        for record, identity, config in zip(chain, identities, used, strict=True):
            folder = fresh / "again" / f"{len(outcomes):02d}-{record.stage}"
            folder.mkdir(parents=True)
            inputs = {
                name: [_input(records, digest, made, fresh) for digest in digests]
                for name, digests in record.artifacts.items()
            }
            started_s = time.perf_counter()
            out, got = _repeat({**identity, "config": config}, inputs, folder, fresh)
            outcome = _compared(record, out, got, time.perf_counter() - started_s)
            outcomes.append(outcome)
            new = _new_fields(record, out, config) if got else []
            for line in new:
                say(f"not as it was: {line}")
            changes += new
            say(_told(outcome))
            if not outcome.equal:
                break
            made[outcome.expected] = out
    left = tuple(record.stage for record in chain[len(outcomes) :])
    return Reproduction(changes=tuple(changes), outcomes=tuple(outcomes), left=left)


def _chain(lineage: Lineage) -> list[Record]:
    found = []
    for artifact in lineage.artifacts.values():
        if not artifact.followed:
            continue
        if not artifact.makers:
            raise ValueError(f"artifact {artifact.digest}: no recorded run made it")
        found.append(artifact.makers[0])
    return found


def _replaced(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with fields replaced, nested ones too; the stage refuses unknown ones."""
    config = dict(config)
    for name, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(config.get(name), Mapping)
        config[name] = _replaced(config[name], value) if nested else value
    return config


@contextlib.contextmanager
def _fresh_home(keep: bool, say: Callable[[str], None]) -> Iterator[Path]:
    root = home() / "reproduce"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=root))
    # Held, so that nobody who cleans up takes it away.
    with remotes.held(folder / "lock", wait=True):
        try:
            yield folder
        finally:
            if keep:
                say(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _input(records: Records, digest: str, made: dict[str, Path], fresh: Path) -> Path:
    """An input's folder: made again before, or fetched from where it was published."""
    if digest not in made:
        into = fresh / "inputs" / digest.removesuffix(".dir")
        made[digest] = bring(digest, records.by_digest(digest), into)
    return made[digest]


def _repeat(
    identity: Mapping[str, Any], inputs: Mapping[str, list[Path]], folder: Path, fresh: Path
) -> tuple[Path, str | None]:
    """Run a stage in a process of its own; its artifact and digest, or why it failed and `None`."""
    (folder / "config.json").write_text(json.dumps(identity))
    stage = identity["stage"]
    if stage == REGISTER:
        task = {name: str(paths[0]) for name, paths in inputs.items()}
        (folder / "parts.json").write_text(json.dumps(task))
        command = ["-m", "flowloom.lifecycle.reproduce", str(folder)]
    else:
        command = ["-m", "flowloom", "run", stage, "--config", str(folder / "config.json")]
        for name, paths in inputs.items():
            command += [part for path in paths for part in ("--input", f"{name}={path}")]
        command.append("--json")
    environment = {k: v for k, v in os.environ.items() if k not in _FORGOTTEN}
    environment |= {"FLOWLOOM_HOME": str(fresh), "FLOWLOOM_TRACKING": "spool"}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=out, stderr=err, check=False
        )
    if done.returncode:
        tail = (folder / "stderr").read_text().splitlines()[-LOG_TAIL_LINES:]
        (folder / "failed").write_text(" | ".join(tail))
        return folder / "failed", None
    answer = json.loads((folder / "stdout").read_text().splitlines()[-1])
    return Path(answer["out"]), answer["digest"]


def _new_fields(record: Record, out: Path, config: Mapping[str, Any]) -> list[str]:
    """Fields that this checkout's configuration has and the recorded one lacks, or the reverse."""
    path = out.parent / "config.json"
    resolved = json.loads(path.read_text())["config"]
    found = surroundings.different(flatten(resolved), flatten(config))
    where = f"{record.stage}: config"
    return [f"{where}: {name}: got {got}, the run had {had}" for name, got, had in found]


def _compared(record: Record, out: Path, got: str | None, seconds: float) -> Outcome:
    expected = str(record.digest)
    difference = None
    if got is None:
        difference = out.read_text()
    elif got != expected:
        found = first_difference(entries_of(expected, record), out)
        difference = str(found) if found else f"no remote has the manifest {expected}"
    return Outcome(
        stage=record.stage, key=record.key, expected=expected, got=got, seconds=seconds,
        difference=difference,
    )  # fmt: skip


def _told(outcome: Outcome) -> str:
    if outcome.equal:
        return f"equal: {outcome.stage}: {outcome.got} ({outcome.seconds:.0f} s)"
    if outcome.got is None:
        return f"failed here: {outcome.stage}: {outcome.difference}"
    return (
        f"different: {outcome.stage}: got {outcome.got}, expected {outcome.expected}; "
        f"first: {outcome.difference}"
    )


def _register(folder: Path) -> None:
    """Put a model's folder together from its parts; prints what `flowloom run --json` does."""
    from flowloom.lifecycle.model_folder import build_model_folder
    from flowloom.runs import folder_digest

    parts = json.loads((folder / "parts.json").read_text())
    out = folder / "out"
    out.mkdir()
    build_model_folder(out, {name: Path(path) for name, path in parts.items()})
    print(json.dumps({"out": str(out), "digest": folder_digest(out)}))


if __name__ == "__main__":
    _register(Path(sys.argv[1]))

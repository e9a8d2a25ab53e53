"""A turn of the loop: its key is frozen when it starts, and the same command resumes it.

.flowloom/turns/0001/
    turn.json     the key, status, and each finished step
    steps/        one record per step, left by the step itself
    logs/         one file per step
    failure.json  the step that stopped it, if one did and the runner saw it
    outcome.json  how it ended, as the pipeline's exit handler was told
    lock          held while a process works on the turn

On a cluster the turn is named by the engine's run, and the pipeline's first step begins it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle import tracking, webhook
from flowloom.runs import code_digest, data_md5, home, storing, write_json

if TYPE_CHECKING:
    from flowloom.dataset.config import BuildTripletsConfig

KEY_FIELDS = ("pipeline", "recipe", "overrides", "data", "catalogue", "code")
"""What a turn must share with the latest one to resume it. (The champion changes by the turn.)"""


class Turn:
    """A turn's folder and record."""

    def __init__(self, folder: Path, record: dict[str, Any]):
        """Wrap `folder`, whose `turn.json` holds `record`."""
        self.dir = folder
        self.record = record

    @property
    def name(self) -> str:
        """Its number, such as `0001`."""
        return self.dir.name

    @property
    def champion(self) -> str | None:
        """Version of the champion when the turn started."""
        return self.record["champion"]

    def log_path(self, step: str) -> Path:
        """The log file of a step."""
        return self.dir / "logs" / f"{step}.log"

    def steps(self) -> list[dict[str, Any]]:
        """Records of the steps that ended, as each left it."""
        return [json.loads(path.read_text()) for path in sorted(self.dir.glob("steps/*.json"))]

    def mark(self, status: str, **more: Any) -> None:
        """Write `status` (`running`, `finished`, `failed`), the steps' digests, and `more`.

        A finished turn that runs again finds all it made and stays finished.
        """
        if status == "running":
            if self.record["status"] == "finished":
                return
            for name in ("failure.json", "outcome.json"):
                (self.dir / name).unlink(missing_ok=True)
        outcome = self.dir / "outcome.json"
        if outcome.is_file():
            self.record["outcome"] = json.loads(outcome.read_text())
        digests = {step["step"]: step["digest"] for step in self.steps()}
        self.record |= {"status": status, "stages": digests, **more}
        write_json(self.dir / "turn.json", self.record)
        tracking.leave_turn(self.dir, status)


def key(pipeline: str, recipe: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide whether a turn is resumed."""
    from flowloom.workflow.catalogue import Catalogue

    return {
        "pipeline": pipeline,
        "recipe": recipe,
        "overrides": json.loads(json.dumps(overrides)),
        "data": data_md5(),
        "catalogue": Catalogue.load("embedded").hash,
        "code": code_digest(),
    }


def sources() -> str:
    """Digests of the code and the data that this process works with, as one word."""
    return f"code-{code_digest()[:16]}-data-{data_md5() or 'untracked'}"


def check_sources(step: str, expected: str) -> None:
    """Whether a step works with what its turn began with.

    Raises:
        ValueError: If this process has other code or data: the engine's cache would take what it
            makes for theirs.
    """
    if sources() != expected:
        raise ValueError(f"{step}: sources: got {sources()}, expected the turn's {expected}")


def recalled(config: BuildTripletsConfig, previous: str) -> dict[str, str]:
    """What the turn goes on from, found once and then kept in its record.

    Args:
        config: How the turn builds triplets.
        previous: The version; see `recall.find`.

    Returns:
        Number of the version and digests of its parts; empty on a first turn.
    """
    from flowloom.lifecycle import recall

    path = home() / "turns" / os.environ.get("FLOWLOOM_TURN", "") / "turn.json"
    turn = load(path.parent.name) if path.is_file() else None
    if turn is not None and "recalled" in turn.record:
        return turn.record["recalled"]
    found = recall.find(config, previous)
    if turn is not None:
        turn.record["recalled"] = found
        write_json(path, turn.record)
    return found


def begin(pipeline: str, recipe: str, overrides: Mapping[str, Any], champion: str) -> str:
    """Freeze the champion of a turn; on a cluster, make its record.

    Args:
        pipeline: Name of the pipeline.
        recipe: Name of the recipe.
        overrides: Fields to replace, by stage.
        champion: Version to compare with; empty for none, `auto` for the champion there is now.

    Returns:
        The version to compare with; empty if none.
    """
    name = os.environ.get("FLOWLOOM_TURN")
    folder = home() / "turns" / (name or "")
    if name and (folder / "turn.json").is_file():
        # This machine's runner, or an earlier attempt of this step, froze it.
        champion = load(name).champion or ""
    elif champion == "auto":
        from flowloom.lifecycle import registry

        now = registry.champion()
        champion = now.version if now else ""
    if name and not (folder / "turn.json").is_file():
        turn = _make(folder, key(pipeline, recipe, overrides), champion or None)
        turn.mark("running")
        tracking.drain()
    return champion


def close(state: str, error: str | None) -> None:
    """Record how the turn ended: in its record, and in the tracking run of the turn.

    A failure is also told to the webhook, if there is one.

    Args:
        state: `SUCCEEDED`, `FAILED` or `CANCELLED`.
        error: What the engine says of it.
    """
    name = os.environ.get("FLOWLOOM_TURN")
    if not name:
        return
    folder = home() / "turns" / name
    outcome = {"state": state, "error": error}
    failure = folder / "failure.json"
    if state != "SUCCEEDED":
        if failure.is_file():
            outcome |= json.loads(failure.read_text())
        # Before anything is written: what went wrong may be the disk, or the tracker.
        webhook.notify(webhook.turn_failed(state, outcome["error"], outcome.get("step")))
    if not (folder / "turn.json").is_file():
        return  # its first step did not come to make the record
    write_json(folder / "outcome.json", outcome)
    turn = load(name)
    turn.mark("finished" if state == "SUCCEEDED" else "failed")
    if os.environ.get("FLOWLOOM_TRACKING") != "spool":
        tracking.drain()


def latest() -> Turn | None:
    """The turn that was started last."""
    # On a cluster turns have the names of the engine's runs, and are resumed by the engine.
    folders = sorted(path.parent for path in home().glob("turns/[0-9][0-9][0-9][0-9]/turn.json"))
    return load(folders[-1].name) if folders else None


def load(name: str) -> Turn:
    """The turn of that name.

    Raises:
        ValueError: If there is none.
    """
    path = home() / "turns" / name / "turn.json"
    if not path.is_file():
        raise ValueError(f"turn: got {name!r}, expected one in {home() / 'turns'}")
    return Turn(path.parent, json.loads(path.read_text()))


def open_turn(
    fields: Mapping[str, Any],
    champion: Callable[[], str | None],
    new: bool = False,
    number: int | None = None,
    recalled: Callable[[], dict[str, str]] | None = None,
) -> Turn:
    """Resume the latest turn if its key is the same, else start one.

    Args:
        fields: What `key` gives.
        champion: Gives the version of the champion now; asked if the turn is new, then frozen.
        new: Start a turn even if the latest has the same key.
        number: The turn that there should be: resumed if it is the latest, started if it follows.
        recalled: Gives what it goes on from (`recall.find`); asked and frozen like the champion.

    Raises:
        ValueError: If turn `number` is neither the latest nor the next, or has another key.
        StorageError: If the home folder takes no files.
    """
    last = latest()
    count = int(last.name) if last else 0
    other = [name for name in KEY_FIELDS if last and last.record[name] != fields[name]]
    if number is None:
        if last and not new and not other:
            return last
    elif last and number == count:
        if other:
            raise ValueError(
                f"turn {number}: was started with another {', '.join(other)}, expected the same; "
                f"the next is {count + 1}"
            )
        return last
    elif number != count + 1:
        expected = f"{count} (the latest) or {count + 1}" if count else "1 (there is none yet)"
        raise ValueError(f"turn: got {number}, expected {expected}")
    folder = home() / "turns" / f"{count + 1:04d}"
    with storing(f"turn {folder.name}", folder):
        more = {"recalled": recalled()} if recalled else {}
        return _make(folder, {**fields, **more}, champion())


def _make(folder: Path, fields: Mapping[str, Any], champion: str | None) -> Turn:
    for name in ("steps", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    record = {**fields, "turn": folder.name, "champion": champion, "status": "new"}
    write_json(folder / "turn.json", record)
    return Turn(folder, record)


@contextmanager
def held(turn: Turn) -> Iterator[None]:
    """Hold a turn while working on it.

    Raises:
        ValueError: If another process holds it.
        StorageError: If the folder takes no more files.
    """
    with storing(f"turn {turn.name}", turn.dir), (turn.dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"turn {turn.name}: process {file.read().strip()} works on it; wait for it to end, "
                "or ask for another with --new-turn"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

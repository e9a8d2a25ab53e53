"""A turn of the loop: its key is frozen when it starts, and the same command resumes it.

.flowloom/turns/0001/
    turn.json     the key, status, and each finished step
    steps/        one record per step, left by the step itself
    logs/         one file per step
    lock          held while a process works on the turn
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowloom.lifecycle import tracking
from flowloom.runs import code_digest, data_md5, home, write_json

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
        if self.record["status"] == "finished" and status == "running":
            return
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


def latest() -> Turn | None:
    """The turn that was started last."""
    folders = sorted(path.parent for path in home().glob("turns/*/turn.json"))
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
    fields: Mapping[str, Any], champion: Callable[[], str | None], new: bool = False
) -> Turn:
    """Resume the latest turn if its key is the same, else start one.

    Args:
        fields: What `key` gives.
        champion: Gives the version of the champion now; asked if the turn is new, then frozen.
        new: Start a turn even if the latest has the same key.
    """
    last = latest()
    if last and not new and all(last.record[name] == fields[name] for name in KEY_FIELDS):
        return last
    number = int(last.name) + 1 if last else 1
    folder = home() / "turns" / f"{number:04d}"
    (folder / "steps").mkdir(parents=True)
    (folder / "logs").mkdir()
    record = {**fields, "turn": folder.name, "champion": champion(), "status": "new"}
    write_json(folder / "turn.json", record)
    return Turn(folder, record)


@contextmanager
def held(turn: Turn) -> Iterator[None]:
    """Hold a turn while working on it.

    Raises:
        ValueError: If another process holds it.
    """
    with (turn.dir / "lock").open("a+") as file:
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

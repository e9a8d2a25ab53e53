"""The registered model `flow-designer`: register a candidate, promote it, roll back.

Versions live in MLflow's registry; aliases say which is `candidate` and which is `champion`. Every
change of the champion goes through this module and is a compare-and-swap: it happens only if the
champion is still the one that the candidate was compared with. Processes that share a home take
turns under a file lock; machines that share only the tracking server are put in order by the
journal (see there what is guaranteed). Every decision, a refusal too, is in the journal with all
its numbers, and in the tags of the version it is about.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle import journal, mlflow_model, tracking, versioning, webhook
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import Check, Decision, champion_unchanged, gate
from flowloom.lifecycle.model_folder import PARTS, Layout, build_model_folder
from flowloom.lifecycle.versions import (
    CANDIDATE,
    CHAMPION,
    CHAMPION_URI,
    FILES,
    MAX_TEXT,
    NAME,
    ModelVersion,
    aliases,
    champion,
    champion_dir,
    connect,
    ensure_model,
    get_version,
    opponent,
)
from flowloom.runs import StageResult, exclusive, home, input_digest, open_run, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "CHAMPION_URI",
    "NAME",
    "ModelVersion",
    "champion",
    "champion_dir",
    "decide",
    "history",
    "opponent",
    "promote",
    "reconsider",
    "register",
    "rollback",
]
_PROMOTED, _REFUSED, _ROLLED_BACK = "promoted", "refused", "rolled back"


def register(parts: Mapping[str, Path], expected: str | None = None) -> tuple[StageResult, str]:
    """Build the model's folder and register it as `candidate`; twice the same gives one version.

    Args:
        parts: The artifact folder of each of `model_folder.PARTS`.
        expected: The champion when the turn started, whom the evaluation compared with.

    Returns:
        The folder as a stage's result, and the version.
    """
    run = open_run("register", Layout(), {name: input_digest(parts[name]) for name in PARTS})
    with exclusive(run):
        if run.done:
            tracking.reused(run)
            result = run.result()
        else:
            with tracking.recorded(run):
                run.begin()
                build_model_folder(run.out, parts)
                result = run.finish({})
                versioning.publish(result.out_dir)
        # Beside the artifact, not in it: a version is a number that the registry gave.
        note = run.dir / "version.json"
        here = {"registry": tracking.tracking_uri(), "expected": expected}
        noted = json.loads(note.read_text()) if note.is_file() else {}
        if all(noted.get(name) == value for name, value in here.items()):
            return result, noted["version"]
        client, run_id = tracking.record_now(run)
        with _locked():
            version = _version_of(client, result, run_id, expected)
            client.set_registered_model_alias(NAME, CANDIDATE, version)
        write_json(note, {**here, "version": version})
    return result, version


def _version_of(
    client: MlflowClient, result: StageResult, run_id: str, expected: str | None
) -> str:
    """The version that holds the artifact and was compared with `expected`; made if needed."""
    ensure_model(client)
    for known in client.search_model_versions(f"name = '{NAME}'"):
        tags = known.tags
        if tags.get("flowloom.digest") == result.digest and tags.get("flowloom.expected") == (
            expected or ""
        ):
            return str(known.version)
    source, files = mlflow_model.log(client, run_id, result.out_dir)
    record = json.loads((result.out_dir / "config.json").read_text())
    pointer = json.loads((result.out_dir.parent / "pointer.json").read_text())
    tags = {
        "flowloom.digest": result.digest,
        "flowloom.expected": expected or "",
        "flowloom.turn": os.environ.get("FLOWLOOM_TURN", ""),
        "flowloom.catalogue": record["catalogue"],
        "flowloom.data": record["data"] or "untracked",
        "flowloom.artifact": json.dumps(pointer, sort_keys=True),
        FILES: files,
    }
    card = (result.out_dir / "card.md").read_text()[:MAX_TEXT]
    made = client.create_model_version(NAME, source, run_id, tags=tags, description=card)
    return str(made.version)


def decide(
    config: GateConfig, version: str, evaluation: Path, expected: str | None = None
) -> StageResult:
    """The `promote` stage: gate, compare-and-swap, `decision.json`. A second call changes nothing.

    The decision is told to the webhook, if there is one.

    Args:
        config: The gate's bounds.
        version: The candidate.
        evaluation: Artifact of `evaluate`.
        expected: The champion when the turn started.
    """
    where = {"registry": tracking.tracking_uri(), "version": version, "champion": expected or ""}
    run = open_run("promote", config, {"evaluation": input_digest(evaluation), **where})
    with exclusive(run):
        if run.done:
            tracking.reused(run)
            return run.result()
        with tracking.recorded(run):
            connect()  # imports MLflow: start-up, not the stage's seconds
            run.begin()
            found = json.loads((evaluation / "evaluation.json").read_text())
            decision = promote(version, gate(found, config))
            write_json(run.out / "decision.json", decision.to_dict())
            run.log(f"version {version} is {_verdict(decision)}: {decision.reason}")
            # Before the run is done: a call after one that died here tells it again.
            webhook.notify(webhook.decided(NAME, version, expected, decision))
            result = run.finish({"gate/promoted": float(decision.promoted)})
            versioning.publish(result.out_dir)
        return result


def promote(version: str, decision: Decision) -> Decision:
    """Give the alias `champion` to `version` if the gate lets it and nobody came in between.

    Refusals are recorded like promotions: in the journal and as tags of the version.

    Returns:
        The decision with the check that the champion is the one the candidate was compared with.

    Raises:
        ValueError: If there is no such version.
    """
    with _locked():
        client = connect()
        candidate = get_version(client, version)
        now = journal.settle(client).champion
        # Promoted before, by a process that died before it could say so.
        done = now == version
        expected = CHAMPION if candidate.expected else "best_fixed"
        compared = Check(
            "opponent", decision.opponent, expected, "=", decision.opponent == expected
        )
        unchanged = champion_unchanged(candidate.expected if done else now, candidate.expected)
        judged = dataclasses.replace(decision, checks=(*decision.checks, compared, unchanged))
        if not (judged.promoted and done):
            event = journal.PROMOTE if judged.promoted else journal.REFUSE
            number = journal.append(client, event, version, now, judged.reason, judged.rows())
            outcome = journal.settle(client).entry(number)
            if judged.promoted and not outcome.holds and outcome.previous != version:
                # A machine that shares only the tracking server was faster.
                unchanged = champion_unchanged(outcome.previous, now)
                judged = dataclasses.replace(judged, checks=(*judged.checks[:-1], unchanged))
        tags = {
            "flowloom.decision": _verdict(judged),
            "flowloom.reason": judged.reason[:MAX_TEXT],
            "flowloom.checks": json.dumps(judged.rows()),
        }
        for key, value in tags.items():
            client.set_model_version_tag(NAME, version, key, value)
    return judged


def reconsider(config: GateConfig, version: str | None = None) -> tuple[str, Decision]:
    """Hold a registered version (default: the candidate) against the gate, and promote it or not.

    Returns:
        The version and the decision.
    """
    if version is None:
        version = aliases(connect()).get(CANDIDATE)
        if version is None:
            raise ValueError(f"{NAME}@{CANDIDATE}: no such alias; expected a registered candidate")
    folder = champion_dir(f"models:/{NAME}/{version}")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    return version, promote(version, gate(evaluation, config))


def rollback(to: str | None = None) -> str:
    """Give the alias `champion` back to an earlier champion.

    Args:
        to: Its version; `None` is the one before the champion.

    Returns:
        The version that is champion now.

    Raises:
        ValueError: If there is no earlier champion, or `to` never was one.
    """
    with _locked():
        client = connect()
        champions = journal.settle(client).champions
        if to is None:
            if len(champions) < 2:
                raise ValueError(f"rollback: got {len(champions)} champions so far, expected >= 2")
            to = champions[-2]
        elif to not in champions[:-1]:
            earlier = ", ".join(champions[:-1]) or "none"
            raise ValueError(f"rollback: got version {to}, expected an earlier champion: {earlier}")
        left = champions[-1]
        number = journal.append(client, journal.ROLLBACK, to, left, f"from version {left}")
        outcome = journal.settle(client).entry(number)
        if not outcome.holds:
            raise ValueError(
                f"rollback: got champion {outcome.previous} meanwhile, expected {left}"
            )
        client.set_model_version_tag(NAME, left, "flowloom.decision", _ROLLED_BACK)
    return to


def history() -> list[dict[str, Any]]:
    """Every promotion, refusal and rollback, by whatever machine, oldest first."""
    return [entry.to_dict() for entry in journal.read(connect()).entries]


def _verdict(decision: Decision) -> str:
    return _PROMOTED if decision.promoted else _REFUSED


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    home().mkdir(parents=True, exist_ok=True)
    with (home() / "registry.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

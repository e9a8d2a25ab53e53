"""The registered model `flow-designer`: register a candidate, promote it, roll back.

Versions live in MLflow's registry; aliases say which is `candidate` and which is `champion`. The
aliases have no compare-and-swap, so every change of the champion goes through this module, under
one file lock, and only if the champion is still the one the candidate was compared with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.lifecycle import tracking, versioning
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import Check, Decision, champion_unchanged, gate
from flowloom.lifecycle.model_folder import PARTS, Layout, build_model_folder
from flowloom.runs import (
    StageResult,
    exclusive,
    folder_digest,
    home,
    input_digest,
    open_run,
    write_json,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "flow-designer"
CHAMPION = "champion"
CANDIDATE = "candidate"
CHAMPION_URI = f"models:/{NAME}@{CHAMPION}"
_STACK = "flowloom.champions"


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A registered version."""

    version: str
    """Its number, as MLflow gives it."""
    digest: str
    """Digest of its folder."""
    run_id: str
    """MLflow run that has its files."""
    turn: str | None
    """Turn that made it."""
    expected: str | None
    """Champion when that turn started: whom it was compared with."""


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
    _ensure_model(client)
    for known in client.search_model_versions(f"name = '{NAME}'"):
        tags = known.tags
        if tags.get("flowloom.digest") == result.digest and tags.get("flowloom.expected") == (
            expected or ""
        ):
            return str(known.version)
    client.log_artifacts(run_id, str(result.out_dir), "model")
    record = json.loads((result.out_dir / "config.json").read_text())
    pointer = json.loads((result.out_dir.parent / "pointer.json").read_text())
    tags = {
        "flowloom.digest": result.digest,
        "flowloom.expected": expected or "",
        "flowloom.turn": os.environ.get("FLOWLOOM_TURN", ""),
        "flowloom.catalogue": record["catalogue"],
        "flowloom.data": record["data"] or "untracked",
        "flowloom.artifact": json.dumps(pointer, sort_keys=True),
    }
    made = client.create_model_version(NAME, f"runs:/{run_id}/model", run_id, tags=tags)
    return str(made.version)


def decide(
    config: GateConfig, version: str, evaluation: Path, expected: str | None = None
) -> StageResult:
    """The `promote` stage: gate, compare-and-swap, `decision.json`. A second call changes nothing.

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
            _connect()  # imports MLflow: start-up, not the stage's seconds
            run.begin()
            found = json.loads((evaluation / "evaluation.json").read_text())
            decision = promote(version, gate(found, config))
            write_json(run.out / "decision.json", decision.to_dict())
            run.log(f"version {version} {_verdict(decision)}: {decision.reason}")
            result = run.finish({"gate/promoted": float(decision.promoted)})
            versioning.publish(result.out_dir)
        return result


def promote(version: str, decision: Decision) -> Decision:
    """Give the alias `champion` to `version` if the gate lets it and nobody came in between.

    Refusals are recorded like promotions: as tags of the version and in the history.

    Returns:
        The decision with the check that the champion is the one the candidate was compared with.

    Raises:
        ValueError: If there is no such version.
    """
    with _locked():
        client = _connect()
        candidate = _get_version(client, version)
        now = _aliases(client).get(CHAMPION)
        # Promoted before, by a process that died before it could say so.
        done = now == version
        unchanged = champion_unchanged(candidate.expected if done else now, candidate.expected)
        opponent = CHAMPION if candidate.expected else "best_fixed"
        compared = Check(
            "opponent", decision.opponent, opponent, "=", decision.opponent == opponent
        )
        decision = dataclasses.replace(decision, checks=(*decision.checks, compared, unchanged))
        tags = {
            "flowloom.decision": "promoted" if decision.promoted else "refused",
            "flowloom.reason": decision.reason[: tracking.MAX_TEXT],
        }
        for key, value in tags.items():
            client.set_model_version_tag(NAME, version, key, value)
        if decision.promoted and not done:
            # The list first: a list that names more than the alias is cut, see _champions.
            champions = [*_champions(client), version]
            client.set_registered_model_tag(NAME, _STACK, json.dumps(champions))
            client.set_registered_model_alias(NAME, CHAMPION, version)
        _write_history("promote" if decision.promoted else "refuse", version, now, decision.reason)
    return decision


def reconsider(config: GateConfig, version: str | None = None) -> tuple[str, Decision]:
    """Hold a registered version (default: the candidate) against the gate, and promote it or not.

    Returns:
        The version and the decision.
    """
    if version is None:
        version = _aliases(_connect()).get(CANDIDATE)
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
        client = _connect()
        champions = _champions(client)
        if to is None:
            if len(champions) < 2:
                raise ValueError(f"rollback: got {len(champions)} champions so far, expected >= 2")
            kept = champions[:-1]
        elif to in champions[:-1]:
            kept = champions[: len(champions) - 1 - champions[:-1][::-1].index(to)]
        else:
            earlier = ", ".join(champions[:-1]) or "none"
            raise ValueError(f"rollback: got version {to}, expected an earlier champion: {earlier}")
        left = champions[-1]
        client.set_model_version_tag(NAME, left, "flowloom.decision", "rolled back")
        # The alias first: a list that names more than the alias is cut, see _champions.
        client.set_registered_model_alias(NAME, CHAMPION, kept[-1])
        client.set_registered_model_tag(NAME, _STACK, json.dumps(kept))
        _write_history("rollback", kept[-1], left, f"from version {left}")
    return kept[-1]


def champion() -> ModelVersion | None:
    """The champion, or `None` where there is none yet."""
    if not _exists():
        return None
    client = _client()
    version = _aliases(client).get(CHAMPION)
    return _get_version(client, version) if version else None


def opponent(version: str) -> tuple[str, Path | None]:
    """The champion that a candidate is compared with, and its folder.

    Args:
        version: Its version; empty for none; `auto` for the champion there is now.
    """
    if version == "auto":
        now = champion()
        version = now.version if now else ""
    return version, champion_dir(f"models:/{NAME}/{version}") if version else None


def champion_dir(uri: str = CHAMPION_URI) -> Path:
    """The folder of a registered model, brought to this machine if it is not yet here.

    Args:
        uri: `models:/flow-designer@ALIAS`, `models:/flow-designer/VERSION`, or a folder.

    Raises:
        ValueError: If there is no such model.
    """
    if not uri.startswith("models:/"):
        if not (Path(uri) / "config.json").is_file():
            raise ValueError(f"model: got {uri!r}, expected a model's folder or models:/{NAME}@...")
        return Path(uri)
    client = _connect()
    version = _get_version(client, _resolve(client, uri))
    folder = home() / "models" / version.digest.removesuffix(".dir")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            found = Path(client.download_artifacts(version.run_id, "model", partial))
            (found / "models").mkdir(exist_ok=True)
            digest = folder_digest(found)
            if digest != version.digest:
                raise ValueError(f"{uri}: got files of digest {digest}, expected {version.digest}")
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(found, folder)
    return folder


def history() -> list[dict[str, Any]]:
    """Every promotion, refusal and rollback made from this home, oldest first."""
    path = home() / "registry.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _resolve(client: MlflowClient, uri: str) -> str:
    name, alias = uri.removeprefix("models:/"), None
    if "@" in name:
        name, alias = name.split("@", 1)
        version = _aliases(client).get(alias)
    else:
        name, _, version = name.partition("/")
    if name != NAME:
        raise ValueError(f"model: got {uri!r}, expected models:/{NAME}@ALIAS or /VERSION")
    if not version:
        raise ValueError(
            f"{uri}: no such model in {tracking.tracking_uri()}; `make demo` (or `python -m "
            "pipelines run continuous_training`) makes one"
        )
    return version


def _exists() -> bool:
    """Whether there is a registry at all; opening a SQLite file that is not there would make it."""
    uri = tracking.tracking_uri()
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def _client() -> MlflowClient:
    return tracking.connect()


def _connect() -> MlflowClient:
    if not _exists():
        raise ValueError(
            f"registry: got nothing at {tracking.tracking_uri()}, expected {NAME}; `make demo` (or "
            "`python -m pipelines run continuous_training`) makes one"
        )
    return _client()


def _aliases(client: MlflowClient) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(NAME).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise ValueError(_unreachable(error)) from error
    return {str(alias): str(version) for alias, version in dict(found).items()}


def _unreachable(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"registry {tracking.tracking_uri()}: {first}"


def _ensure_model(client: MlflowClient) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _get_version(client: MlflowClient, version: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(NAME, version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(
                f"{NAME}: got version {version!r}, expected one in {tracking.tracking_uri()}"
            ) from None
        raise ValueError(_unreachable(error)) from error
    tags = found.tags
    return ModelVersion(
        version=str(found.version),
        digest=tags["flowloom.digest"],
        run_id=str(found.run_id),
        turn=tags.get("flowloom.turn") or None,
        expected=tags.get("flowloom.expected") or None,
    )


def _champions(client: MlflowClient) -> list[str]:
    """Champions in the order they came, without those rolled back; the last is the champion."""
    model = client.get_registered_model(NAME)
    champions = json.loads(model.tags.get(_STACK, "[]"))
    now = _aliases(client).get(CHAMPION)
    if now is None:
        return []
    # The alias is the truth: a process may have died between writing the list and the alias.
    while champions and champions[-1] != now:
        champions.pop()
    return champions or [now]


def _write_history(event: str, version: str, previous: str | None, reason: str) -> None:
    row = {"event": event, "version": version, "previous": previous, "reason": reason}
    with (home() / "registry.jsonl").open("a") as file:
        file.write(json.dumps({**row, "at_ms": time.time_ns() // 1_000_000}) + "\n")


def _verdict(decision: Decision) -> str:
    return "is promoted" if decision.promoted else "is refused"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    home().mkdir(parents=True, exist_ok=True)
    with (home() / "registry.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

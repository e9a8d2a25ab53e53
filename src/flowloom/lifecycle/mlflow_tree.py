"""The tree of runs in MLflow: which run is whose, found or made once.

A run is known by its tags, so that an answer that was lost (the server made the run and died) is
made up for by looking again.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from flowloom.lifecycle import spool
from flowloom.lifecycle.spool import Entry, tracking_uri
from flowloom.runs import home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "flowloom"
PARENT = "mlflow.parentRunId"
_MADE = "flowloom.made"
"""Tag of the runs that are made here: a random word, another for each that is asked for."""
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_ADDRESS = re.compile(
    r"https?://|sqlite(\+\w+)?:///|(postgresql|mysql|mssql)(\+\w+)?://|databricks(:|$)"
)
"""What keeps runs and models both; MLflow has given up its folders of files."""


class AddressError(ValueError):
    """What names the tracker is no address of one."""


def connect() -> MlflowClient:
    """A client of the tracker and registry in use; a server that is down is not waited for.

    Raises:
        AddressError: If `MLFLOW_TRACKING_URI` names nothing of the kind.
    """
    uri = tracking_uri()
    if not _ADDRESS.match(uri):
        raise AddressError(
            f"MLFLOW_TRACKING_URI: got {uri!r}, expected a server's address (http://, https://) or "
            "a database's (sqlite:///, postgresql://)"
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Files pass through the server: its store may be out of reach, and what MLflow 3.17 fetches
    # from there by itself it unpacks if it is called .gz.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    from mlflow import MlflowClient

    be_quiet()
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_down(client: MlflowClient, error: Exception) -> bool:
    """Whether it was the tracker that failed, not what was asked of it."""
    from mlflow.exceptions import MlflowException, RestException

    over_http = tracking_uri().startswith("http")
    if over_http and isinstance(error, MlflowException) and not isinstance(error, RestException):
        return True  # no answer, or that of a proxy before it
    try:
        client.search_experiments(max_results=1)
    except Exception:
        # Whatever it throws, nothing else can be asked of it now.
        return True
    return False


def experiment(client: MlflowClient) -> str:
    """Id of the experiment all runs are in, made if needed."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # A server decides itself where artifacts go.
        local = tracking_uri().startswith("sqlite:")
        root = (home() / "mlartifacts").as_uri() if local else None
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=root)
        except MlflowException:
            # Another process made it meanwhile; if not, the next line says what is wrong.
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return found.experiment_id


def given_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run that was handed to this process, or `None` if it was not, or is gone."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in _GONE:
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def is_ours(run: Run) -> bool:
    """Whether the run was made here; else who made it also closes it."""
    return _MADE in run.data.tags


def turn_run(client: MlflowClient, entry: Entry) -> Run:
    """The run of a turn (by its own entry or by that of one of its stages), made if needed."""
    given = given_run(client, entry.parent)
    if entry.stage == spool.TURN and not given:
        # A task of an engine speaks for the turn: the run of the turn is above the task's.
        task = given_run(client, entry.join)
        given = given_run(client, task.data.tags.get(PARENT)) if task else None
    if given:
        return given
    tags = {
        "flowloom.kind": "turn",
        "flowloom.turn": entry.turn or "none",
        "flowloom.scope": spool.scope(entry.turn),
    }
    return _found_or_made(
        client, experiment(client), tags, {}, f"turn {entry.turn}", entry.started_ms
    )


def stage_run(client: MlflowClient, entry: Entry) -> Run:
    """The run of a stage, made if needed: a child of its turn's, if it belongs to one."""
    tags = {
        "flowloom.kind": "stage",
        "flowloom.turn": entry.turn or "none",
        "flowloom.key": Path(entry.dir).name,
        "flowloom.scope": spool.scope(entry.turn),
    }
    name = entry.step or entry.stage
    if not entry.turn and not entry.parent:
        return _found_or_made(client, experiment(client), tags, {}, name, entry.started_ms)
    turn = turn_run(client, entry).info
    above = {PARENT: turn.run_id}
    run = _found_or_made(client, turn.experiment_id, tags, above, name, entry.started_ms)
    if run.data.tags.get(PARENT) != turn.run_id:
        # Two machines made the turn's run at the same time, and the other one's counts.
        client.set_tag(run.info.run_id, PARENT, turn.run_id)
    return run


def _found_or_made(
    client: MlflowClient,
    experiment_id: str,
    tags: dict[str, str],
    more: dict[str, str],
    name: str,
    started_ms: int,
) -> Run:
    """The one run with these tags; if it has to be made, it gets `more` of them."""
    run = _first(_find(client, experiment_id, tags))
    if run:
        return run
    made = {**tags, **more, _MADE: secrets.token_hex(8)}
    client.create_run(experiment_id, started_ms, made, name)
    # The client may have asked twice, and another machine at the same time: the first one counts.
    found = _find(client, experiment_id, tags)
    run = _first(found)
    assert run is not None
    for other in found:
        mine = other.data.tags.get(_MADE) == made[_MADE]
        if mine and other.info.run_id != run.info.run_id:
            client.delete_run(other.info.run_id)
    return run


def _find(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> list[Run]:
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items() if value)
    found = client.search_runs([experiment_id], query)
    # A tag that is to be empty cannot be asked for.
    return [run for run in found if all(run.data.tags.get(k, "") == v for k, v in tags.items())]


def _first(found: list[Run]) -> Run | None:
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def be_quiet() -> None:
    """Keep what MLflow and its database library say of themselves out of the logs."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

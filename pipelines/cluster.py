"""Runs and schedules of a pipeline on a Kubeflow Pipelines server, each made once.

What is asked for has a digest, kept in the description of what it made: the same again finds that.
Without such a description a run or a schedule is somebody else's, and is left alone.
"""

import contextlib
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from pipelines.server import NoAnswerError, Server, ServerError, predicate

POLL_S = 5.0
"""Seconds between two looks at a run."""
OUTAGE_S = 600.0
"""Seconds that a server may be away while its run is waited for."""

INTERRUPTED = 130
"""Exit status of a command that was interrupted at the keyboard."""
FAILED = ("FAILED", "CANCELED")
ENDED = ("SUCCEEDED", "SKIPPED", *FAILED)
RUN_MARK = re.compile(r"flowloom run ([0-9a-f]{16})\b")
SCHEDULE_MARK = re.compile(r"flowloom schedule ([0-9a-f]{16})\b")

SOURCES = ("data", "catalogue")
"""Of a job's key: the digest of `data/`, and the hash of the catalogue of model files."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run on the server."""

    pipeline: str
    """The pipeline's name there."""
    package: bytes
    """The compiled YAML."""
    label: str
    """Pipeline and recipe: the start of a run's name, the name of the schedule."""
    key: Mapping[str, Any]
    """What decides whether a run is the same: recipe, overrides, data, code."""
    experiment: str = "flowloom"
    """Where runs and schedules are listed together."""
    service_account: Optional[str] = None
    """What its pods run as; None for the server's default."""
    time_zone: str = "UTC"
    """Of a schedule's cron; the server's controller must have the same."""

    @property
    def version(self) -> str:
        """Name of the pipeline's version: the digest of its YAML and of what its images hold."""
        return hashlib.sha256(self.package + self.sources.encode()).hexdigest()[:16]

    @property
    def sources(self) -> str:
        """What the version says of itself, for `pipelines.changes` to read."""
        return ", ".join(f"{name} {self.key[name] or 'untracked'}" for name in SOURCES)


def digest(fields: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of what the fields hold."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def experiment_id(server: Server, name: str, create: bool = True) -> Optional[str]:
    """Id of the experiment, which is created if it is not there; None if it should not be."""
    api = server.client.experiments
    space = {"namespace": server.namespace} if server.namespace else {}

    def find() -> Any:
        given = {"filter": predicate("display_name", name), **space}
        call = api.experiment_service_list_experiments
        found = server.listed("listing experiments", call, "experiments", **given)
        return found[0] if found else None

    found = find()
    if found is None:
        if not create:
            return None
        body = server.client.api_models.V2beta1Experiment(display_name=name, **space)
        call = api.experiment_service_create_experiment
        found = server.create(f"creating experiment {name}", find, call, experiment=body)
    if found.storage_state == "ARCHIVED":
        raise ServerError(f"experiment {name}: is archived; restore it, or name another")
    return ident_of(server, found.experiment_id)


def find_pipeline(server: Server, job: Job) -> Any:
    """The job's pipeline on the server; None if it is not there."""
    space = {"namespace": server.namespace} if server.namespace else {}
    given = {"filter": predicate("display_name", job.pipeline), **space}
    call = server.client.pipelines.pipeline_service_list_pipelines
    found = server.listed("listing pipelines", call, "pipelines", **given)
    return found[0] if found else None


def version_ids(server: Server, job: Job) -> tuple[str, str]:
    """Ids of the pipeline and of its version; what is not there is uploaded."""
    models = server.client.api_models
    api, uploads = server.client.pipelines, server.client.pipeline_uploads

    def pipeline() -> Any:
        return find_pipeline(server, job)

    there = pipeline()
    if there is None:
        # Created empty: an upload would name its first version after the pipeline.
        space = {"namespace": server.namespace} if server.namespace else {}
        body = models.V2beta1Pipeline(name=job.pipeline, display_name=job.pipeline, **space)
        call = api.pipeline_service_create_pipeline
        there = server.create(f"creating pipeline {job.pipeline}", pipeline, call, pipeline=body)
    ident = ident_of(server, there.pipeline_id)

    def version() -> Any:
        given = {"filter": predicate("display_name", job.version)}
        call = api.pipeline_service_list_pipeline_versions
        found = server.listed("listing versions", call, "pipeline_versions", ident, **given)
        return found[0] if found else None

    there = version()
    if there is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{job.pipeline}.yaml"
            path.write_bytes(job.package)
            what, call = f"uploading version {job.version}", uploads.upload_pipeline_version
            given = {"name": job.version, "display_name": job.version, "pipelineid": ident}
            given["description"] = job.sources
            there = server.create(what, version, call, str(path), **given)
    return ident, ident_of(server, there.pipeline_version_id)


def submit(
    server: Server,
    job: Job,
    arguments: Callable[[], Mapping[str, Any]],
    say: Say,
    *,
    name: Optional[str] = None,
    new: bool = False,
) -> Any:
    """The run of this job: the one that is there, unless it failed or another is asked for.

    Args:
        server: Where.
        job: What.
        arguments: Gives the pipeline's arguments; asked only if a run is started.
        say: Prints a line.
        name: The run's name; else made of the label and the digest.
        new: Start another run, whatever there is.

    Raises:
        ServerError: If the server refuses, or if another job's run has that name.
    """
    wanted = digest({**job.key, "version": job.version})
    name = name or f"{job.label}-{wanted[:12]}"
    experiment = experiment_id(server, job.experiment)
    attempts = _attempts(server, experiment, name)
    last = attempts[max(attempts)] if attempts else None
    if last is not None and not new:
        if mark_of(RUN_MARK, last) != wanted:
            raise ServerError(
                f"run {last.display_name}: is there with other arguments, data or code; expected "
                "another --run-name, or --new-turn"
            )
        if last.state not in FAILED:
            say(f"run {last.display_name}: there already, {last.state or 'PENDING'}")
            return last
        say(f"run {last.display_name}: {last.state}; another attempt follows")
    number = max(attempts, default=0) + 1
    name = name if number == 1 else f"{name}-{number}"
    pipeline, version = version_ids(server, job)
    models = server.client.api_models
    body = models.V2beta1Run(
        experiment_id=experiment,
        display_name=name,
        description=f"flowloom run {wanted}: {_words(job.key)}",
        pipeline_version_reference=models.V2beta1PipelineVersionReference(
            pipeline_id=pipeline, pipeline_version_id=version
        ),
        runtime_config=models.V2beta1RuntimeConfig(parameters=dict(arguments())),
        service_account=job.service_account,
    )

    def find() -> Any:
        found = _attempts(server, experiment, name).get(1)
        return found if found is not None and mark_of(RUN_MARK, found) == wanted else None

    call = server.client.runs.run_service_create_run
    made = server.create(f"starting run {name}", find, call, run=body)
    ident_of(server, made.run_id)
    say(f"run {name}: started")
    return made


def _attempts(server: Server, experiment: Optional[str], name: str) -> dict[int, Any]:
    """Runs of that name by attempt: `name`, `name-2`, and so on; archived ones do not count."""
    given = {"experiment_id": experiment, "filter": predicate("display_name", name, "IS_SUBSTRING")}
    call = server.client.runs.run_service_list_runs
    found = {}
    for run in server.listed("listing runs", call, "runs", **given):
        matched = re.fullmatch(re.escape(name) + r"(?:-([1-9]\d*))?", run.display_name or "")
        if matched and run.storage_state != "ARCHIVED":
            found.setdefault(int(matched[1] or 1), run)
    return found


def wait(server: Server, run: Any, say: Say, timeout_s: float) -> Any:
    """The run when it has ended; says each change of its state.

    Raises:
        ServerError: If it has not ended after `timeout_s`, or if the server is away for long.
    """
    begun_s = answered_s = time.monotonic()
    shown = run.state
    while True:
        now_s = time.monotonic()
        try:
            call = server.client.runs.run_service_get_run
            run = server.ask(f"asking for run {run.display_name}", call, run.run_id)
        except NoAnswerError:
            if now_s - answered_s > OUTAGE_S:
                raise
        else:
            answered_s = now_s
            if run.state and run.state != shown:
                say(f"run {run.display_name}: {run.state} after {now_s - begun_s:.0f} s")
                shown = run.state
            if run.state in ENDED:
                return run
        if now_s - begun_s > timeout_s:
            raise ServerError(
                f"run {run.display_name}: {run.state or 'PENDING'} after {timeout_s:g} s of "
                "waiting; it goes on, and the same command waits again"
            )
        time.sleep(POLL_S)


def failures(run: Any) -> list[str]:
    """Tasks that failed of themselves, each with its error: not those they made fail."""
    tasks = (run.run_details and run.run_details.task_details) or []
    failed = {task.task_id: task for task in tasks if task.state == "FAILED"}
    pods = {task.pod_name: task.task_id for task in tasks if task.pod_name}
    parents = {task.task_id: task.parent_task_id for task in tasks if task.parent_task_id}
    for task in tasks:
        for child in task.child_tasks or []:
            parents.setdefault(child.task_id or pods.get(child.pod_name), task.task_id)
    causes = {parents[ident] for ident in failed if ident in parents}
    lines = []
    for ident, task in failed.items():
        if ident in causes:
            continue
        path = [task.display_name]
        while (ident := parents.get(ident)) in failed and ident in parents:
            path.insert(0, failed[ident].display_name)
        message = task.error and task.error.message
        lines.append("/".join(path) + (f": {' '.join(message.split())}" if message else ""))
    return lines


@contextlib.contextmanager
def interruptible(run: Any, say: Say) -> Iterator[None]:
    """Say, when waiting is interrupted at the keyboard, that the run is not."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"run {run.display_name}: goes on; the same command waits again")
        raise SystemExit(INTERRUPTED) from None


def mark_of(pattern: re.Pattern, thing: Any) -> Optional[str]:
    """The digest in the description of a run or a schedule; None if it is not of this command."""
    matched = pattern.match(thing.description or "")
    return matched[1] if matched else None


def ident_of(server: Server, ident: Optional[str]) -> str:
    """The id that an answer gives.

    Raises:
        ServerError: If it gives none, as the page of a gateway does.
    """
    if not ident:
        raise ServerError(
            f"server {server.host}: its answer has no id; expected a Kubeflow Pipelines server "
            "with API v2beta1, and no page to sign in"
        )
    return ident


def _words(key: Mapping[str, Any]) -> str:
    overrides = json.dumps(key["overrides"], sort_keys=True)
    return f"recipe {key['recipe']}, overrides {overrides}, code {key['code'][:12]}"

"""Whether data or catalogue are others than the newest run's: a turn can then start early.

A run, by hand or by a schedule, is one of a version of the pipeline, and that says what it is for.
"""

import re
from typing import Any

from pipelines.cluster import SOURCES, Job, experiment_id, find_pipeline
from pipelines.server import Server


def changed(server: Server, job: Job, names: list[str]) -> dict[str, str]:
    """Those of `names` in which the job differs from the newest run like it, and that run's value.

    A run is like it that is of the same pipeline, recipe and overrides, whatever its outcome: one
    that failed is not tried again by this. Without such a run, all of them differ, from `none`.

    Args:
        server: Where.
        job: What would be run now.
        names: Of `SOURCES`.
    """
    before, now = _said(_newest(server, job)), _said(job.sources)
    return {name: before.get(name, "none") for name in names if before.get(name) != now[name]}


def names_in(text: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        ValueError: If one of them is not of `SOURCES`.
    """
    names = text.split(",")
    for name in names:
        if name not in SOURCES:
            raise ValueError(f"--if-changed: got {name!r}, expected some of {','.join(SOURCES)}")
    return names


def _newest(server: Server, job: Job) -> str:
    """What the version of the newest run says; empty if there is no run."""
    experiment = experiment_id(server, job.experiment, create=False)
    pipeline = find_pipeline(server, job)
    if experiment is None or pipeline is None:
        return ""
    call = server.client.pipelines.pipeline_service_list_pipeline_versions
    listed = server.listed("listing versions", call, "pipeline_versions", pipeline.pipeline_id)
    versions = {version.pipeline_version_id: version.description or "" for version in listed}
    call = server.client.runs.run_service_list_runs
    runs = server.listed("listing runs", call, "runs", experiment_id=experiment)
    found = []
    for run in runs:
        reference = run.pipeline_version_reference
        of = reference and reference.pipeline_version_id
        if of in versions and _asks_for_the_same(run, job):
            found.append((str(run.created_at), versions[of]))
    return max(found)[1] if found else ""


def _asks_for_the_same(run: Any, job: Job) -> bool:
    parameters = (run.runtime_config and run.runtime_config.parameters) or {}
    return all(parameters.get(name) == job.key[name] for name in ("recipe", "overrides"))


def _said(text: str) -> dict[str, str]:
    """The values of `SOURCES` in what a version says."""
    return dict(re.findall(r"(\w+) ([^\s,]+)", text))

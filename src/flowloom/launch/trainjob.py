"""A stage as a TrainJob of Kubeflow Trainer, on the runtimes `flowloom-torch-cpu` and `-gpu`.

The job is named by the run, so the same call finds the job of a step that died and takes it over.
Its pods read the request in the shared home folder and leave result and checkpoints there: a job
that the cluster disrupted is made again and goes on from them; one that failed is not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flowloom.launch import Launcher, followed
from flowloom.launch.api import GONE, TRAIN_JOBS, Api, ApiError, connect
from flowloom.launch.api import PODS as POD_KIND
from flowloom.launch.errors import LaunchError, interruptible
from flowloom.launch.pods import JOB_LABEL, Pods
from flowloom.launch.torchrun import failed
from flowloom.runs import Run, home

OURS = {"app.kubernetes.io/part-of": "flowloom"}
ATTEMPT = "flowloom/attempt"
"""Annotation: how often the job was made, a disruption each time but the first."""
MAX_ATTEMPTS = 10
GPU = "nvidia.com/gpu"
DEADLINE_S = 3 * 24 * 3600
"""A job is ended then, whatever becomes of who waits for it; another goes on from there."""
PASSED_ON = ("FLOWLOOM_CODE_DIGEST", "FLOWLOOM_STEP", "FLOWLOOM_TURN", "MLFLOW_RUN_ID")
"""Of the step's environment, for the pods; secrets come from the runtime."""

OUTAGE_S = 600.0
"""The API may be away for so long."""
WATCH_S = 10
"""Seconds between two looks at the job while its pods do nothing new."""
PAUSE_S = 1.0
"""Before a call is made again; doubled each time, up to 30."""
STUCK_S = 900.0
"""A container may wait for so long for what it will hardly get, such as its image."""
REMOVAL_S = 600.0
"""A job's pods may take so long to go."""
INTERRUPT_S = 20.0
"""To delete the job after an interrupt, before somebody loses patience."""

R = TypeVar("R")


def run(run: Run, request: Path, way: Launcher) -> None:
    """Carry out a request by a job, new or found; show the log of its first process.

    An interrupt deletes the job.

    Raises:
        LaunchError: It failed, was deleted by somebody else, was disrupted too often, or the API
            stayed away.
        ApiError: The API refused a call.
    """
    job = Job(connect(), run)
    with interruptible():
        try:
            job.carry_out(request, way)
        except (KeyboardInterrupt, SystemExit):
            job.remove_soon(INTERRUPT_S)
            raise


def body(run: Run, request: Path, way: Launcher, attempt: int = 1) -> dict[str, Any]:
    """The TrainJob of a run."""
    env = {"FLOWLOOM_HOME": str(home()), followed.VARIABLE: str(followed.path_of(run.dir))}
    env |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    trainer: dict[str, Any] = {
        "command": ["python", "-m", "flowloom.launch", str(request)],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "numNodes": way.num_nodes,
        "numProcPerNode": way.num_processes,
    }
    if way.device == "gpu":
        # The trainer merges it into what the runtime asks for.
        gpus = {GPU: str(way.num_processes)}
        trainer["resourcesPerNode"] = {"limits": gpus, "requests": gpus}
    return {
        "apiVersion": f"{TRAIN_JOBS.group}/{TRAIN_JOBS.version}",
        "kind": "TrainJob",
        "metadata": {
            "name": name_of(run),
            "labels": {**OURS, "flowloom/stage": run.stage, "flowloom/run": run.dir.name},
            "annotations": {ATTEMPT: str(attempt)},
        },
        "spec": {
            "runtimeRef": {"name": f"flowloom-torch-{way.device}"},
            "trainer": trainer,
            "activeDeadlineSeconds": DEADLINE_S,
        },
    }


def name_of(run: Run) -> str:
    """The job's name: that of the run."""
    return f"flowloom-{run.stage.replace('_', '-')}-{run.dir.name}"


class Job:
    """The job of a run."""

    def __init__(self, api: Api, run: Run):
        """Know its name; nothing is asked yet."""
        self._api, self._run = api, run
        self._name = name_of(run)
        self._where = f"TrainJob {api.namespace}/{self._name}"

    def carry_out(self, request: Path, way: Launcher) -> None:
        """Find the job or make it, follow it to its end, and again if it was disrupted."""
        job = self._found()
        while True:
            if job is None:
                job = self._make(body(self._run, request, way))
            pods = Pods(self._api)
            try:
                end = self._follow(job, pods)
            finally:
                pods.close()
            pods.wait()
            if end is None or end["type"] == "Complete":
                self._wait_for_result()
            if self._run.done:
                self.remove_soon(INTERRUPT_S)
                return
            if end is None:
                raise LaunchError(f"{self._run.stage}: {self._where} was deleted by somebody else")
            if end["type"] == "Complete":
                raise LaunchError(
                    f"{self._run.stage}: {self._where} is complete, but {self._run.dir} holds no "
                    "result: its pods have another home folder"
                )
            attempt = _attempt(job)
            if not pods.disrupted:
                text, lines = pods.failure()
                said = f"{end.get('reason')}: {end.get('message')}"
                otherwise = "; ".join(filter(None, (said, text)))
                raise failed(f"{self._run.stage}: {self._where}", lines, otherwise)
            if attempt == MAX_ATTEMPTS:
                raise LaunchError(
                    f"{self._run.stage}: {self._where} was disrupted {attempt} times; the same "
                    "step, run again, goes on from its checkpoints"
                )
            self._say(f"{self._where} was disrupted ({attempt} of {MAX_ATTEMPTS - 1}): made again")
            self._remove(job)
            job = self._make(body(self._run, request, way, attempt + 1))

    def remove_soon(self, for_s: float) -> None:
        """Delete the job, or say that it is still there."""
        until_s = time.monotonic() + for_s
        while True:
            try:
                self._api.delete(TRAIN_JOBS, self._name)
                return
            except ApiError as error:
                if not error.passes or time.monotonic() > until_s:
                    by_hand = f"kubectl delete trainjob {self._name} -n {self._api.namespace}"
                    self._say(f"{self._where} could not be deleted ({error}): `{by_hand}`")
                    return
            time.sleep(PAUSE_S)

    def _found(self) -> dict[str, Any] | None:
        """The job of an earlier call that died, if it still goes; one that has ended is removed."""
        job = self._get()
        if job is None:
            return None
        if _end(job) or job["metadata"].get("deletionTimestamp"):
            self._remove(job)
            return None
        self._say(f"{self._where} goes already: taken over")
        return job

    def _make(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        try:
            made = self._patiently(self._api.create, TRAIN_JOBS, wanted)
        except ApiError as error:
            # Another step's, or this one's whose answer was lost.
            job = self._get() if error.status == 409 else None
            if job is None:
                raise
            return job
        self._say(f"{self._where} made")
        return made

    def _get(self) -> dict[str, Any] | None:
        job = self._patiently(self._api.get, TRAIN_JOBS, self._name)
        if job is not None and not OURS.items() <= job["metadata"].get("labels", {}).items():
            raise LaunchError(f"{self._run.stage}: {self._where} is not flowloom's; remove it")
        return job

    def _follow(self, job: Mapping[str, Any], pods: Pods) -> dict[str, Any] | None:
        """The condition that ends the job, or `None` if it is there no more."""
        selector = f"{JOB_LABEL}={self._name}"
        said, stuck_s = "", None
        while True:
            followed.path_of(self._run.dir).touch()
            # In this order: pods are seen as they were once the job had ended.
            now = self._get()
            listed = self._patiently(self._api.list, POD_KIND, selector)
            if now is None or now["metadata"]["uid"] != job["metadata"]["uid"]:
                return None
            for pod in listed["items"]:
                pods.see(pod)
            end = _end(now)
            if end:
                return end
            why, hopeless = pods.waits()
            if why and why != said:
                self._say(f"waits: {why}")
            said = why
            stuck_s = (stuck_s or time.monotonic()) if hopeless else None
            if stuck_s and time.monotonic() - stuck_s > STUCK_S:
                self.remove_soon(INTERRUPT_S)
                raise LaunchError(f"{self._run.stage}: {self._where}: {why}")
            self._watch(selector, listed["metadata"]["resourceVersion"], pods)

    def _watch(self, selector: str, since: str, pods: Pods) -> None:
        """Take in what happens to pods, until one ends or for some seconds."""
        try:
            for kind, pod in self._api.watch(POD_KIND, selector, since, WATCH_S):
                if pods.see(pod) or kind == "DELETED":
                    return
        except ApiError as error:
            # Too long ago, or cut: the caller lists again, and waits if the API is away.
            if error.status != GONE and not error.passes:
                raise
            time.sleep(PAUSE_S)

    def _remove(self, job: Mapping[str, Any]) -> None:
        """Delete the job and wait until it and its pods are gone: two would write one run."""
        self._patiently(self._api.delete, TRAIN_JOBS, self._name)
        until_s = time.monotonic() + REMOVAL_S
        while time.monotonic() < until_s:
            now = self._get()
            if now is None or now["metadata"]["uid"] != job["metadata"]["uid"]:
                return
            time.sleep(PAUSE_S)
        raise LaunchError(f"{self._run.stage}: {self._where} is not gone {REMOVAL_S:.0f} s later")

    def _wait_for_result(self) -> None:
        """Give a shared file system the time that it needs to show what another machine wrote."""
        until_s = time.monotonic() + 60 * PAUSE_S
        while not self._run.done and time.monotonic() < until_s:
            time.sleep(PAUSE_S)

    def _patiently(self, call: Callable[..., R], *args: Any) -> R:
        """Make a call again while the API is away."""
        began_s, pause_s = time.monotonic(), PAUSE_S
        while True:
            try:
                return call(*args)
            except ApiError as error:
                if not error.passes:
                    raise
                away_s = time.monotonic() - began_s
                if away_s > OUTAGE_S:
                    raise LaunchError(
                        f"{self._run.stage}: the API has been away for {away_s:.0f} s ({error}); "
                        f"{self._where} may still run: the same step, run again, takes it over"
                    ) from error
                self._say(f"{error}; again in {pause_s:.0f} s")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 30.0)

    def _say(self, text: str) -> None:
        print(f"[{self._run.stage}] {text}", file=sys.stderr, flush=True)


def _end(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """The condition that says that a job has ended."""
    for each in job.get("status", {}).get("conditions") or []:
        if each["type"] in ("Complete", "Failed") and each["status"] == "True":
            return each
    return None


def _attempt(job: Mapping[str, Any]) -> int:
    return int(job["metadata"].get("annotations", {}).get(ATTEMPT, 1))

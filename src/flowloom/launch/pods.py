"""What the pods of a job say: which runs, waits, was disrupted or failed, and their logs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from flowloom.launch.api import Api, ApiError
from flowloom.launch.errors import NUM_LINES
from flowloom.launch.torchrun import REPORT

JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
_RESTART_LABEL = "jobset.sigs.k8s.io/restart-attempt"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
DISRUPTED = "DisruptionTarget"
"""Condition of a pod that the cluster ended: preempted, evicted, drained, its node lost."""
HOPELESS = (
    "CreateContainerConfigError", "CreateContainerError", "ErrImageNeverPull", "ErrImagePull",
    "ImagePullBackOff", "InvalidImageName", "RunContainerError",
)  # fmt: skip
"""Why a container waits where waiting seldom helps."""
_AGAIN_S = 1.0
_LAST_READS = 10
"""Of the log of a pod that has ended, where the API does not answer."""


class Pods:
    """The pods of one job, as last seen."""

    def __init__(self, api: Api):
        """Start with none."""
        self._api = api
        self._seen: dict[str, dict[str, Any]] = {}
        self._logs: dict[str, Log] = {}

    def see(self, pod: dict[str, Any]) -> bool:
        """Take note of a pod; show the log of the first machine's once there is one.

        Returns:
            Whether it has ended, so that it is worth asking how the job does.
        """
        uid, phase = pod["metadata"]["uid"], pod.setdefault("status", {}).get("phase")
        self._seen[uid] = pod
        ended = phase in ("Succeeded", "Failed")
        first = pod["metadata"].get("labels", {}).get(_INDEX_LABEL) == "0"
        if first and uid not in self._logs and (ended or phase == "Running"):
            self._logs[uid] = Log(self._api, pod["metadata"]["name"])
        if ended and uid in self._logs:
            self._logs[uid].pod_ended.set()
        return ended

    @property
    def disrupted(self) -> bool:
        """Whether the cluster took a pod of the latest attempt away."""
        return any(
            pod["status"].get("reason") in ("Evicted", "NodeLost", "Preempting", "Shutdown")
            or any(
                each["type"] == DISRUPTED and each["status"] == "True"
                for each in pod["status"].get("conditions") or []
            )
            for pod in self._latest()
        )

    def waits(self) -> tuple[str, bool]:
        """Why pods do not run, in words, or nothing; and whether time will hardly help."""
        for pod in self._latest():
            name, status = pod["metadata"]["name"], pod["status"]
            for container in status.get("containerStatuses") or []:
                state = container.get("state", {}).get("waiting") or {}
                if state.get("reason") in HOPELESS:
                    return f"pod {name}: {state['reason']}: {state.get('message', '')}", True
            for each in status.get("conditions") or []:
                if (each["type"], each["status"]) == ("PodScheduled", "False"):
                    return f"pod {name}: {each.get('reason')}: {each.get('message')}", False
        return ("" if self._latest() else "no pod yet"), False

    def failure(self) -> tuple[str, list[str]]:
        """The pod that failed first, in words, and the last lines of its log; else nothing."""
        found: list[tuple[str, str, list[str]]] = []
        for pod in self._latest():
            for container in pod["status"].get("containerStatuses") or []:
                end = container.get("state", {}).get("terminated") or {}
                if end.get("exitCode"):
                    name, lines = pod["metadata"]["name"], self._tail(pod["metadata"]["name"])
                    reports = [match[2] for line in lines if (match := REPORT.search(line))]
                    # Seconds are too coarse: what one failure does to its peers takes less.
                    at = reports[-1] if reports else end.get("finishedAt") or ""
                    text = f"pod {name}: {end.get('reason')}, exit code {end['exitCode']}"
                    found.append((at, text, lines))
        _, text, lines = min(found, default=("", "", []))
        return text, lines

    def close(self) -> None:
        """Begin nothing more: what a log holds now is read, and no more waited for."""
        for log in self._logs.values():
            log.pod_ended.set()

    def wait(self) -> None:
        """Until logs are shown to their ends."""
        for log in self._logs.values():
            log.thread.join(_LAST_READS * _AGAIN_S)

    def _latest(self) -> list[dict[str, Any]]:
        """Pods of the job's latest attempt: the runtime may have it start all of them anew."""
        last = max(map(_restart, self._seen.values()), default=0)
        return [pod for pod in self._seen.values() if _restart(pod) == last]

    def _tail(self, pod: str) -> list[str]:
        try:
            lines = list(self._api.logs(pod, tail=NUM_LINES + 1))
        except ApiError as error:
            # Gone with its node: then there is no more to say than how it ended.
            return [str(error)]
        return [line.partition(" ")[2] for line in lines]


class Log:
    """A pod's log, shown on standard error as it grows, each line once."""

    def __init__(self, api: Api, pod: str):
        """Begin to show it."""
        self._api, self._pod = api, pod
        self._shown = ""
        self.pod_ended = threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)
        self.thread.start()

    def _show(self) -> None:
        left = _LAST_READS
        while left:
            ended = self.pod_ended.is_set()
            left -= ended
            try:
                self._read()
                if ended:
                    return
            except ApiError as error:
                early = error.status == 400 and not ended
                if not error.passes and not early:
                    print(f"[launch] log of {self._pod}: {error}", file=sys.stderr, flush=True)
                    return
            (time.sleep if ended else self.pod_ended.wait)(_AGAIN_S)

    def _read(self) -> None:
        before = self._shown
        for line in self._api.logs(self._pod, follow=True):
            at, _, text = line.partition(" ")
            stamp = _padded(at)
            if stamp > before:
                print(text, file=sys.stderr, flush=True)
                self._shown = stamp


def _restart(pod: Mapping[str, Any]) -> int:
    return int(pod["metadata"].get("labels", {}).get(_RESTART_LABEL, 0))


def _padded(at: str) -> str:
    """A time whose order is that of its text: fractions come with as many digits as they need."""
    seconds, _, fraction = at.rstrip("Z").partition(".")
    return f"{seconds}.{fraction.ljust(9, '0')}"

"""A stage in several processes of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

from flowloom.launch.errors import NUM_LINES, LaunchError, interruptible

GRACE_S = 30.0
"""To the processes, from being told to end to being ended."""
REPORT = re.compile(r"\[launch\] (rank \d+ of \d+ failed) at (\S+), (exit code -?\d+)")
"""What `python -m flowloom.launch` says before a failed process's last lines."""


def run(stage: str, request: Path, num_processes: int) -> None:
    """Carry out a request by `num_processes` processes, which show what they do on standard error.

    An interrupt ends them all.

    Raises:
        LaunchError: One of them failed.
    """
    env = {
        **os.environ,
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": str(num_processes),
        # Any free port: several groups may run side by side.
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "localhost:0",
    }
    command = [sys.executable, "-m", "flowloom.launch", str(request)]
    last: deque[str] = deque(maxlen=NUM_LINES + 1)
    # A session of its own: an interrupt at the keyboard comes to this process alone, which then
    # ends the others in order.
    with interruptible(), subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", file=sys.stderr, flush=True)
                last.append(line.rstrip("\n"))
            status = child.wait()
        finally:
            _end(child)
    if status:
        raise failed(stage, list(last), f"launcher ended with exit code {status}")


def failed(stage: str, lines: list[str], otherwise: str) -> LaunchError:
    """The error that the end of a log tells: the failed rank and its lines, else `otherwise`."""
    for k in reversed(range(len(lines))):
        found = REPORT.search(lines[k])
        if found:
            tail = [line.strip("\r") for line in lines[k + 1 :]]
            return LaunchError(f"{stage}: {found[1]}, {found[3]}", tail)
    return LaunchError(f"{stage}: {otherwise}", lines)


def _end(child: subprocess.Popen[str]) -> None:
    """End the processes if they still go, first by asking."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        # The processes that it started see that it is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

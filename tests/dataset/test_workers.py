"""Pins: results come in the order of tasks; an error of a task is the caller's; a worker that dies
is named; workers end when the parent is killed."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowloom.dataset.workers import run_tasks


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_tasks(processes):
    assert run_tasks(pow, [(2, k) for k in range(7)], processes) == [2**k for k in range(7)]
    assert run_tasks(pow, [], processes) == []


def test_errors_are_the_callers():
    with pytest.raises(ValueError, match="invalid literal"):
        run_tasks(int, [("1",), ("x",), ("2",)], 2)
    with pytest.raises(RuntimeError, match=r"worker died \(exit status 3\)"):
        run_tasks(os._exit, [(3,), (3,)], 2)


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "task.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / f'{os.getpid()}.pid').touch()\n"
        "time.sleep(120)\n"
    )
    task = f"[({str(script)!r},)] * 2"
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import runpy; from flowloom.dataset.workers import run_tasks; "
            f"run_tasks(runpy.run_path, {task}, 2)",
        ]
    )
    pids = _until(lambda: [int(p.stem) for p in tmp_path.glob("*.pid")], lambda p: len(p) == 2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _until(lambda: [pid for pid in pids if _runs(pid)], lambda left: not left) == []


def _until(look, enough, seconds=30.0):
    end = time.monotonic() + seconds
    while True:
        found = look()
        if enough(found) or time.monotonic() > end:
            return found
        time.sleep(0.02)


def _runs(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_workers_that_are_done_end_quietly():
    """The result is read, the worker is on its way out, and the parent's end is still open."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "flowloom.dataset.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    pickle.dump((pow, [(2, 3)]), worker.stdin)
    worker.stdin.flush()
    assert pickle.load(worker.stdout) == 8
    assert worker.wait(30) == 0
    assert worker.stderr.read() == b""
    worker.communicate()

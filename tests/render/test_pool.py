"""Pins: results come in job order and are the same bytes for any number of processes; a worker's
error names its job; a killed worker is an error; no worker outlives a parent that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowloom.render.engine import RenderJob
from flowloom.render.pool import RenderPool, render_many
from tests.render.tiny import CHECKPOINTS, flow, write_world

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def make_jobs(count):
    workflows = [flow(), flow(CHECKPOINTS[1], steps=2), flow(lora=(1.0, 1.0))]
    return [RenderJob(workflows[k % 3].fill(PROMPT, seed=k), f"job-{k}") for k in range(count)]


def test_processes_change_nothing_and_errors_surface(world):
    jobs = make_jobs(20)
    chunks = [jobs[first : first + 4] for first in range(0, 20, 4)]
    one = [r for chunk in RenderPool(world, 1).map(chunks) for r in chunk]
    with RenderPool(world, 2) as pool:
        two = [r for chunk in pool.map(chunks) for r in chunk]
        assert [r.image.tobytes() for r in two] == [r.image.tobytes() for r in one]
        assert [r.flops for r in two] == [r.flops for r in one]

        broken = RenderJob(flow("nothing.safetensors").fill(PROMPT), "the-bad-one")
        with pytest.raises(ValueError, match="job the-bad-one: node 1"):
            list(pool.map([jobs[:2], [broken]]))
        with pytest.raises(RuntimeError, match=r"(?s)jobs not-a-workflow to .*AttributeError"):
            list(pool.map([[RenderJob(None, "not-a-workflow")]]))
        with pytest.raises(Exception, match="pickle"):
            list(pool.map([[RenderJob(lambda: 0, "does-not-travel")]]))
        # The pool lives on.
        assert next(iter(pool.map([jobs[:4]])))[0].flops == one[0].flops

        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"render worker died .* on jobs job-0 to job-3"):
            list(pool.map(chunks))


def test_render_many_splits_into_fixed_chunks(world):
    jobs = make_jobs(7)
    results = render_many(jobs, world, num_processes=1, chunk_size=3)
    again = render_many(jobs, world, num_processes=1, chunk_size=3)
    assert [r.image.tobytes() for r in results] == [r.image.tobytes() for r in again]
    assert render_many([], world) == []


PARENT = """
import sys
from pathlib import Path
from flowloom.render.pool import RenderPool
from tests.render.test_pool import make_jobs
pool = RenderPool(Path(sys.argv[1]), 2)
print(*[w.process.pid for w in pool._workers], flush=True)
for _ in pool.map([make_jobs(4)] * 100000):
    print("chunk", flush=True)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_with_a_killed_parent(world):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(world)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.stdout.readline() == "chunk\n"
    assert all(alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)

"""Facts: the step that follows a job shows so again and again; a pod goes on as long as it does,
whatever the clocks say, and ends as by SIGTERM, with a word why, once it does no more."""

import os
import signal
import time

from flowloom.launch import followed
from flowloom.runs import home
from tests.launch.scripts import RUNNING, carry_out, ended, process, start

LEFT_S = 3.0


def test_a_step_that_follows_shows_so(cluster):
    seen = set()

    def script(server, job):
        server.pod(job, 0, **RUNNING)
        until_s = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < until_s:
            seen.update(path.stat().st_mtime_ns for path in home().glob("runs/*/*/followed"))
            time.sleep(0.02)
        carry_out(job)
        server.pod(job, 0, **ended(0))
        server.end(job, "Complete")

    cluster(script)
    assert start().metrics == {"rehearse/total": 0.75}
    assert len(seen) == 3


def test_a_pod_ends_once_it_is_left(tmp_path):
    path = followed.path_of(tmp_path)
    code = (
        "import time; from pathlib import Path; from flowloom.launch import followed\n"
        f"followed.end_when_left(Path({str(path)!r}), {LEFT_S}, 0.05); time.sleep(60)"
    )
    with process(code) as pod:
        until_s = time.monotonic() + 2 * LEFT_S
        hour_ago_s = time.time() - 3600
        while time.monotonic() < until_s:
            path.touch()
            hour_ago_s += 1
            os.utime(path, (hour_ago_s, hour_ago_s))
            assert pod.poll() is None
            time.sleep(0.1)
        _, said = pod.communicate(timeout=30)
    assert pod.returncode == -signal.SIGTERM
    assert said == "[launch] no step has followed this job for 3 s: it ends\n"

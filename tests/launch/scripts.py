"""What a cluster does with a job, played by a test, and how a test starts one."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from flowloom import launch
from flowloom.launch import request
from tests.launch.rehearsal import RehearsalConfig

RUNNING = {"phase": "Running"}
DISRUPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
REPORT = "[launch] rank {} of 4 failed at 2026-01-01T00:00:{}+00:00, exit code 1; its last lines:"


def start(**changes):
    return launch.run("rehearse", RehearsalConfig(**changes), {}, "trainjob:2x2")


@contextmanager
def process(code):
    """A Python process that takes interrupts, even where this one was started in the background."""
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", heeds + code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def num_made(server):
    return sum(line.startswith("POST") for line in server.asked)


def carry_out(job):
    """What the first process of a job's pods does."""
    request.read(Path(job["spec"]["trainer"]["command"][-1])).run()


def ended(code, at="2026-01-01T00:00:00Z", reason="Error"):
    end = {"exitCode": code, "reason": reason, "finishedAt": at}
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "containerStatuses": [{"name": "node", "state": {"terminated": end}}]}


def well(server, job):
    names = [server.pod(job, index, **RUNNING) for index in range(2)]
    server.say(names[0], "step 1", "step 2")
    server.say(names[1], "not shown")
    time.sleep(0.2)
    carry_out(job)
    for index in range(2):
        server.pod(job, index, **ended(0))
    server.end(job, "Complete")


def fails(server, job):
    names = [server.pod(job, index, **RUNNING) for index in range(2)]
    lines = {0: ("connection reset by peer", "02.900"), 1: ("out of memory", "02.100")}
    for index, (line, at) in lines.items():
        report = REPORT.format(2 * index, at)
        server.say(names[index], "step 1", report, "  Traceback", f"  RuntimeError: {line}")
        # The same second for both: only what they say tells which came first.
        server.pod(job, index, **ended(1, at="2026-01-01T00:00:03Z"))
    server.end(job, "Failed", "FailedJobs", "jobset failed due to one or more job failures")

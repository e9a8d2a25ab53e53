"""Recording to a real tracking server that is killed and started again.

Facts pinned:
- the server killed (SIGKILL) and started again while a turn goes on, its stage logging on: one
  tree, every step of every metric once, nothing lost, and the stage never waited;
- the same for stages that are recorded the moment it dies, and while it is gone, these with a run
  that was handed over, which is joined;
- every second answer lost on the way, so that the client asks again by itself: nothing twice.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flowloom import runs
from flowloom.lifecycle import spool, tracking, turns, versioning
from flowloom.lifecycle.mlflow_tree import PARENT
from tests.lifecycle.servers import wait_until_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEP_S = 0.1


class Server:
    """An MLflow server on loopback, its own process group, on a database that outlives it."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder

    def start(self):
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_until_up(self._process, self.uri, self._folder / "server.log")

    def kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return tracking.connect()


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    """Makes a home, or a machine, the one that is used."""

    def move(name, turn=None, handed=None, follow=False):
        monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / name))
        for key, value in (
            ("FLOWLOOM_TURN", turn),
            ("MLFLOW_RUN_ID", handed),
            ("FLOWLOOM_TRACKING", "spool" if follow else None),
        ):
            monkeypatch.delenv(key, raising=False)
            if value:
                monkeypatch.setenv(key, value)

    return move


def task_run(client, name):
    """The run of a task, below that of its pipeline run, as an engine makes them."""
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    above = client.create_run(experiment, run_name="pipeline run").info.run_id
    tags = {PARENT: above}
    return client.create_run(experiment, tags=tags, run_name="task").info.run_id


def finished(make_run, **config):
    run = make_run(**config)
    with tracking.recorded(run):
        versioning.publish(run.dir / "out")
    return run


def history(client, run, name="train/loss"):
    points = client.get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


def runs_in(client, name):
    return client.search_runs([client.get_experiment_by_name(name).experiment_id])


def assert_once(client, run):
    assert history(client, run) == [(1, 2.0), (2, 1.0)]
    assert history(client, run, "eval/score") == [(2, 0.5)]
    files = sorted(item.path for item in client.list_artifacts(run.info.run_id))
    assert files == ["config.json", "log.txt", "pointer.json"]
    assert json.loads(run.data.tags["flowloom.artifact"])["md5"] == run.data.tags["flowloom.digest"]


def follower():
    return subprocess.Popen(
        [sys.executable, "-m", "flowloom.lifecycle.tracking", "--follow"], stdin=subprocess.PIPE
    )


def log_steps(run, steps):
    """Log as training does; returns the seconds that the slowest step waited for it."""
    slowest_s = 0.0
    for step in steps:
        started_s = time.monotonic()
        run.metric(step, {"train/loss": 1 / step})
        slowest_s = max(slowest_s, time.monotonic() - started_s)
        time.sleep(STEP_S)
    return slowest_s


def test_killed_and_started_again_while_a_turn_goes_on(server, client, make_run, at_home):
    handed = task_run(client, "engine")
    at_home("turn", turn="0001", follow=True)
    turn = turns.open_turn(dict.fromkeys(turns.KEY_FIELDS, "x"), lambda: None)
    process = follower()
    with turns.held(turn):
        turn.mark("running")
        finished(make_run, lr=1.0)
        stage = make_run(lr=2.0, finish=False)
        with runs.exclusive(stage), tracking.recorded(stage):
            log_steps(stage, range(3, 40))
            while not runs_in_turn(client):  # until the follower shows that the stage runs
                log_steps(stage, [])
                time.sleep(0.5)

            # The server dies while others are being recorded.
            at_home("burst", turn="0001", follow=True)
            for lr in range(3, 9):
                finished(make_run, lr=float(lr))
            waiting = len(spool.waiting())
            drained = threading.Thread(target=tracking.drain)
            drained.start()
            while len(spool.waiting()) == waiting:  # until the first is recorded
                time.sleep(0.01)
            server.kill()
            drained.join()
            cut_short = len(spool.waiting())

            # A task ends while it is gone.
            at_home("task", handed=handed)
            started_s = time.monotonic()
            finished(make_run)
            waited_s = time.monotonic() - started_s

            at_home("turn", turn="0001", follow=True)
            slowest_s = log_steps(stage, range(40, 80))
            server.start()
            log_steps(stage, range(80, 100))
            versioning.publish(stage.finish({"eval/score": 0.5}).out_dir)
        turn.mark("finished")
    process.communicate(timeout=120)
    assert spool.waiting() == []
    assert slowest_s < 0.1
    assert waited_s < 10.0

    at_home("burst", turn="0001", follow=True)
    assert cut_short > 0
    assert tracking.drain() == 0
    at_home("task", handed=handed)
    assert tracking.drain() == 0

    found = runs_in(client, tracking.EXPERIMENT)
    turn_runs = [run for run in found if run.data.tags["flowloom.kind"] == "turn"]
    stages = [run for run in found if run.data.tags["flowloom.kind"] == "stage"]
    below = {run.data.params["lr"]: run for run in stages}
    assert (len(turn_runs), len(stages)) == (2, 8)
    assert sorted(below) == [f"{lr}.0" for lr in range(1, 9)]
    assert {run.info.status for run in stages} == {"FINISHED"}
    parents = {lr: run.data.tags[PARENT] for lr, run in below.items()}
    assert parents["1.0"] == parents["2.0"]
    assert len({parents[f"{lr}.0"] for lr in range(3, 9)}) == 1
    assert set(parents.values()) == {run.info.run_id for run in turn_runs}
    steps = [(1, 2.0), (2, 1.0), *((step, 1 / step) for step in range(3, 100))]
    assert history(client, below.pop("2.0")) == steps
    for run in below.values():
        assert_once(client, run)
    engine = {run.info.run_id: run for run in runs_in(client, "engine")}
    assert len(engine) == 2
    assert_once(client, engine[handed])
    assert engine[handed].info.status == "RUNNING"


def runs_in_turn(client):
    query = "tags.`flowloom.turn` = '0001' and attributes.status = 'RUNNING'"
    found = client.get_experiment_by_name(tracking.EXPERIMENT)
    stages = f"{query} and tags.`flowloom.kind` = 'stage'"
    return found and client.search_runs([found.experiment_id], stages)


class Forgetful(BaseHTTPRequestHandler):
    """Passes requests on to the server, and loses every second answer."""

    uri, asked, lost = "", 0, 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        request = urllib.request.Request(
            self.uri + self.path,
            data=self.rfile.read(length) if length else None,
            headers={k: v for k, v in self.headers.items() if k.lower() != "host"},
            method=self.command,
        )
        try:
            with urllib.request.urlopen(request) as answer:
                status, data = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        kind = type(self)
        kind.asked += 1
        if kind.asked % 2:
            kind.lost += 1
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET


@pytest.fixture
def forgetful(server, client, monkeypatch):
    handler = type("Handler", (Forgetful,), {"uri": server.uri})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
    yield handler
    proxy.shutdown()
    proxy.server_close()


def test_answers_lost_on_the_way(client, forgetful, make_run, at_home):
    handed = task_run(client, "second-engine")
    at_home("other", turn="another-engine-1")
    run = finished(make_run)
    at_home("joining", handed=handed)
    finished(make_run)
    for name in ("other", "joining"):
        at_home(name)
        for _ in range(60):
            if not spool.waiting():
                break
            tracking.drain()
        assert spool.waiting() == []
    assert forgetful.lost > 20

    query = "tags.`flowloom.turn` = 'another-engine-1'"
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    turn_run, child = sorted(
        client.search_runs([experiment], query),
        key=lambda item: item.data.tags["flowloom.kind"] != "turn",
    )
    assert child.data.tags[PARENT] == turn_run.info.run_id
    assert child.data.tags["flowloom.digest"] == run.result().digest
    assert_once(client, child)
    assert_once(client, client.get_run(handed))
    assert len(runs_in(client, "second-engine")) == 2

"""The MLflow deployment's own command lines, run on loopback with PostgreSQL and moto's S3.

Facts pinned, in one story (a start of the server takes half a minute):
- the tables are made by the init container, a second time changes nothing; the server then answers
  whoever sends the token and names a host that it is known by, and writes to /tmp alone;
- killed (SIGKILL) while a stage trains, and started again: the run has each step once, and its
  files, which lie in S3; told to stop (SIGTERM) it ends by itself;
- of twenty promotions at once by machines that share nothing but this server, one holds and
  nineteen are refused, with PostgreSQL as with SQLite, also after the database died and came back;
- the nightly job's dump, restored by the restoring job into an empty database: a server on it has
  every run, metric, version, alias and decision by value, and goes on from there; into a database
  that is not empty nothing is restored.
"""

import contextlib
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request

import pytest

from flowloom import runs
from flowloom.lifecycle import journal, registry, tracking, versioning
from flowloom.lifecycle.config import GateConfig
from flowloom.lifecycle.gate import gate
from tests.infra.containers import command
from tests.infra.postgres import postgres
from tests.lifecycle.race import NUM_PROCESSES, winner_of
from tests.lifecycle.servers import wait_until_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STOP_S = 60.0
"""As the deployment grants."""
BUCKET = "store"
TOKEN = "t0ken-of-the-test"
SERVER = "base/mlflow/server.yaml", "Deployment", "flowloom-mlflow"
BACKUP = "base/mlflow/backup.yaml", "CronJob", "flowloom-mlflow-backup"
RESTORE = "base/mlflow/backup.yaml", "CronJob", "flowloom-mlflow-restore"


class Cluster:
    """Starts the containers where a database is, each with an empty home and working folder."""

    def __init__(self, folder, database, s3):
        self.tmp, self.nowhere = folder / "tmp", folder / "nowhere"
        for path in (self.tmp, self.nowhere):
            path.mkdir()
        self.secrets = {
            "flowloom-database": {"MLFLOW_BACKEND_STORE_URI": database},
            "flowloom-tracking": {"MLFLOW_TRACKING_TOKEN": TOKEN},
            "flowloom-store": {
                "FLOWLOOM_STORE": f"s3://{BUCKET}/team",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_ENDPOINT_URL": s3,
            },
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://localhost:{port}"
        self._addresses = [
            ("--host=0.0.0.0", "--host=127.0.0.1"),
            ("--port=5000", f"--port={port}"),
        ]
        self._log = folder / "server.log"

    def run(self, job, container, path="", replaced=()):
        """Run a container to its end; returns the process."""
        given = command(*job, container, self.secrets, {"/tmp": self.tmp}, replaced)
        return subprocess.run(given.words, check=False, **self._here(given, path))

    def start(self):
        given = command(*SERVER, "server", self.secrets, {"/tmp": self.tmp}, self._addresses)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                given.words, stdout=log, stderr=log, start_new_session=True, **self._here(given)
            )
        wait_until_up(self._process, self.uri, self._log)

    def stop(self):
        self._process.terminate()
        return self._process.wait(STOP_S)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def status_of(self, **headers):
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/experiments/get?experiment_id=0", headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def _here(self, given, path=""):
        home = {"HOME": str(self.nowhere)}
        path = f"{path}:{given.environment['PATH']}"
        return {"cwd": self.nowhere, "env": {**given.environment, **home, "PATH": path}}


@pytest.fixture(scope="module")
def s3():
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    yield endpoint, client
    server.stop()


@pytest.fixture
def database():
    with postgres() as cluster:
        cluster.create("mlflow")
        yield cluster


def everything(client):
    """All that the server knows, by value."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {
        "runs": {
            run.info.run_id: (
                run.info.status,
                run.data.params,
                run.data.tags,
                {name: points(client, run.info.run_id, name) for name in run.data.metrics},
                {i.dataset.name: i.dataset.to_dictionary() for i in run.inputs.dataset_inputs},
            )
            for run in client.search_runs(experiments)
        },
        "models": {
            model.name: (dict(model.aliases), model.description)
            for model in client.search_registered_models()
        },
        "versions": sorted(
            (v.name, int(v.version), v.tags, v.description, v.source, v.run_id)
            for v in client.search_model_versions()
        ),
        "decisions": registry.history(),
    }


def points(client, run_id, name):
    return [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, name)]


def train_while_the_server_dies(server, client, run):
    """Train as a stage does, killing the server between two steps; returns the MLflow run."""
    with runs.exclusive(run), tracking.recorded(run):
        run.metric(3, {"train/loss": 0.5})
        assert tracking.drain() == 1  # it goes on
        server.kill()
        for step in range(4, 8):
            run.metric(step, {"train/loss": 1 / step})
        assert tracking.drain() == 1
        (run.out / "grid.png").write_bytes(b"\x89PNG a picture")
        versioning.publish(run.finish({"eval/score": 0.5}).out_dir)
    server.start()
    assert tracking.drain() == 0
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    (recorded,) = client.search_runs([experiment])
    return recorded


def race(client, champion, evaluation):
    """Promote twenty versions at once; returns which of them is the champion."""
    made = client.get_model_version(registry.NAME, champion)
    tags = {"flowloom.digest": "d.dir", "flowloom.expected": champion}
    versions = [
        str(client.create_model_version(registry.NAME, made.source, made.run_id, tags=tags).version)
        for _ in range(NUM_PROCESSES)
    ]
    winner = winner_of("homes", versions, {**evaluation, "opponent": "champion"})
    decided = [row for row in registry.history() if row["version"] in versions]
    assert sorted(row["version"] for row in decided) == sorted(versions)
    refused = [row for row in decided if row["event"] == "refuse"]
    assert len(refused) == NUM_PROCESSES - 1
    assert {row["reason"] for row in refused} == {f"champion: {winner} = {champion}: FAILS"}
    return winner


def test_logged_killed_backed_up_and_restored(
    database, s3, make_run, make_parts, evaluation, monkeypatch, tmp_path
):
    endpoint, objects = s3
    clients = str(database.binaries)
    server = Cluster(tmp_path, database.uri("mlflow"), endpoint)
    for _ in range(2):
        assert server.run(SERVER, "upgrade").returncode == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    try:
        server.start()
        assert server.status_of(**bearer) == 200
        assert server.status_of() == 401
        assert server.status_of(Authorization="Bearer another") == 401
        assert server.status_of(**bearer, Host="flowloom-mlflow:5000") == 200
        assert server.status_of(**bearer, Host="evil.example.com") == 403
        client = tracking.connect()
        assert os.environ["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] == "false"

        recorded = train_while_the_server_dies(server, client, make_run(finish=False))
        assert recorded.info.status == "FINISHED"
        history = points(client, recorded.info.run_id, "train/loss")
        losses = [(1, 2.0), (2, 1.0), (3, 0.5), *((step, 1 / step) for step in range(4, 8))]
        assert [(step, value) for step, value, _ in history] == losses
        files = {item.path for item in client.list_artifacts(recorded.info.run_id)}
        assert files == {"config.json", "log.txt", "pointer.json", "pictures"}
        stored = [o["Key"] for o in objects.list_objects_v2(Bucket=BUCKET)["Contents"]]
        (picture,) = [key for key in stored if key.endswith("pictures/grid.png")]
        assert picture.startswith("team/mlflow/")

        model, first = registry.register(make_parts())
        assert registry.promote(first, gate(evaluation, GateConfig())).promoted
        database.stop()
        database.start()
        winner = race(client, first, evaluation)
        assert registry.champion().version == winner
        before = everything(client)
        assert len(before["decisions"]) == 1 + NUM_PROCESSES

        assert server.run(BACKUP, "dump", clients).returncode == 0
        assert server.run(BACKUP, "keep").returncode == 0
        assert server.stop() == 0
    finally:
        server.kill()
    assert list(server.nowhere.iterdir()) == []

    database.create("restored")
    (tmp_path / "other").mkdir()
    server = Cluster(tmp_path / "other", database.uri("restored"), endpoint)
    assert server.run(RESTORE, "fetch").returncode == 0
    assert server.run(RESTORE, "restore", clients).returncode == 0
    assert server.run(RESTORE, "restore", clients).returncode != 0
    database.drop("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    try:
        server.start()
        client = tracking.connect()
        assert everything(client) == before
        assert client.get_registered_model(registry.NAME).aliases[registry.CHAMPION] == winner
        assert journal.settle(client).champions == (first, winner)
        assert registry.rollback() == first
        # Through the server, and past it, as other clients do.
        for directly in ("false", "true"):
            monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", directly)
            monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / f"machine-{directly}"))
            assert runs.folder_digest(registry.champion_dir()) == model.digest
    finally:
        server.kill()

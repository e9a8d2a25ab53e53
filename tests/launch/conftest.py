"""A stage to launch, in this process and in those that a test starts."""

import os
from pathlib import Path

import pytest

from flowloom import stages
from flowloom.launch import pods, trainjob
from flowloom.runs import code_digest
from tests.designer.conftest import catalogue, grammar, inputs
from tests.launch import rehearsal
from tests.launch.api_server import ApiServer

__all__ = ["catalogue", "grammar", "inputs", "rehearse", "quick", "cluster"]


@pytest.fixture
def rehearse(monkeypatch):
    """The rehearsal by name."""
    root = Path(__file__).parents[2]
    monkeypatch.setitem(stages.STAGES, rehearsal.NAME, None)  # restored afterwards
    rehearsal.register()
    paths = [str(root / "tests/launch/site"), str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    # The source may be edited while processes start.
    monkeypatch.setenv("FLOWLOOM_CODE_DIGEST", "0" * 64)
    code_digest.cache_clear()
    # Nothing is recorded: MLflow takes seconds to import.
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    yield rehearsal.NAME
    code_digest.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """Waits as short as a test's."""
    for name, value in {"PAUSE_S": 0.01, "WATCH_S": 1, "OUTAGE_S": 5.0, "INTERRUPT_S": 1.0}.items():
        monkeypatch.setattr(trainjob, name, value)
    monkeypatch.setattr(pods, "_AGAIN_S", 0.05)


@pytest.fixture
def cluster(rehearse, quick, monkeypatch, tmp_path):
    """Starts a server whose script plays the cluster; returns it."""
    servers = []

    def start(script):
        server = ApiServer(tmp_path, script).__enter__()
        servers.append(server)
        monkeypatch.setenv("KUBECONFIG", str(server.config))
        return server

    yield start
    for server in servers:
        server.__exit__()

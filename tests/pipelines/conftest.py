"""A scripted server, and a machine that knows no other."""

import pytest

import pipelines.__main__ as command
from pipelines import cluster, clusters
from pipelines import server as servers
from pipelines.__main__ import compile_to
from tests.pipelines.kfp_server import NAME, KfpServer

SLOW = (2.0, 0.5)
"""Timeouts shorter than the slow answer; the pauses add up to more than it takes."""


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    from tests.pipelines.tracing import trace_anew  # which imports kfp

    path = tmp_path_factory.mktemp("compiled") / "package.yaml"
    with pytest.MonkeyPatch.context() as patch:
        trace_anew(patch, path.parent)
        compile_to(NAME, path)
    return path.read_bytes()


@pytest.fixture
def machine(monkeypatch, tmp_path, package):
    """No settings of this machine's, no waiting, one compilation, champion 3."""
    import kfp

    from flowloom.lifecycle import turns
    from tests.pipelines.tracing import trace_fast

    trace_fast(monkeypatch)
    for name in ("KFP_HOST", "KFP_TOKEN", "KFP_NAMESPACE", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KF_PIPELINES_UI_ENDPOINT", clusters.CLUSTER, clusters.LAUNCH):
        monkeypatch.delenv(name, raising=False)
    overlay = tmp_path / "overlays" / "dev" / "images"
    overlay.mkdir(parents=True)
    (overlay / "kustomization.yaml").write_text("images: []")
    monkeypatch.setattr(clusters, "OVERLAYS", tmp_path / "overlays")
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(servers, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(cluster, "POLL_S", 0.0)
    monkeypatch.setattr(command, "_champion", lambda: "3")
    monkeypatch.setattr(command, "compile_to", lambda name, out: out.write_bytes(package))
    fields = turns.key(NAME, "demo", {})

    def key(name, recipe, overrides):
        return {**fields, "recipe": recipe, "overrides": overrides}

    monkeypatch.setattr(turns, "key", key)
    return fields


@pytest.fixture
def kfp_server(machine, monkeypatch):
    with KfpServer() as server:
        monkeypatch.setenv("KFP_HOST", server.url)
        yield server
        assert not server.two_enabled


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(servers, "TIMEOUTS_S", SLOW)
    monkeypatch.setattr(servers, "PAUSES_S", (0.3, 0.6, 0.9))

"""What every test may rely on: no network, fixed seeds, one torch thread, a home of its own."""

import os

# Read when torch, a hub client or MLflow is first imported, so set before any of them is.
os.environ.update(
    OMP_WAIT_POLICY="passive",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    DVC_NO_ANALYTICS="1",
    DO_NOT_TRACK="1",
    MPLBACKEND="Agg",
    # The S3 client wants credentials even for a server on this machine.
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
)

import json
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("flowloom", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("flowloom")

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


def pytest_collection_modifyitems(items):
    for item in items:
        if "golden" in item.fixturenames:
            item.add_marker("golden")


@pytest.fixture(autouse=True)
def _reproducible():
    random.seed(0)
    np.random.seed(0)
    # A test that does not need torch must not pay four seconds for it.
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """Runs, store and tracking of one test are seen by no other and stay out of the checkout."""
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path_factory.mktemp("home")))
    for name in (
        *("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"),
        "FLOWLOOM_WEBHOOK_URL",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def golden(request):
    """Compare with a committed file: `golden("losses.json", losses, rel=1e-4)`.

    Text is compared exactly; anything else is kept as JSON, its numbers within `rel`, a named
    tolerance of the test. `make golden` rewrites the files.
    """

    def compare(name, value, rel=None):
        path = GOLDEN_DIR / name
        text = value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.is_file(), f"{path} is missing; `make golden` writes it"
        if isinstance(value, str):
            assert text == path.read_text()
        else:
            expected = json.loads(path.read_text())
            assert json.loads(text) == (expected if rel is None else _close(expected, rel))

    return compare


def _close(expected, rel):
    if isinstance(expected, dict):
        return {key: _close(item, rel) for key, item in expected.items()}
    if isinstance(expected, list):
        return [_close(item, rel) for item in expected]
    if isinstance(expected, float):
        return pytest.approx(expected, rel=rel)
    return expected

"""One MLflow schema per session (it takes seconds to make), copied into each test's home."""

import dataclasses
import gzip
import json
import shutil

import pytest

from flowloom import runs
from flowloom.workflow.catalogue import Catalogue


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    lr: float = 0.1


@pytest.fixture(scope="session")
def empty_db(tmp_path_factory):
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracked(empty_db):
    """A home whose tracker is ready; returns a client of it."""
    from flowloom.lifecycle import tracking

    runs.home().mkdir(exist_ok=True)
    shutil.copyfile(empty_db, runs.home() / "mlflow.db")
    return tracking.connect()


@pytest.fixture
def make_run():
    """Makes a run folder; finished unless told otherwise."""

    def make(stage="train_sft", lr=0.1, finish=True):
        run = runs.open_run(stage, Config(lr), {})
        if run.done:
            return run
        run.begin()
        (run.out / "nested").mkdir()
        (run.out / "nested" / "weights.bin").write_bytes(b"\x00\x01\x02")
        (run.out / "model.json").write_text(f'{{"lr": {lr}}}')
        run.metric(1, {"train/loss": 2.0})
        run.metric(2, {"train/loss": 1.0})
        run.log("step 2 of 2")
        if finish:
            run.finish({"eval/score": 0.5})
        return run

    return make


@pytest.fixture
def evaluation():
    """An evaluation that the gate lets pass."""
    kinds = ("counting", "single")
    means = {"grpo": 0.5, "best_fixed": 0.4, "champion": 0.41}
    return {
        "opponent": "best_fixed",
        "guidance": 1.5,
        "paired": {
            "vs_best_fixed": {"mean": 0.1, "low": 0.06, "high": 0.14, "n": 160},
            "vs_champion": {"mean": 0.09, "low": 0.05, "high": 0.13, "n": 160},
        },
        "policies": {
            name: {"mean": mean, "se": 0.01, "by_kind": dict.fromkeys(kinds, mean)}
            for name, mean in means.items()
        },
        "designs": {"n": 5000, "valid": 5000, "decodable": 5000, "unique_frac": 0.1},
    }


@pytest.fixture
def make_parts(tmp_path, evaluation):
    """Makes the artifact folders that a model is registered from."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def make(name="a", weights=b"w", **changes):
        root = tmp_path / f"parts-{name}"
        parts = {
            part: root / part
            for part in ("catalogue", "triplets", "designer", "adapter", "reward", "evaluation")
        }
        for folder in parts.values():
            folder.mkdir(parents=True)
        embedded = json.dumps(Catalogue.load("embedded").to_json()).encode()
        (parts["catalogue"] / "catalogue.json.gz").write_bytes(gzip.compress(embedded, mtime=0))
        rows = {
            "prompt": ["a", "a", "a", "a", "b", "b"],
            "kind": ["single"] * 6,
            "workflow": ['{"1": {}}'] * 2 + ['{"2": {}}'] * 2 + ['{"1": {}}'] * 2,
            "fingerprint": ["x", "x", "y", "y", "x", "x"],
            "score": [0.1, 0.2, 0.8, 0.9, 0.3, 0.3],
            "split": ["train"] * 6,
        }
        parquet.write_table(
            pyarrow.table(rows), parts["triplets"] / "triplets-00000-of-00001.parquet"
        )
        (parts["triplets"] / "best_fixed.json").write_text('{"1": {}}')
        (parts["designer"] / "vocabulary.json").write_text("{}")
        (parts["designer"] / "model.safetensors").write_bytes(weights)
        (parts["adapter"] / "adapter.safetensors").write_bytes(weights)
        (parts["reward"] / "calibration.json").write_text("{}")
        (parts["evaluation"] / "evaluation.json").write_text(json.dumps(evaluation | changes))
        return parts

    return make

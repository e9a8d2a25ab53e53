"""How a model's folder becomes an MLflow model: one copy of its files, served by `serving.py`.

In the MLflow run, below `model/`: MLmodel, serving.py and requirements, which MLflow reads, and in
`artifacts/model/` the folder byte by byte, which `flowloom design` reads too.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

ROOT = "model"
FOLDER = f"{ROOT}/artifacts/model"
NUM_DESIGNS = 4
"""Designs per prompt unless a request says otherwise."""
SEED = 0
"""Seed unless a request says otherwise."""
GUIDANCE = 1.5
"""Guidance of a model that does not say what it was evaluated with."""
EXAMPLE = ["three red circles"]


def log(client: MlflowClient, run_id: str, folder: Path) -> tuple[str, str]:
    """Log a model's folder to an MLflow run so that MLflow can serve it.

    Args:
        client: Of the tracker.
        run_id: The run.
        folder: The model's folder.

    Returns:
        The source of a registered version, and where in the run the folder lies.
    """
    with tempfile.TemporaryDirectory() as name:
        shell = Path(name) / ROOT
        _save_shell(shell, run_id, folder)
        client.log_artifacts(run_id, str(folder), FOLDER)
        client.log_artifacts(run_id, str(shell), ROOT)
    return f"runs:/{run_id}/{ROOT}", FOLDER


def _save_shell(shell: Path, run_id: str, folder: Path) -> None:
    """Write all of the MLflow model but its artifacts: these are large, and logged as they are."""
    import mlflow.pyfunc
    from mlflow.models import Model

    signature, example = _signature(folder)
    mlflow.pyfunc.save_model(
        shell,
        python_model=Path(__file__).with_name("serving.py"),
        signature=signature,
        input_example=(EXAMPLE, example),
        pip_requirements=requirements(),
        mlflow_model=Model(artifact_path=ROOT, run_id=run_id),
    )
    model = Model.load(str(shell))
    path = Path(FOLDER).relative_to(ROOT).as_posix()
    model.flavors[mlflow.pyfunc.FLAVOR_NAME]["artifacts"] = {"model": {"path": path, "uri": path}}
    model.save(str(shell / "MLmodel"))


def _signature(folder: Path) -> tuple[ModelSignature, dict[str, int | float]]:
    """One column of prompts, whatever it is called; the parameters with their defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    record = json.loads((folder / "config.json").read_text())
    defaults = {
        "n": NUM_DESIGNS,
        "guidance": float(record.get("guidance", GUIDANCE)),
        "seed": SEED,
    }
    types = {"n": DataType.long, "guidance": DataType.double, "seed": DataType.long}
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec(name, types[name], defaults[name]) for name in types]),
    )
    return signature, defaults


def requirements() -> list[str]:
    """What a serving image needs, pinned; a local build's suffix (`+cpu`) is no release."""
    return [f"{name}=={version(name).split('+')[0]}" for name in ("flowloom", "mlflow", "torch")]

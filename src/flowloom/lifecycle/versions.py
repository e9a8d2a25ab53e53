"""Versions of the registered model `flow-designer` as MLflow has them: aliases, tags and files.

What is read here decides nothing: `registry` registers, promotes and rolls back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flowloom.lifecycle import tracking
from flowloom.runs import folder_digest, home

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "flow-designer"
CHAMPION = "champion"
CANDIDATE = "candidate"
CHAMPION_URI = f"models:/{NAME}@{CHAMPION}"
FILES = "flowloom.files"
"""Tag: where in the MLflow run the model's folder lies."""

MAX_TEXT = 5000
"""Characters of a description or reason: MLflow's bound on the former."""


@dataclasses.dataclass(frozen=True)
class ModelVersion:
    """A registered version."""

    version: str
    """Its number, as MLflow gives it."""
    digest: str
    """Digest of its folder."""
    run_id: str
    """MLflow run that has its files."""
    turn: str | None
    """Turn that made it."""
    expected: str | None
    """Champion when that turn started: whom it was compared with."""
    files: str
    """Where in the MLflow run its folder lies."""


def champion() -> ModelVersion | None:
    """The champion, or `None` where there is none yet."""
    if not exists():
        return None
    client = tracking.connect()
    version = aliases(client).get(CHAMPION)
    return get_version(client, version) if version else None


def opponent(version: str) -> tuple[str, Path | None]:
    """The champion that a candidate is compared with, and its folder.

    Args:
        version: Its version; empty for none; `auto` for the champion there is now.
    """
    if version == "auto":
        now = champion()
        version = now.version if now else ""
    return version, champion_dir(f"models:/{NAME}/{version}") if version else None


def champion_dir(uri: str = CHAMPION_URI) -> Path:
    """The folder of a registered model, brought to this machine if it is not yet here.

    Args:
        uri: `models:/flow-designer@ALIAS`, `models:/flow-designer/VERSION`, or a folder.

    Raises:
        ValueError: If there is no such model.
    """
    if not uri.startswith("models:/"):
        if not (Path(uri) / "config.json").is_file():
            raise ValueError(f"model: got {uri!r}, expected a model's folder or models:/{NAME}@...")
        return Path(uri)
    client = connect()
    version = get_version(client, resolve(client, uri))
    folder = home() / "models" / version.digest.removesuffix(".dir")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            found = Path(client.download_artifacts(version.run_id, version.files, partial))
            (found / "models").mkdir(exist_ok=True)
            digest = folder_digest(found)
            if digest != version.digest:
                raise ValueError(f"{uri}: got files of digest {digest}, expected {version.digest}")
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(found, folder)
    return folder


def connect() -> MlflowClient:
    """A client of the registry in use.

    Raises:
        ValueError: If there is no registry yet.
    """
    if not exists():
        raise ValueError(
            f"registry: got nothing at {tracking.tracking_uri()}, expected {NAME}; `make demo` (or "
            "`python -m pipelines run continuous_training`) makes one"
        )
    return tracking.connect()


def aliases(client: MlflowClient) -> dict[str, str]:
    """Alias to version."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(NAME).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise ValueError(_unreachable(error)) from error
    return {str(alias): str(version) for alias, version in dict(found).items()}


def ensure_model(client: MlflowClient, name: str = NAME, description: str | None = None) -> None:
    """Make the registered model unless there is one."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def get_version(client: MlflowClient, version: str) -> ModelVersion:
    """A version by its number.

    Raises:
        ValueError: If there is no such version.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(NAME, version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(
                f"{NAME}: got version {version!r}, expected one in {tracking.tracking_uri()}"
            ) from None
        raise ValueError(_unreachable(error)) from error
    tags = found.tags
    return ModelVersion(
        version=str(found.version),
        digest=tags["flowloom.digest"],
        run_id=str(found.run_id),
        turn=tags.get("flowloom.turn") or None,
        expected=tags.get("flowloom.expected") or None,
        # Versions made before they could be served lie in the run as they are.
        files=tags.get(FILES, "model"),
    )


def exists() -> bool:
    """Whether there is a registry at all; opening a SQLite file that is not there would make it."""
    uri = tracking.tracking_uri()
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def resolve(client: MlflowClient, uri: str) -> str:
    """The version that `models:/flow-designer@ALIAS` or `/VERSION` names.

    Raises:
        ValueError: If it names another model, or an alias that there is not.
    """
    name, alias = uri.removeprefix("models:/"), None
    if "@" in name:
        name, alias = name.split("@", 1)
        version = aliases(client).get(alias)
    else:
        name, _, version = name.partition("/")
    if name != NAME:
        raise ValueError(f"model: got {uri!r}, expected models:/{NAME}@ALIAS or /VERSION")
    if not version:
        raise ValueError(
            f"{uri}: no such model in {tracking.tracking_uri()}; `make demo` (or `python -m "
            "pipelines run continuous_training`) makes one"
        )
    return version


def _unreachable(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"registry {tracking.tracking_uri()}: {first}"

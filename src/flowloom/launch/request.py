"""What the processes of a launched stage read: stage, configuration and inputs, in one file.

The file lies in the run folder, so wherever that is shared every process finds all it needs there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowloom import stages
from flowloom.config import override, to_dict
from flowloom.runs import Run, StageResult, home, input_digest, write_json

FILE = "launch.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One run of one stage, to be carried out by other processes."""

    stage: str
    """Its name."""
    config_class: str
    """`module:class` of its configuration."""
    config: dict[str, Any]
    """The configuration's fields."""
    inputs: dict[str, Any]
    """Input name to the path (or list of paths) of an artifact."""
    key: str
    """Name of the run folder, which every process must come to as well."""
    sources: str
    """Digests of code and data, as `turns.sources` gives them."""

    def run(self) -> StageResult:
        """Take part in the run, as one process of its group.

        Raises:
            ValueError: This process has other code or data, or other inputs: it would write
                another run.
        """
        from flowloom.lifecycle import turns

        turns.check_sources(self.stage, self.sources)
        config = _built(self.config_class, self.config)
        found, _ = stages.opened(self.stage, config, self.inputs)
        if found.dir.name != self.key:
            raise ValueError(f"{self.stage}: run: got {found.dir.name}, expected {self.key}")
        return stages.run(self.stage, config, self.inputs)


def write(run: Run, config: Any, inputs: Mapping[str, Path | list[Path]]) -> Path:
    """Write the request for a run into its folder.

    Returns:
        The file.
    """
    from flowloom.lifecycle import turns

    kind = type(config)
    request = Request(
        stage=run.stage,
        config_class=f"{kind.__module__}:{kind.__qualname__}",
        config=to_dict(config),
        inputs={
            name: [str(one) for one in path] if isinstance(path, list) else str(path)
            for name, path in inputs.items()
        },
        key=run.dir.name,
        sources=turns.sources(),
    )
    assert _built(request.config_class, request.config) == config
    write_json(run.dir / FILE, dataclasses.asdict(request))
    return run.dir / FILE


def read(path: Path) -> Request:
    """The request in a file.

    Raises:
        ValueError: It is no request.
    """
    try:
        return Request(**json.loads(path.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"request {path}: got {error}, expected a {FILE} of a run folder"
        ) from None


def share(path: Path) -> Path:
    """Where other machines find an input: in the home folder, copied there by digest if need be."""
    path = path.absolute()
    if path.is_relative_to(home()):
        return path
    digest = input_digest(path)
    copy = home() / "inputs" / digest.removesuffix(".dir")
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f"{copy.name}.{secrets.token_hex(4)}.partial")
        try:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, partial)
            os.replace(partial, copy)
        except OSError:
            # Somebody else's copy came first, else there is something to say.
            if not copy.exists():
                raise
        finally:
            if partial.is_file():
                partial.unlink()
            shutil.rmtree(partial, ignore_errors=True)
    found = input_digest(copy)
    if found != digest:
        raise ValueError(f"{copy}: got content of digest {found}, expected {digest}; remove it")
    return copy


def _built(config_class: str, fields: Mapping[str, Any]) -> Any:
    module, _, name = config_class.partition(":")
    return override(getattr(importlib.import_module(module), name)(), fields)

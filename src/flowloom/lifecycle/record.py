"""A run of a stage, as the tags of an MLflow run or a run folder have it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from flowloom.lifecycle.objects import FOLDER, is_digest
from flowloom.lifecycle.pointer import TAG, Pointer, read_pointer

PACKAGES = "flowloom.packages"
"""Tag with the versions that a run was made with: JSON, package to version."""
INPUT = "flowloom.input."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one stage: the same configuration, inputs, data and code, in any number of turns.

    Recorded for several turns it is still one, with several MLflow runs.
    """

    stage: str
    """Name of the stage."""
    key: str
    """Name of its run folder: a digest of all that decides the result."""
    inputs: Mapping[str, tuple[str, ...]]
    """Digests (or other fixed values) by the input's name."""
    data: str | None
    """Digest of `data/`; `None` where it was not versioned."""
    code: str
    """Digest of flowloom's source."""
    digest: str | None = None
    """Digest of its artifact; `None` while there is none."""
    pointer: Pointer | None = None
    """Where its artifact was published."""
    commit: str | None = None
    """Git commit of the checkout it ran in."""
    catalogue: str | None = None
    """Hash of the catalogue it wrote or read."""
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Package versions it was made with, where that was recorded."""
    run_ids: tuple[str, ...] = ()
    """MLflow runs, oldest first."""
    folder: Path | None = None
    """Its run folder, where this home has it."""

    @property
    def artifacts(self) -> dict[str, tuple[str, ...]]:
        """The inputs that are artifacts."""
        found = {n: tuple(v for v in vs if is_digest(v, FOLDER)) for n, vs in self.inputs.items()}
        return {name: digests for name, digests in found.items() if digests}

    def __str__(self) -> str:
        """For a person."""
        where = self.run_ids[0] if self.run_ids else str(self.folder)
        return f"{self.stage} ({where})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a person asked about."""

    title: str
    """How to call it."""
    digest: str | None
    """Digest of its artifact."""
    record: Record | None
    """The run, where one was named."""
    version: str | None = None
    """The registered version, where one was named."""


def read_tags(run_id: str, tags: Mapping[str, str]) -> Record:
    """A run as the tags of an MLflow run have it."""
    pointer = read_pointer(tags) if TAG in tags else None
    inputs = {
        name.removeprefix(INPUT): tuple(value.split(","))
        for name, value in sorted(tags.items())
        if name.startswith(INPUT)
    }
    data = tags.get("flowloom.data")
    return Record(
        stage=tags["flowloom.stage"],
        key=tags.get("flowloom.key", ""),
        inputs=inputs,
        data=None if data == "untracked" else data,
        code=tags.get("flowloom.code", ""),
        digest=tags.get("flowloom.digest") or (pointer.md5 if pointer else None),
        pointer=pointer,
        commit=tags.get("mlflow.source.git.commit"),
        catalogue=tags.get("flowloom.catalogue"),
        packages=json.loads(tags.get(PACKAGES, "{}")),
        run_ids=(run_id,),
    )


def read_folder(folder: Path) -> Record:
    """A run as its folder has it.

    Raises:
        ValueError: It is no run folder.
    """
    try:
        identity = json.loads((folder / "config.json").read_text())
        stage, given = identity["stage"], identity["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}: got no run's config.json, expected a run folder") from None
    result, pointer = folder / "result.json", folder / "pointer.json"
    return Record(
        stage=stage,
        key=folder.name,
        inputs={name: tuple(str(value).split(",")) for name, value in sorted(given.items())},
        data=identity["data"],
        code=identity["code"],
        digest=json.loads(result.read_text())["digest"] if result.is_file() else None,
        pointer=read_pointer(pointer) if pointer.is_file() else None,
        folder=folder,
    )

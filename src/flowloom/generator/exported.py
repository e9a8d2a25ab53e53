"""What an exported generator leaves: files by role, and their records (read without torch)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from flowloom.render.model_records import file_record
from flowloom.workflow import ModelFile

FILES = "files.json"
CHECKPOINT, LORA = "checkpoint", "lora"
FOLDERS = {CHECKPOINT: "checkpoints", LORA: "loras"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    files: tuple[ModelFile, ...]
    """The records of the files, the checkpoint's first."""
    base: ModelFile
    """The record of what was tuned."""


def read_files(folder: Path) -> dict[str, tuple[ModelFile, Path]]:
    """What `export` wrote, by role: records and where the files lie, their bytes checked.

    Raises:
        ValueError: A file is missing, or is not what its record says.
    """
    records = [ModelFile(**record) for record in json.loads((folder / FILES).read_text())]
    files = {}
    for record in records:
        path = folder / "models" / record.folder / record.name
        if not path.is_file():
            raise ValueError(f"generator: got no file {path}, expected what {FILES} names")
        facts = {name: getattr(record, name) for name in ("family", "role", "licence", "card")}
        found = file_record(path, record.folder, **facts)
        if found != record:
            raise ValueError(
                f"{path}: got sha256 {found.sha256[:12]}, expected {record.sha256[:12]} as in "
                f"{FILES}"
            )
        files[record.role] = (record, path)
    return files

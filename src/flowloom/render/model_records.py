"""Model files as a catalogue lists them: records and bytes, without loading any (no torch)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from flowloom.runs import file_sha256
from flowloom.workflow import Catalogue, ModelFile

CATALOGUE_FILE = "catalogue.json.gz"


def save_catalogue(path: str | Path, catalogue: Catalogue) -> None:
    """Write a catalogue as .json.gz whose bytes depend on its content only."""
    text = json.dumps(catalogue.to_json(), sort_keys=False).encode()
    Path(path).write_bytes(gzip.compress(text, mtime=0))


def file_record(path: Path, folder: str, **facts: str) -> ModelFile:
    """The catalogue's record of a model file on disk."""
    return ModelFile(folder=folder, name=path.name, sha256=file_sha256(path), **facts)

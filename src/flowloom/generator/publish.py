"""Put a tuned checkpoint into the catalogue: an overlay beside the shipped files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from flowloom.generator.config import PublishGeneratorConfig
from flowloom.render.models import CATALOGUE_FILE, file_record, save_catalogue
from flowloom.runs import Run
from flowloom.workflow import Catalogue, ModelFile


def publish_generator(
    config: PublishGeneratorConfig, run: Run, *, generator: Path
) -> dict[str, float]:
    """Write the catalogue with the tuned file in it, and the file's bytes under `models/`.

    Args:
        config: Which catalogue to add to.
        run: Where to write.
        generator: What `tune_generator` wrote: `file.json` and `models/<folder>/<name>`.

    Raises:
        ValueError: The file is missing, or is not what its record says.
    """
    record = ModelFile(**json.loads((generator / "file.json").read_text()))
    source = generator / "models" / record.folder / record.name
    if not source.is_file():
        raise ValueError(f"generator: got no file {source}, expected what file.json names")
    facts = {name: getattr(record, name) for name in ("family", "role", "licence", "card")}
    found = file_record(source, record.folder, **facts)
    if found != record:
        raise ValueError(
            f"{source}: got sha256 {found.sha256[:12]}, "
            f"expected {record.sha256[:12]} as in file.json"
        )

    catalogue = Catalogue.load(config.catalogue).with_files([record])
    target = run.out / "models" / record.folder / record.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    save_catalogue(run.out / CATALOGUE_FILE, catalogue)
    return {"catalogue/files": float(len(catalogue.files))}

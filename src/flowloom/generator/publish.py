"""Put a tuned generator into the catalogue: an overlay beside the shipped files."""

from __future__ import annotations

import shutil
from pathlib import Path

from flowloom.generator.card import CARD
from flowloom.generator.config import PublishGeneratorConfig
from flowloom.generator.export import FILES, read_files
from flowloom.render.models import CATALOGUE_FILE, save_catalogue
from flowloom.runs import Run
from flowloom.workflow import Catalogue


def publish_generator(
    config: PublishGeneratorConfig, run: Run, *, generator: Path | None = None
) -> dict[str, float]:
    """Write the catalogue with the tuned files in it, and their bytes and card under `models/`.

    Args:
        config: Which catalogue to add to, and which of the tuned files.
        run: Where to write.
        generator: What `tune_generator` wrote: `files.json`, `models/<folder>/<name>`, `README.md`;
            without it, the catalogue is written as it is.

    Raises:
        ValueError: A file is missing, or is not what its record says.
    """
    if generator is None:
        catalogue = Catalogue.load(config.catalogue)
        save_catalogue(run.out / CATALOGUE_FILE, catalogue)
        return {"catalogue/files": float(len(catalogue.files))}
    files = read_files(generator)
    for role in config.roles:
        if role not in files:
            raise ValueError(
                f"roles: got {role!r}, expected what {generator / FILES} has: {', '.join(files)}"
            )
    chosen = [files[role] for role in config.roles]

    catalogue = Catalogue.load(config.catalogue).with_files([record for record, _ in chosen])
    for record, source in chosen:
        target = run.out / "models" / record.folder / record.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        if (generator / CARD).is_file():
            shutil.copyfile(generator / CARD, target.with_suffix(".md"))
    save_catalogue(run.out / CATALOGUE_FILE, catalogue)
    return {"catalogue/files": float(len(catalogue.files))}

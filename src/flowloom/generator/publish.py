"""Put a tuned generator into the catalogue: an overlay beside the shipped files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from flowloom.generator.card import CARD
from flowloom.generator.config import PublishGeneratorConfig
from flowloom.generator.exported import FILES, read_files
from flowloom.render.model_records import CATALOGUE_FILE, save_catalogue
from flowloom.runs import Run
from flowloom.workflow import Catalogue, ModelFile

Address = tuple[str, str]
"""Folder and name of a model file."""


@dataclasses.dataclass(frozen=True)
class Joining:
    """A file that joins the catalogue."""

    record: ModelFile
    """Its record there."""
    source: Path
    """Where it lies."""
    card: Path
    """Where its card lies, if it has one."""


def publish_generator(
    config: PublishGeneratorConfig,
    run: Run,
    *,
    generator: Path | None = None,
    earlier: Path | None = None,
) -> dict[str, float]:
    """Write the catalogue with the tuned files in it, and their bytes and card under `models/`.

    A workflow names its files, so a name once given stays that file's: another one that comes under
    it later is numbered.

    Args:
        config: Which catalogue to add to, and which of the tuned files.
        run: Where to write.
        generator: What `tune_generator` wrote: `files.json`, `models/<folder>/<name>`, `README.md`;
            without it, none joins.
        earlier: Folder of this stage: the files of its overlay join first.

    Raises:
        ValueError: A file is missing, or is not what its record says.
    """
    joining: dict[Address, Joining] = {}
    if earlier is not None:
        joining.update({_address(item.record): item for item in _overlay(earlier)})
    if generator is not None:
        for item in _tuned(config, generator):
            named = _named(item.record, joining)
            joining[_address(named)] = dataclasses.replace(item, record=named)

    records = [item.record for item in joining.values()]
    catalogue = Catalogue.load(config.catalogue).with_files(records)
    for item in joining.values():
        target = run.out / "models" / item.record.folder / item.record.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item.source, target)
        if item.card.is_file():
            shutil.copyfile(item.card, target.with_suffix(".md"))
    save_catalogue(run.out / CATALOGUE_FILE, catalogue)
    return {"catalogue/files": float(len(catalogue.files))}


def _overlay(folder: Path) -> Iterator[Joining]:
    """The files of a published catalogue that are not shipped ones."""
    for record in Catalogue.load(folder / CATALOGUE_FILE).files:
        path = folder / "models" / record.folder / record.name
        if path.is_file():
            yield Joining(record, path, path.with_suffix(".md"))


def _tuned(config: PublishGeneratorConfig, generator: Path) -> Iterator[Joining]:
    files = read_files(generator)
    for role in config.roles:
        if role not in files:
            raise ValueError(
                f"roles: got {role!r}, expected what {generator / FILES} has: {', '.join(files)}"
            )
        yield Joining(*files[role], generator / CARD)


def _named(record: ModelFile, joining: Mapping[Address, Joining]) -> ModelFile:
    """The record under the first of `name`, `name-2`, ... that is no other file's."""
    path, number, named = PurePath(record.name), 1, record
    while (there := joining.get(_address(named))) and there.record.sha256 != record.sha256:
        number += 1
        named = dataclasses.replace(record, name=f"{path.stem}-{number}{path.suffix}")
    return named


def _address(record: ModelFile) -> Address:
    return record.folder, record.name

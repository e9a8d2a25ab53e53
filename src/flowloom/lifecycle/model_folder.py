"""The folder of a registered model: all that is needed to design, and nothing outside it.

model/  adapter/  reward/     designer, its tuned weights, reward ensemble
vocabulary.json  catalogue.json.gz  models/     what designs are made of
policies.json                 the policies that are no network: best fixed, retrieval
evaluation.json  config.json  card.md     how good it is, what it was made from, for a reader
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowloom import __version__
from flowloom.lifecycle.model_card import card, count_data
from flowloom.runs import data_md5, input_digest, write_json


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the folder is laid out: what stands for a configuration in the `register` stage's key."""

    version: int = 1


PARTS = ("catalogue", "triplets", "designer", "adapter", "reward", "evaluation")
"""Stage artifacts that the folder is built from."""


def build_model_folder(out: Path, parts: Mapping[str, Path]) -> None:
    """Write the registered model's folder to `out`.

    Args:
        out: An empty folder.
        parts: The artifact folder of each of `PARTS`.

    Raises:
        ValueError: If a part or a file of it is missing.
    """
    from flowloom.designer.baselines import stored_policies
    from flowloom.workflow.catalogue import Catalogue

    for name in PARTS:
        if name not in parts or not parts[name].is_dir():
            raise ValueError(f"register: got no folder for {name!r}, expected an artifact")
    for name, part in (("model", "designer"), ("adapter", "adapter"), ("reward", "reward")):
        shutil.copytree(parts[part], out / name)
    _copy(parts["designer"] / "vocabulary.json", out)
    _copy(parts["catalogue"] / "catalogue.json.gz", out)
    overlay = parts["catalogue"] / "models"
    if overlay.is_dir():
        shutil.copytree(overlay, out / "models")
    (out / "models").mkdir(exist_ok=True)
    _copy(parts["evaluation"] / "evaluation.json", out)

    evaluation = json.loads((out / "evaluation.json").read_text())
    _require(parts["triplets"] / "best_fixed.json")
    write_json(out / "policies.json", stored_policies(parts["triplets"]))
    made_from = {name: input_digest(parts[name]) for name in PARTS}
    record: dict[str, Any] = {
        "layout": Layout().version,
        "flowloom": __version__,
        "catalogue": Catalogue.load(out / "catalogue.json.gz").hash,
        "data": data_md5(),
        "made_from": made_from,
    }
    if "guidance" in evaluation:
        record["guidance"] = evaluation["guidance"]
    write_json(out / "config.json", record)
    data = count_data(parts["triplets"])
    (out / "card.md").write_text(card(record, evaluation, data))


def _require(source: Path) -> None:
    if not source.is_file():
        where = str(source.parent)
        raise ValueError(f"register: got no {source.name} in {where!r}, expected the file")


def _copy(source: Path, folder: Path) -> None:
    _require(source)
    shutil.copyfile(source, folder / source.name)

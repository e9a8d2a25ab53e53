"""Model files on disk: found by catalogue, checked, loaded once, LoRAs merged."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from flowloom.runs import data_dir
from flowloom.shapes.model import ShapesModel, apply_lora, load, load_lora
from flowloom.workflow import Catalogue, ModelFile

CATALOGUE_FILE = "catalogue.json.gz"


class Patch(NamedTuple):
    """A LoRA on a model: file name, strength on the transformer, strength on the text encoder."""

    lora: str
    strength_model: float
    strength_clip: float


class ModelStore:
    """Checkpoints and LoRAs of a catalogue. Every file's sha256 is checked once per process."""

    def __init__(self, catalogue: Catalogue, roots: Sequence[Path], max_merged: int = 32):
        """Take a catalogue and the folders that hold `checkpoints/` and `loras/`.

        Args:
            catalogue: Names and digests of the files.
            roots: Folders to look in, in this order.
            max_merged: Models with merged LoRAs to keep in memory.
        """
        self.catalogue = catalogue
        self.roots = [Path(root) for root in roots]
        self._max_merged = max_merged
        self._paths: dict[tuple[str, str], Path] = {}
        self._checkpoints: dict[str, ShapesModel] = {}
        self._loras: dict[str, dict[str, Tensor]] = {}
        self._merged: OrderedDict[tuple[str, tuple[Patch, ...]], ShapesModel] = OrderedDict()

    @classmethod
    def open(cls, catalogue_dir: str | Path | None = None) -> ModelStore:
        """Open a folder with a catalogue and an overlay `models/`; None is the shipped world.

        Raises:
            ValueError: The folder holds no catalogue.
        """
        shipped = data_dir() / "models"
        if catalogue_dir is None:
            return cls(Catalogue.load("embedded"), [shipped])
        folder = Path(catalogue_dir)
        if not (folder / CATALOGUE_FILE).is_file():
            raise ValueError(
                f"catalogue: got {str(folder)!r}, expected a folder with {CATALOGUE_FILE}"
            )
        return cls(Catalogue.load(folder / CATALOGUE_FILE), [folder / "models", shipped])

    def path(self, folder: str, name: str) -> Path:
        """Where a file of the catalogue lies, its digest checked.

        Where several roots hold the name, the one with the catalogue's digest counts.

        Raises:
            ValueError: The catalogue has no such file, it lies nowhere, or its bytes are others.
        """
        if (folder, name) not in self._paths:
            self._paths[folder, name] = self._find(folder, name)
        return self._paths[folder, name]

    def _find(self, folder: str, name: str) -> Path:
        file = self.catalogue.file(folder, name)
        if file is None:
            known = ", ".join(f.name for f in self.catalogue.files_in(folder)) or "none"
            raise ValueError(f"{folder}: got {name!r}, expected one of: {known}")
        places = [root / folder / name for root in self.roots]
        found = [place for place in places if place.is_file()]
        for place in found:
            if _sha256(place) == file.sha256:
                return place
        if not found:
            raise ValueError(
                f"{folder}/{name}: no such file in {', '.join(str(r) for r in self.roots)}; "
                "`dvc pull` fetches the shipped models"
            )
        raise ValueError(
            f"{found[0]}: got sha256 {_sha256(found[0])[:12]}, expected {file.sha256[:12]} as in "
            "the catalogue; `dvc checkout --force` restores the shipped models"
        )

    def checkpoint(self, name: str) -> ShapesModel:
        """A loaded checkpoint; not to be changed."""
        if name not in self._checkpoints:
            self._checkpoints[name] = load(self.path("checkpoints", name))
        return self._checkpoints[name]

    def lora(self, name: str) -> dict[str, Tensor]:
        """A loaded LoRA's tensors."""
        if name not in self._loras:
            self._loras[name] = load_lora(self.path("loras", name))
        return self._loras[name]

    def touches_text(self, name: str) -> bool:
        """Whether a LoRA changes the text encoder."""
        return any(key.startswith("text.") for key in self.lora(name))

    def model(self, checkpoint: str, patches: tuple[Patch, ...] = ()) -> ShapesModel:
        """A checkpoint with LoRAs merged in, in their order; not to be changed."""
        if not patches:
            return self.checkpoint(checkpoint)
        key = (checkpoint, patches)
        if key in self._merged:
            self._merged.move_to_end(key)
            return self._merged[key]
        merged = self.checkpoint(checkpoint)
        for patch in patches:
            merged = apply_lora(
                merged, self.lora(patch.lora), patch.strength_model, patch.strength_clip
            )
        self._merged[key] = merged
        while len(self._merged) > self._max_merged:
            self._merged.popitem(last=False)
        return merged


def save_catalogue(path: str | Path, catalogue: Catalogue) -> None:
    """Write a catalogue as .json.gz whose bytes depend on its content only."""
    text = json.dumps(catalogue.to_json(), sort_keys=False).encode()
    Path(path).write_bytes(gzip.compress(text, mtime=0))


def file_record(path: Path, folder: str, **facts: str) -> ModelFile:
    """The catalogue's record of a model file on disk."""
    return ModelFile(folder=folder, name=path.name, sha256=_sha256(path), **facts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Model files on disk: found by catalogue, checked, loaded once, LoRAs and merges applied."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowloom.render.files import check_name, read_checkpoint, read_lora, read_upscaler
from flowloom.runs import data_dir
from flowloom.shapes.model import ShapesModel, apply_lora
from flowloom.shapes.upscaler import Upscaler
from flowloom.workflow import Catalogue, ModelFile

CATALOGUE_FILE = "catalogue.json.gz"
MAX_CHECKPOINTS = 8
"""Checkpoints that may go into one model."""


class Patch(NamedTuple):
    """A LoRA on one part of a model: its file name and its strength there."""

    lora: str
    strength: float


class Merge(NamedTuple):
    """Two transformers: first * ratio + second * (1 - ratio)."""

    first: Weights
    second: Weights
    ratio: float


class Weights(NamedTuple):
    """What one part of a model is made of: its transformer, or its text encoder."""

    base: str | Merge
    """A checkpoint's file name, or a merge (transformers only)."""
    patches: tuple[Patch, ...] = ()
    """LoRAs by name, each once, none of strength 0: they are sums, so their order is none."""

    def patched(self, lora: str, strength: float) -> Weights:
        """With one more LoRA; the same file twice adds up."""
        strengths = {patch.lora: patch.strength for patch in self.patches}
        strengths[lora] = strengths.get(lora, 0.0) + strength
        patches = (Patch(name, strengths[name]) for name in sorted(strengths))
        return Weights(self.base, tuple(patch for patch in patches if patch.strength))

    def merged(self, other: Weights, ratio: float) -> Weights:
        """Of two transformers, `ratio` of this one.

        Raises:
            ValueError: More than `MAX_CHECKPOINTS` would go into it.
        """
        if ratio in (0, 1):
            return self if ratio else other
        merged = Weights(Merge(self, other, ratio))
        if len(merged.checkpoints) > MAX_CHECKPOINTS:
            raise ValueError(
                f"model: got a merge of {len(merged.checkpoints)} checkpoints, "
                f"expected at most {MAX_CHECKPOINTS}"
            )
        return merged

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """File names of the checkpoints in it."""
        if isinstance(self.base, str):
            return (self.base,)
        return self.base.first.checkpoints + self.base.second.checkpoints


class ModelStore:
    """Model files of a catalogue. Every file's sha256 is checked once per process."""

    def __init__(self, catalogue: Catalogue, roots: Sequence[Path], max_merged: int = 32):
        """Take a catalogue and the folders that hold `checkpoints/`, `loras/`, `upscale_models/`.

        Args:
            catalogue: Names and digests of the files.
            roots: Folders to look in, in this order.
            max_merged: Merged and patched models to keep in memory.
        """
        self.catalogue = catalogue
        self.roots = [Path(root) for root in roots]
        self._max_merged = max_merged
        self._paths: dict[tuple[str, str], Path] = {}
        self._checkpoints: dict[str, ShapesModel] = {}
        self._loras: dict[str, dict[str, Tensor]] = {}
        self._upscalers: dict[str, Upscaler] = {}
        self._made: OrderedDict[tuple[str, Weights], ShapesModel] = OrderedDict()

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
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
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
                "`make data` fetches the shipped models, FLOWLOOM_DATA names another data folder"
            )
        raise ValueError(
            f"{found[0]}: got sha256 {_sha256(found[0])[:12]}, expected {file.sha256[:12]} as in "
            "the catalogue; `dvc checkout --force` restores the shipped models"
        )

    def checkpoint(self, name: str) -> ShapesModel:
        """A loaded checkpoint; not to be changed."""
        if name not in self._checkpoints:
            self._checkpoints[name] = read_checkpoint(self.path("checkpoints", name))
        return self._checkpoints[name]

    def lora(self, name: str) -> dict[str, Tensor]:
        """A loaded LoRA's tensors."""
        if name not in self._loras:
            self._loras[name] = read_lora(self.path("loras", name))
        return self._loras[name]

    def upscaler(self, name: str) -> Upscaler:
        """A loaded upscaler; not to be changed."""
        if name not in self._upscalers:
            self._upscalers[name] = read_upscaler(self.path("upscale_models", name))
        return self._upscalers[name]

    def touches_text(self, name: str) -> bool:
        """Whether a LoRA changes the text encoder."""
        return any(key.startswith("text.") for key in self.lora(name))

    def transformer(self, weights: Weights) -> ShapesModel:
        """A model whose transformer is made of `weights`; not to be changed.

        Raises:
            ValueError: A LoRA does not fit the checkpoint, or two checkpoints differ in size.
        """
        return self._model("transformer", weights)

    def text_encoder(self, weights: Weights) -> ShapesModel:
        """A model whose text encoder is made of `weights`; not to be changed.

        Raises:
            ValueError: A LoRA does not fit the checkpoint.
        """
        return self._model("text", weights)

    def _model(self, part: str, weights: Weights) -> ShapesModel:
        if isinstance(weights.base, str) and not weights.patches:
            return self.checkpoint(weights.base)
        key = (part, weights)
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        if isinstance(weights.base, str):
            model = self.checkpoint(weights.base)
        else:
            model = self._merge(weights.base)
        for lora, strength in weights.patches:
            strengths = (strength, 0.0) if part == "transformer" else (0.0, strength)
            try:
                model = apply_lora(model, self.lora(lora), *strengths)
            except ValueError as error:
                raise ValueError(f"loras/{lora}: {error}") from error
        self._made[key] = model
        while len(self._made) > self._max_merged:
            self._made.popitem(last=False)
        return model

    def _merge(self, merge: Merge) -> ShapesModel:
        first, second = self.transformer(merge.first), self.transformer(merge.second)
        if first.config != second.config:
            names = " and ".join((*merge.first.checkpoints[:1], *merge.second.checkpoints[:1]))
            raise ValueError(f"model: got {names} of different sizes, expected equal ones to merge")
        merged = copy.deepcopy(first)
        parts = zip(merged.parameters(), second.parameters(), strict=True)
        with torch.no_grad():
            for parameter, other in parts:
                parameter.mul_(merge.ratio).add_(other, alpha=1 - merge.ratio)
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

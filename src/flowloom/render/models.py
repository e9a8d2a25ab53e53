"""Model files on disk: found by catalogue, checked, loaded once, LoRAs and merges applied."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flowloom.render.files import check_name, read_checkpoint, read_lora, read_upscaler
from flowloom.render.model_records import CATALOGUE_FILE
from flowloom.runs import data_dir, file_sha256
from flowloom.shapes.model import ShapesModel, apply_lora
from flowloom.shapes.upscaler import Upscaler
from flowloom.workflow import Catalogue


class Part(NamedTuple):
    """A checkpoint's share of a model."""

    checkpoint: str
    """File name."""
    share: float
    """Shares of a model sum to 1."""


class Patch(NamedTuple):
    """A LoRA on one part of a model: its file name and its strength there."""

    lora: str
    strength: float


class Weights(NamedTuple):
    """What one part of a model is made of: its transformer, or its text encoder.

    Merging and patching are linear, so whatever nodes did, weights are a sum of checkpoints and
    LoRAs, each once:  W = sum_c share_c W_c + sum_l strength_l B_l A_l.
    """

    parts: tuple[Part, ...]
    """By name; one of share 1 unless merged (transformers only)."""
    patches: tuple[Patch, ...] = ()
    """By name, none of strength 0."""

    @classmethod
    def of(cls, checkpoint: str) -> Weights:
        """Those of a checkpoint as it is."""
        return cls((Part(checkpoint, 1.0),))

    def patched(self, lora: str, strength: float) -> Weights:
        """With one more LoRA; the same file twice adds up."""
        return Weights(self.parts, _summed(Patch, (*self.patches, Patch(lora, strength))))

    def merged(self, other: Weights, ratio: float) -> Weights:
        """Of two transformers: this one times `ratio` plus the other one times 1 - `ratio`."""
        if ratio in (0, 1):
            return self if ratio else other
        scaled = ((weights, factor) for weights, factor in ((self, ratio), (other, 1 - ratio)))
        parts: list[Part] = []
        patches: list[Patch] = []
        for weights, factor in scaled:
            parts += (Part(name, factor * share) for name, share in weights.parts)
            patches += (Patch(name, factor * strength) for name, strength in weights.patches)
        return Weights(_summed(Part, parts), _summed(Patch, patches))


Term = TypeVar("Term", Part, Patch)


def _summed(kind: type[Term], terms: Iterable[Term]) -> tuple[Term, ...]:
    """Each name once, in order, without those of weight 0."""
    sums: dict[str, float] = {}
    for name, weight in terms:
        sums[name] = sums.get(name, 0.0) + weight
    return tuple(kind(name, sums[name]) for name in sorted(sums) if sums[name])


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
            if file_sha256(place) == file.sha256:
                return place
        if not found:
            raise ValueError(
                f"{folder}/{name}: no such file in {', '.join(str(r) for r in self.roots)}; "
                "`make data` fetches the shipped models, FLOWLOOM_DATA names another data folder"
            )
        raise ValueError(
            f"{found[0]}: got sha256 {file_sha256(found[0])[:12]}, expected {file.sha256[:12]} as "
            "in the catalogue; `dvc checkout --force` restores the shipped models"
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
        if len(weights.parts) == 1 and not weights.patches:
            return self.checkpoint(weights.parts[0].checkpoint)
        key = (part, weights)
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        model = self._merge(weights.parts)
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

    def _merge(self, parts: Sequence[Part]) -> ShapesModel:
        models = [self.checkpoint(part.checkpoint) for part in parts]
        for part, model in zip(parts, models, strict=True):
            if model.config != models[0].config:
                names = f"{parts[0].checkpoint} and {part.checkpoint}"
                raise ValueError(
                    f"model: got {names} of different sizes, expected equal ones to merge"
                )
        if len(models) == 1:
            return models[0]
        merged = copy.deepcopy(models[0])
        with torch.no_grad():
            for parameter, *others in zip(
                *(m.parameters() for m in (merged, *models)), strict=True
            ):
                parameter.zero_()
                for part, other in zip(parts, others, strict=True):
                    parameter.add_(other, alpha=part.share)
        return merged

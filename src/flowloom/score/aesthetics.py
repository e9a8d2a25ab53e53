"""LAION's aesthetic score: a small head on the picture's CLIP embedding, about 1 to 10.

score = W5(W4(W3(W2(W1 i)))) with i the CLIP ViT-L/14 embedding of length 1 and layers of widths
768, 1024, 128, 64, 16, 1, each with a bias and nothing between them but dropout, which is off
(github.com/christophschuhmann/improved-aesthetic-predictor). The prompt is not looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.score.clip import Encoder, read_encoder
from flowloom.score.config import AestheticsConfig
from flowloom.score.models import ModelScorer

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTHS = (768, 1024, 128, 64, 16, 1)
"""Of the head."""
LAYERS = (0, 2, 4, 6, 7)
"""Its linear layers among those of its state dict, `layers.<index>`; the others are dropout."""


@dataclasses.dataclass(frozen=True)
class _Loaded:
    encoder: Encoder
    head: list[tuple[Tensor, Tensor]]


class AestheticsScorer(ModelScorer):
    """How pleasing a picture is, whatever was asked for."""

    def __init__(self, config: AestheticsConfig):
        """Take the configuration."""
        super().__init__(config.batch_size)
        self._config = config

    def load(self) -> _Loaded:
        """Encoder and head."""
        # The head first: it fails sooner.
        head = read_head(Path(self._config.head))
        return _Loaded(read_encoder(self._config), head)

    def values(
        self, loaded: _Loaded, prompts: Sequence[str], pictures: Sequence[Image]
    ) -> np.ndarray:
        """The head's values, float32 on the CPU."""
        embeddings_BD = loaded.encoder.pictures(pictures)
        width = embeddings_BD.shape[1]
        if width != WIDTHS[0]:
            raise ValueError(
                f"{self._config.model}: got embeddings of width {width}, expected {WIDTHS[0]}, "
                "those of CLIP ViT-L/14"
            )
        x_BF = embeddings_BD
        for weight, bias in loaded.head:
            x_BF = F.linear(x_BF, weight, bias)
        return x_BF[:, 0].double().numpy()


def read_head(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, from the head's state dict.

    Raises:
        ValueError: There is no such file, it cannot be read, or it is not such a head.
    """
    state = _read_state(path)
    shapes = {}
    for index, (fan_in, fan_out) in zip(LAYERS, itertools.pairwise(WIDTHS), strict=True):
        shapes[f"layers.{index}.weight"] = (fan_out, fan_in)
        shapes[f"layers.{index}.bias"] = (fan_out,)
    for key, shape in shapes.items():
        got = tuple(state[key].shape) if key in state else None
        if got != shape:
            raise ValueError(f"{path}: {key}: got shape {got}, expected {shape}")
    if extra := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"{path}: got {extra[0]!r}, expected only {', '.join(shapes)}")
    parts = [state[key].float() for key in shapes]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"head: got {str(path)!r}, expected a file with the head's state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a reader of pickles raises depends on where it fails
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: expected the head's state dict, got: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: got a {type(state).__name__}, expected the head's state dict")
    return state

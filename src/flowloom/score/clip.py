"""Scores by CLIP models (arXiv 2103.00020): PickScore, HPS v2, prompt alignment.

With i and t the embeddings of picture and prompt, each divided by its length:

    PickScore (arXiv 2305.01569)  exp(logit_scale) * <i, t>   about 18 to 24
    HPS v2 (arXiv 2306.09341)     <i, t>                      about 0.2 to 0.35
    alignment                     <i, t>                      about 0.1 to 0.4

A prompt is cut at the text encoder's length (77 tokens), as these models were trained.

Shapes: B pictures or texts, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.score.config import AlignmentConfig, HPSConfig, ModelConfig, PickScoreConfig
from flowloom.score.models import (
    ModelScorer,
    check_tokenizer,
    device_of,
    read_model,
    read_part,
    shared,
)

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoder:
    """A CLIP model with what prepares its inputs."""

    def __init__(self, config: ModelConfig):
        """Load it.

        Raises:
            ValueError: There is none, or a part lacks.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._tokenizer = read_part(AutoTokenizer, config, "a CLIP tokenizer")
        self._processor = read_part(
            AutoImageProcessor, config, "CLIP's image processor", backend="pil"
        )
        self._model = read_model(CLIPModel, config, "a CLIP model")
        check_tokenizer(self._tokenizer, self._model.config.text_config, config)
        self._device = device_of(config)

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        return float(self._model.logit_scale.float().exp())

    def texts(self, texts: Sequence[str]) -> Tensor:
        """`[B, D]` embeddings of length 1, float32 on the CPU; equal texts are read once."""
        different = list(dict.fromkeys(texts))
        inputs = self._tokenizer(
            different,
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        found = self._model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        places = {text: place for place, text in enumerate(different)}
        return _unit(found)[[places[text] for text in texts]]

    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """`[B, D]` embeddings of length 1, float32 on the CPU."""
        inputs = self._processor(images=list(pictures), return_tensors="pt")
        pixels_BCHW = inputs["pixel_values"].to(self._device, self._model.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels_BCHW))


def read_encoder(config: ModelConfig) -> Encoder:
    """The encoder of a configuration; one of its kind per process."""
    key = ("clip", config.model, config.revision, config.dtype, device_of(config))
    return shared(key, lambda: Encoder(config))


class ClipScorer(ModelScorer):
    """PickScore, HPS v2 or alignment, by its configuration."""

    def __init__(self, config: PickScoreConfig | HPSConfig | AlignmentConfig):
        """Take the configuration."""
        super().__init__(config.batch_size)
        self._config = config

    def load(self) -> Encoder:
        """The encoder."""
        return read_encoder(self._config)

    def values(
        self, loaded: Encoder, prompts: Sequence[str], pictures: Sequence[Image]
    ) -> np.ndarray:
        """The equations at the head of this file."""
        cosines_B = (loaded.texts(prompts) * loaded.pictures(pictures)).sum(1)
        scale = loaded.scale if self._config.kind == "pickscore" else 1.0
        return (scale * cosines_B).double().numpy()


def _unit(found: Any) -> Tensor:
    """Projected embeddings divided by their lengths; transformers 4 gave the tensor itself."""
    embeddings_BD = found if isinstance(found, torch.Tensor) else found.pooler_output
    return F.normalize(embeddings_BD.float(), dim=1).cpu()

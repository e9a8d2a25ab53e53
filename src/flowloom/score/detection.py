"""The GenEval score of a picture by an open-vocabulary detector (see `flowloom.score.geneval`).

Each noun of the prompt is looked for as "a photo of a <noun>" (OWLv2, arXiv 2306.09683) or as
"a <noun>." (Grounding DINO, arXiv 2303.05499), by the layout of the weights; boxes above a
threshold that no stronger one of the same noun covers are the objects. Where the prompt names a
colour, CLIP tells the colour of each object from its part of the picture: the colour whose three
descriptions lie nearest on average. GenEval has closed-vocabulary masks instead of boxes, so its
numbers and these are near, not equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowloom.config import check
from flowloom.score import geneval
from flowloom.score.clip import Encoder, read_encoder
from flowloom.score.config import DetectorConfig
from flowloom.score.geneval import COLORS, Box, Spec
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

_DESCRIPTIONS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_MIN_SIDE = 1.0
"""Pixels below which a box is nothing."""


@dataclasses.dataclass(frozen=True)
class Detector:
    """A detector with what prepares its inputs."""

    model: Any
    processor: Any
    device: str
    phrased: bool
    """Whether all nouns of a picture are one sentence (Grounding DINO), not one query each."""


class DetectorScorer(ModelScorer):
    """How well the objects on a picture answer its prompt."""

    def __init__(self, config: DetectorConfig):
        """Take the configuration."""
        super().__init__(config.batch_size)
        self._config = config
        self._encoder: Encoder | None = None
        self._palettes: dict[str, Tensor] = {}

    def close(self) -> None:
        """Let go of both models."""
        self._encoder = None
        self._palettes.clear()
        super().close()

    def load(self) -> Detector:
        """The detector."""
        config = self._config
        key = ("detector", config.model, config.revision, config.dtype, device_of(config))
        return shared(key, lambda: _read(config))

    def values(
        self, loaded: Detector, prompts: Sequence[str], pictures: Sequence[Image]
    ) -> np.ndarray:
        """`flowloom.score.geneval.judge` of each picture."""
        specs = [geneval.parse(prompt) for prompt in prompts]
        found = self._boxes(loaded, specs, pictures)
        seen = [self._colored(*one) for one in zip(specs, pictures, found, strict=True)]
        strict = self._config.strict
        pairs = zip(specs, seen, strict=True)
        return np.array([geneval.judge(spec, boxes, strict=strict) for spec, boxes in pairs])

    def _boxes(
        self, loaded: Detector, specs: Sequence[Spec], pictures: Sequence[Image]
    ) -> list[list[Box]]:
        """The objects on each picture, their colours not known yet."""
        nouns = [list(dict.fromkeys(wanted.noun for wanted in spec.wanted)) for spec in specs]
        scores, corners = _detect(loaded, nouns, pictures)
        config, result = self._config, []
        for b, spec in enumerate(specs):
            limit = config.threshold
            if spec.exact and config.counting_threshold is not None:
                limit = config.counting_threshold
            scores_QN = scores[b][:, : len(nouns[b])]
            best_Q, noun_Q = scores_QN.max(1)
            boxes = [
                Box(noun=nouns[b][int(noun_Q[q])], score=float(best_Q[q]), corners=tuple(box))
                for q, box in enumerate(_within(corners[b], pictures[b]).tolist())
                if best_Q[q] > limit
                and min(box[2] - box[0], box[3] - box[1]) >= _MIN_SIDE
            ]  # fmt: skip
            result.append(geneval.suppress(boxes, config.max_overlap, config.max_objects))
        return result

    def _colored(self, spec: Spec, picture: Image, boxes: list[Box]) -> list[Box]:
        """The same boxes, with colours where the prompt names one for their noun."""
        tinted = {wanted.noun for wanted in spec.wanted if wanted.color is not None}
        asked = [place for place, box in enumerate(boxes) if box.noun in tinted]
        if not asked:
            return boxes
        if self._encoder is None:
            self._encoder = read_encoder(self._config.colors)
        encoder = self._encoder
        size = self._config.colors.batch_size
        result = list(boxes)
        for first in range(0, len(asked), size):
            places = asked[first : first + size]
            crops = [picture.crop(_pixels(boxes[place])) for place in places]
            seen_BD = encoder.pictures(crops)
            for place, seen_D in zip(places, seen_BD, strict=True):
                cosines_C = self._palette(encoder, boxes[place].noun) @ seen_D
                color = COLORS[int(cosines_C.argmax())]
                result[place] = dataclasses.replace(boxes[place], color=color)
        return result

    def _palette(self, encoder: Encoder, noun: str) -> Tensor:
        """`[C, D]` embeddings of a noun in every colour: means of its descriptions', length 1."""
        if noun not in self._palettes:
            texts = [text.format(color, noun) for color in COLORS for text in _DESCRIPTIONS]
            texts_CTD = encoder.texts(texts).reshape(len(COLORS), len(_DESCRIPTIONS), -1)
            self._palettes[noun] = F.normalize(texts_CTD.mean(1), dim=1)
        return self._palettes[noun]


def _detect(
    loaded: Detector, nouns: Sequence[Sequence[str]], pictures: Sequence[Image]
) -> tuple[Tensor, Tensor]:
    """Confidence `[B, Q, N]` of each box for each noun, and its corners `[B, Q, 4]` in [0, 1].

    Corners are shares of the picture as the detector saw it: OWLv2's is padded to a square.
    """
    if loaded.phrased:
        # One by one: beside a larger picture or a longer text the model sees other padding, and
        # then answers differently.
        found = [_detect_phrases(loaded, *one) for one in zip(nouns, pictures, strict=True)]
        scores = pad_sequence([scores_QN.T for scores_QN, _ in found], batch_first=True)
        return scores.transpose(1, 2), torch.stack([corners_Q4 for _, corners_Q4 in found])
    num = max(len(names) for names in nouns)
    # All pictures have as many queries; the surplus is not looked at.
    queries = [
        [f"a photo of a {noun}" for noun in [*names, *[names[0]] * num][:num]] for names in nouns
    ]
    inputs = loaded.processor(
        text=queries, images=list(pictures), return_tensors="pt", truncation=True
    ).to(loaded.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    found = loaded.model(**inputs)
    corners = _corners(found.pred_boxes)
    for b, picture in enumerate(pictures):
        # Boxes of the padded square become shares of the picture's own sides.
        side = max(picture.size)
        corners[b] *= torch.tensor([side / picture.width, side / picture.height] * 2)
    return found.logits.float().sigmoid().cpu(), corners


def _detect_phrases(
    loaded: Detector, nouns: Sequence[str], picture: Image
) -> tuple[Tensor, Tensor]:
    """Grounding DINO: a noun's confidence is the highest among its tokens of the sentence."""
    text = " ".join(f"a {noun}." for noun in nouns)
    inputs = loaded.processor(text=[text], images=[picture], return_tensors="pt").to(loaded.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    found = loaded.model(**inputs)
    scores_QT = found.logits[0].float().sigmoid().cpu()
    places = loaded.processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    columns, start = [], 0
    for noun in nouns:
        start, end = start + 2, start + 2 + len(noun)
        inside = [t for t, (left, right) in enumerate(places) if start <= left < right <= end]
        columns.append(scores_QT[:, inside].max(1).values)
        start = end + 2
    return torch.stack(columns, 1), _corners(found.pred_boxes)[0]


def _corners(boxes_BQ4: Tensor) -> Tensor:
    """Left, top, right and bottom from centre, width and height; float32 on the CPU."""
    centers, sizes = boxes_BQ4.float().cpu().split(2, dim=-1)
    return torch.cat([centers - sizes / 2, centers + sizes / 2], -1)


def _within(corners_Q4: Tensor, picture: Image) -> Tensor:
    """Corners in pixels, inside the picture."""
    limits = torch.tensor([picture.width, picture.height] * 2, dtype=torch.float32)
    return torch.minimum((corners_Q4 * limits).clamp(min=0), limits)


def _pixels(box: Box) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches."""
    left, top, right, bottom = box.corners
    return int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))


def _read(config: DetectorConfig) -> Detector:
    from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoProcessor

    what = "an open-vocabulary detector"
    model = read_model(AutoModelForZeroShotObjectDetection, config, what)
    known = ("owlv2", "grounding-dino")
    layout = model.config.model_type
    check(layout in known, f"{config.model}: layout", layout, f"one of {', '.join(known)}")
    processor = read_part(AutoProcessor, config, "the detector's processor")
    check_tokenizer(processor.tokenizer, model.config.text_config, config)
    processor.image_processor = read_part(
        AutoImageProcessor, config, "the detector's image processor", backend="pil"
    )
    return Detector(model, processor, device_of(config), phrased=layout == "grounding-dino")

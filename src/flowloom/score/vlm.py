"""P(yes): how surely a vision-language model says that a picture shows its prompt.

The model reads the picture and a question, in its own chat template. With p its distribution over
the first token of the answer, and Y and N the first tokens of the words for yes and no:

    over answers:     P(yes) = p(Y) / (p(Y) + p(N))
    over vocabulary:  P(yes) = p(Y)

(VQAScore, arXiv 2404.01291, is the second.) Written for the layout of Qwen2.5-VL; any model with a
chat template that transformers' AutoModelForImageTextToText loads will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowloom.score.config import VLMConfig
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


@dataclasses.dataclass(frozen=True)
class Reader:
    """A vision-language model with what prepares its inputs."""

    model: Any
    processor: Any
    device: str


class VLMScorer(ModelScorer):
    """P(yes) of a question about each picture."""

    def __init__(self, config: VLMConfig):
        """Take the configuration."""
        super().__init__(config.batch_size)
        self._config = config

    def load(self) -> tuple[Reader, list[int], list[int]]:
        """The model, and the first tokens of its answers."""
        config = self._config
        key = ("vlm", config.model, config.revision, config.dtype, device_of(config))
        reader = shared(key, lambda: _read(config))
        tokens = [self._first_tokens(reader, words) for words in (config.yes, config.no)]
        if both := set(tokens[0]) & set(tokens[1]):
            shown = reader.processor.tokenizer.convert_ids_to_tokens(sorted(both))
            raise ValueError(
                f"{config.model}: got answers {config.yes} and {config.no}, which both begin with "
                f"the token {shown[0]!r}, expected different first tokens"
            )
        return reader, tokens[0], tokens[1]

    def values(
        self,
        loaded: tuple[Reader, list[int], list[int]],
        prompts: Sequence[str],
        pictures: Sequence[Image],
    ) -> np.ndarray:
        """The equations at the head of this file."""
        reader, yes, no = loaded
        inputs = reader.processor(
            text=[self._chat(reader, prompt) for prompt in prompts],
            images=[[picture] for picture in pictures],
            padding=True,
            return_tensors="pt",
        ).to(reader.device)
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            inputs["pixel_values"] = pixels.to(reader.model.dtype)
        # Padding is on the left, so that the answer follows the last column of every row.
        logits_BV = reader.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        yes_B, no_B = logits_BV[:, yes].logsumexp(1), logits_BV[:, no].logsumexp(1)
        if self._config.over == "vocabulary":
            return (yes_B - logits_BV.logsumexp(1)).exp().double().cpu().numpy()
        return torch.sigmoid(yes_B - no_B).double().cpu().numpy()

    def _chat(self, reader: Reader, prompt: str) -> str:
        """The question about a prompt, as the model's chat template puts it."""
        content = [
            {"type": "image"},
            {"type": "text", "text": self._config.question.replace("{prompt}", prompt)},
        ]
        turns = [{"role": "user", "content": content}]
        return reader.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )

    def _first_tokens(self, reader: Reader, words: Sequence[str]) -> list[int]:
        """First token of each word, each token once."""
        encode = reader.processor.tokenizer.encode
        return sorted({encode(word, add_special_tokens=False)[0] for word in words})


def _read(config: VLMConfig) -> Reader:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    try:
        processor = read_part(AutoProcessor, config, "a processor of pictures and text")
    except ImportError:
        # Qwen's prepares videos too, by torchvision; pictures do not need it.
        processor = _without_videos(config)
    image_processor = read_part(AutoImageProcessor, config, "an image processor", backend="pil")
    processor.image_processor = image_processor
    processor.tokenizer.padding_side = "left"
    if not processor.chat_template:
        raise ValueError(f"{config.model}: got a processor without a chat template, expected one")
    model = read_model(AutoModelForImageTextToText, config, "a vision-language model")
    check_tokenizer(processor.tokenizer, model.config.get_text_config(), config)
    return Reader(model, processor, device_of(config))


def _without_videos(config: VLMConfig) -> Any:
    """The processor of a model with image processor and tokenizer alone."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING[type(read_part(AutoConfig, config, "a configuration"))]

    class Pictures(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = read_part(AutoTokenizer, config, "a tokenizer")
    return Pictures(
        image_processor=read_part(AutoImageProcessor, config, "an image processor", backend="pil"),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )

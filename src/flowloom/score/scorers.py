"""Scorers: functions of prompts, pictures and counted costs.

Those of the shapes world are here, with values in [0, 1]; those with a model have modules of their
own. A new one is a function here and a `Term` in a rubric (`flowloom.score.rubric`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from flowloom.shapes import detector
from flowloom.shapes.prompts import MAX_TOKENS, PromptSpec, parse, word_list
from flowloom.shapes.redrawing import redrawing_errors

Scorer = Callable[[Sequence[str], Any, np.ndarray], np.ndarray]
"""`(prompts, images, flops_B) -> values_B`; pictures in [-1, 1], one tensor `[B, 3, 32, 32]` where
the term is native, else a list of `[3, H, W]`."""
THRIFT_FLOPS = 1e9
"""Cost at which `thrift` is a half."""
LIKENESS_ERROR = 0.03
"""Mean squared error at which `likeness` is 1 / e: about that of one missing small red circle."""
MAX_WORDS = MAX_TOKENS - 1
"""The models read no more of a prompt: one token is the start."""
MAX_CHARACTERS = 400


def faithfulness(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """How well the shapes on a picture answer its prompt (`shapes.detector.score`).

    Raises:
        ValueError: A prompt is longer than `MAX_WORDS`, or outside the grammar of the shapes world.
        FloatingPointError: A picture is not finite.
    """
    return detector.score(images_BCHW, [read_prompt(text) for text in prompts]).double().numpy()


def crispness(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """How pure the colours are (`shapes.detector.crispness`)."""
    return detector.crispness(images_BCHW).double().numpy()


def thrift(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """1 / (1 + flops / THRIFT_FLOPS): 1 for free, 1/2 at a thousand million."""
    return 1 / (1 + flops_B / THRIFT_FLOPS)


def likeness(prompts: Sequence[str], images_BCHW: Tensor, flops_B: np.ndarray) -> np.ndarray:
    """exp(-e / LIKENESS_ERROR), e the squared error to a clean drawing of what a prompt asks for.

    Pixels count, where `faithfulness` forgives much: a judge for pictures that were tuned on that.

    Raises:
        ValueError: A prompt is outside the grammar of the shapes world.
        FloatingPointError: A picture is not finite.
    """
    specs = [read_prompt(text) for text in prompts]
    errors = redrawing_errors(images_BCHW, specs, detector.detect(images_BCHW))
    return np.exp(-errors["asked"] / LIKENESS_ERROR)


@lru_cache(maxsize=4096)
def read_prompt(text: str) -> PromptSpec:
    """What a prompt of the shapes world asks for.

    Raises:
        ValueError: It is longer than `MAX_WORDS` or `MAX_CHARACTERS`, or outside the grammar; names
            the place.
    """
    num_words = len(word_list(text))
    if num_words > MAX_WORDS or len(text) > MAX_CHARACTERS:
        shown = text if len(text) <= 60 else text[:60] + "..."
        raise ValueError(
            f"prompt {shown!r}: got {num_words} words and {len(text)} characters, expected at most "
            f"{MAX_WORDS} and {MAX_CHARACTERS}"
        )
    return parse(text)

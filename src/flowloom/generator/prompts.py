"""Prompts to tune on and held-out ones: of the shapes world, or lines of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from flowloom.dataset.prompt_files import read_prompts
from flowloom.generator.config import PromptsConfig
from flowloom.shapes import prompts as language

MAX_DRAWS = 30
HOLDOUT_FRAC = 0.1
"""Share of a file's prompts that are never tuned on."""


def draw_prompts(
    config: PromptsConfig, split: str, count: int, entropy: Sequence[int]
) -> list[str]:
    """`count` prompts of one split, `train` or `holdout`; a function of `entropy`.

    Raises:
        ValueError: The file of prompts is missing, or has none of this split.
    """
    rng = np.random.default_rng(entropy)
    if config.file is None:
        return _draw_shapes(config, split, count, rng)
    known = _read(config.file, split)
    # Whole rounds first, so that no prompt comes twice before each has come once.
    rounds = [rng.permutation(len(known)) for _ in range(-(-count // len(known)))]
    return [known[row] for row in np.concatenate(rounds)[:count].tolist()]


def _draw_shapes(
    config: PromptsConfig, split: str, count: int, rng: np.random.Generator
) -> list[str]:
    """Kinds in turn; a kind's meanings differ until it has no more of them to offer."""
    specs: list[language.PromptSpec] = []
    while len(specs) < count:
        kind = config.kinds[len(specs) % len(config.kinds)]
        drawn = {spec.meaning for spec in specs}
        found = []
        while not found or (found[-1].meaning in drawn and len(found) < MAX_DRAWS):
            spec = language.sample_prompt(rng, kinds=(kind,), shapes=config.shapes)
            found += [spec] if language.split_of(spec) == split else []
        specs.append(found[-1])
    return [spec.text for spec in specs]


def _read(file: str, split: str) -> list[str]:
    """The file's prompts of a split, which is a function of a prompt's words alone."""
    known = [given.text for given in read_prompts(file) if _split_of(given.text) == split]
    if not known:
        raise ValueError(f"prompts.file: got no {split} prompt in {file!r}, expected at least one")
    return known


def _split_of(prompt: str) -> str:
    words = " ".join(prompt.lower().split())
    share = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4]) / 2**32
    return "holdout" if share < HOLDOUT_FRAC else "train"

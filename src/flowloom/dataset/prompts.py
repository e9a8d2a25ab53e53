"""Prompt lists of the shapes world, split by meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from flowloom.shapes.prompts import KINDS, PromptSpec, prompt_concepts, sample_prompt
from flowloom.shapes.prompts import split_of as holdout_of

SPLITS = ("train", "calibration", "test")
CALIBRATION_FRAC = 0.15
# Of 6,000 salts this one takes the most even share of every kind and family that is not held out,
# and leaves "a circle", "a square" and the like to training.
_SALT = 3092
FEW_OBJECTS = 3
Concept = tuple[str, str, str, str]
_MAX_TRIES = 4000


def split_of(spec: PromptSpec) -> str:
    """Split of a meaning: held-out ones are `test`, a fixed share of the others `calibration`."""
    if holdout_of(spec) == "holdout":
        return "test"
    digest = hashlib.sha256(f"calibration/{_SALT}/{spec.meaning}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") / 2**64
    return "calibration" if bucket < CALIBRATION_FRAC else "train"


def draw_prompts(split: str, num: int, kinds: Sequence[str], seed: int) -> list[PromptSpec]:
    """Draw different prompts of one split, kinds in turn, so that every prefix is balanced.

    Args:
        split: One of `SPLITS`.
        num: How many.
        kinds: Kinds to take, each as often as the others.
        seed: Seed of the list.

    Raises:
        ValueError: An unknown split or kind, or a kind has too few prompts in the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: got {kind!r}, expected one of {', '.join(KINDS)}")
    per_kind = [
        _draw_kind(split, -(-num // len(kinds)), kind, (seed, SPLITS.index(split), place))
        for place, kind in enumerate(kinds)
    ]
    in_turn = [spec for specs in zip(*per_kind, strict=True) for spec in specs]
    return in_turn[:num]


def draw_unrendered(num: int, kinds: Sequence[str], seed: int) -> list[PromptSpec]:
    """Draw train prompts for policy optimisation, which renders nothing and so may have many.

    Args:
        num: How many; a kind with fewer different prompts repeats them.
        kinds: Kinds to take in turn, each as often as the others.
        seed: Seed of the list.
    """
    per_kind = -(-num // len(kinds))
    columns = []
    for place, kind in enumerate(kinds):
        found = list(_different("train", per_kind, kind, (seed, len(SPLITS), place)))
        columns.append([found[k % len(found)] for k in range(per_kind)])
    return [spec for specs in zip(*columns, strict=True) for spec in specs][:num]


def concept_of(spec: PromptSpec) -> Concept:
    """What prompts share that want the same workflows: kind, families, few or many."""
    concepts = prompt_concepts(spec)
    num_objects = sum(item.count for item in spec.objects)
    number = "few" if num_objects <= FEW_OBJECTS else "many"
    return spec.kind, concepts["shapes"], concepts["colors"], number


def _draw_kind(split: str, num: int, kind: str, seed: tuple[int, ...]) -> list[PromptSpec]:
    found = list(_different(split, num, kind, seed))
    if len(found) < num:
        raise ValueError(
            f"prompts: got {len(found)} of kind {kind!r} in the split {split!r}, expected {num}"
        )
    return found


def _different(split: str, num: int, kind: str, seed: tuple[int, ...]) -> Iterator[PromptSpec]:
    """Up to `num` prompts of a kind and split, each once, until no new one turns up."""
    rng = np.random.default_rng(seed)
    known: set[str] = set()
    tries = 0
    while len(known) < num and tries <= _MAX_TRIES:
        spec = sample_prompt(rng, kinds=(kind,))
        tries += 1
        if split_of(spec) == split and spec.text not in known:
            known.add(spec.text)
            tries = 0
            yield spec

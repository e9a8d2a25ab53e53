"""Prompt lists, split by meaning: drawn from the shapes world, or a person's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from flowloom.dataset.config import PromptsConfig
from flowloom.dataset.prompt_files import GivenPrompt, read_prompts
from flowloom.dataset.splits import bucket
from flowloom.dataset.tokenizer import split_words
from flowloom.shapes.prompts import (
    HOLDOUT_FRAC,
    KINDS,
    SPLIT_SEED,
    WORDINGS,
    PromptSpec,
    opening_of,
    parse,
    prompt_concepts,
    sample_prompt,
    wording_of,
)
from flowloom.shapes.prompts import split_of as holdout_of

SPLITS = ("train", "calibration", "test")
CALIBRATION_FRAC = 0.15
# Of 8,000 salts this one takes the most even share of every kind and family that is not held out
# (8 to 25 %), and leaves the plainest prompts ("a star", "a square") to training.
_SALT = 4783
FEW_OBJECTS = 3
OTHER_KIND = "other"
"""Kind of a person's prompt that says none and is outside the shapes language."""
Concept = tuple[str, str, str, str]
MAX_GIVEN = 10_000_000
_ARTICLES = frozenset({"a", "an", "the"})
_MAX_TRIES = 4000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a list."""

    text: str
    """The wording."""
    kind: str
    """A kind of the shapes language, what the file says, or `OTHER_KIND`."""
    split: str
    """One of `SPLITS`, by meaning."""
    wording: str
    """`train` or `held_out`: whether its opening is one that models are trained on."""
    spec: PromptSpec | None = None
    """What it means in the shapes language; None outside."""
    place: str = ""
    """`FILE:LINE` of a person's prompt."""

    def shapes(self) -> PromptSpec:
        """What it means in the shapes language.

        Raises:
            ValueError: It is outside the language, so nothing can score a picture of it.
        """
        if self.spec is None:
            where = self.place or f"prompt {self.text!r}"
            raise ValueError(
                f"{where}: got a prompt outside the shapes language, expected one inside where "
                f"pictures are scored ({_fault(self.text)})"
            )
        return self.spec


def split_of(spec: PromptSpec) -> str:
    """Split of a meaning: held-out ones are `test`, a fixed share of the others `calibration`."""
    if holdout_of(spec) == "holdout":
        return "test"
    return (
        "calibration" if bucket("calibration", spec.meaning, _SALT) < CALIBRATION_FRAC else "train"
    )


def content_words(text: str) -> str:
    """The words of a prompt without opening and articles, in lower case.

    Prompts with the same ones say the same in the same words; a text without words is itself.
    """
    words = split_words(text)[len(opening_of(text)) :]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or text


def list_prompts(lists: PromptsConfig, split: str, num: int | None = None) -> list[Prompt]:
    """The prompts of one split: drawn, or those of the configuration's file.

    Args:
        lists: What to draw, or which file.
        split: One of `SPLITS`.
        num: How many; by default the configuration's number for the split. A file may have fewer.

    Raises:
        ValueError: A kind has too few prompts in the split, or the file cannot be read.
    """
    _check_split(split)
    numbers = (lists.num_train, lists.num_calibration, lists.num_test)
    wanted = numbers[SPLITS.index(split)] if num is None else num
    if lists.prompts_file is None:
        return as_prompts(draw_prompts(split, wanted, lists.kinds, lists.seed))
    given = [_as_given(prompt) for prompt in read_prompts(lists.prompts_file)]
    return [prompt for prompt in given if prompt.split == split][:wanted]


def count_given(lists: PromptsConfig) -> dict[str, int]:
    """How many prompts of the configuration's file are in each split, whatever number is taken."""
    return {split: len(list_prompts(lists, split, MAX_GIVEN)) for split in SPLITS}


def as_prompts(specs: Sequence[PromptSpec]) -> list[Prompt]:
    """Prompts of the shapes language as rows of a list."""
    return [
        Prompt(
            text=spec.text,
            kind=spec.kind,
            split=split_of(spec),
            wording=wording_of(spec.text),
            spec=spec,
        )
        for spec in specs
    ]


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
    _check_split(split)
    _check_kinds(kinds)
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
    return _draw_repeating("train", num, kinds, (seed, len(SPLITS)), "train")


def draw_held_out(num: int, kinds: Sequence[str], seed: int) -> list[PromptSpec]:
    """Draw prompts of held-out meanings, by turns in a trained and in a held-out wording.

    Args:
        num: How many; a kind with fewer different prompts repeats them.
        kinds: Kinds to take in turn, each as often as the others.
        seed: Seed of the list.
    """
    half = -(-num // (2 * len(kinds))) * len(kinds)
    columns = [
        _draw_repeating("test", half, kinds, (seed, len(SPLITS) + 1 + k), wording)
        for k, wording in enumerate(WORDINGS)
    ]
    turns = range(0, half, len(kinds))
    return [spec for at in turns for specs in columns for spec in specs[at : at + len(kinds)]][:num]


def concept_of(spec: PromptSpec) -> Concept:
    """What prompts share that want the same workflows: kind, families, few or many."""
    concepts = prompt_concepts(spec)
    num_objects = sum(item.count for item in spec.objects)
    number = "few" if num_objects <= FEW_OBJECTS else "many"
    return spec.kind, concepts["shapes"], concepts["colors"], number


def _as_given(prompt: GivenPrompt) -> Prompt:
    try:
        spec = parse(prompt.text)
    except ValueError:
        held_out = bucket("prompt", content_words(prompt.text), SPLIT_SEED)
        split = "test" if held_out < HOLDOUT_FRAC else "train"
        if split == "train":
            calibration = bucket("calibration", content_words(prompt.text), _SALT)
            split = "calibration" if calibration < CALIBRATION_FRAC else "train"
        spec, kind = None, OTHER_KIND
    else:
        split, kind = split_of(spec), spec.kind
    return Prompt(
        text=prompt.text,
        kind=prompt.kind or kind,
        split=split,
        wording=wording_of(prompt.text),
        spec=spec,
        place=prompt.place,
    )


def _fault(text: str) -> str:
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return ""


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")


def _check_kinds(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: got {kind!r}, expected one of {', '.join(KINDS)}")


def _draw_kind(split: str, num: int, kind: str, seed: tuple[int, ...]) -> list[PromptSpec]:
    found = list(_different(split, num, kind, seed, "train"))
    if len(found) < num:
        raise ValueError(
            f"prompts: got {len(found)} of kind {kind!r} in the split {split!r}, expected {num}"
        )
    return found


def _draw_repeating(
    split: str, num: int, kinds: Sequence[str], seed: tuple[int, ...], wording: str
) -> list[PromptSpec]:
    """Kinds in turn; a kind with fewer different prompts repeats them."""
    _check_kinds(kinds)
    per_kind = -(-num // len(kinds))
    columns = []
    for place, kind in enumerate(kinds):
        found = list(_different(split, per_kind, kind, (*seed, place), wording))
        columns.append([found[k % len(found)] for k in range(per_kind)])
    return [spec for specs in zip(*columns, strict=True) for spec in specs][:num]


def _different(
    split: str, num: int, kind: str, seed: tuple[int, ...], wording: str
) -> Iterator[PromptSpec]:
    """Up to `num` prompts of a kind and split, each once, until no new one turns up."""
    rng = np.random.default_rng(seed)
    known: set[str] = set()
    tries = 0
    while len(known) < num and tries <= _MAX_TRIES:
        spec = sample_prompt(rng, kinds=(kind,), wording=wording)
        tries += 1
        if split_of(spec) == split and spec.text not in known:
            known.add(spec.text)
            tries = 0
            yield spec

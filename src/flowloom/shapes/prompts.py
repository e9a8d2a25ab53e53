"""The prompt language of the shapes world: sampling, reading, token ids, splits by meaning.

    prompt  := [opening] body
    single  := a [size] shape                          "a photo of a star"
    colors  := a [size] colour shape                   "a small red circle"
    counting:= number [colour] shape(s)                "three red circles"
    two     := a [size] shape and a [size] shape       "a circle and a large square"
    binding := a [size] colour shape and a [size] colour shape
    position:= a [size] shape relation a [size] shape  "a star left of a square"

The six kinds are those of GenEval (arXiv 2310.11513). Every phrase has synonyms; what a prompt
*means* is the same for all of them, and splits are made by meaning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

KINDS = ("single", "two", "counting", "colors", "position", "binding")
SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("small", "large")
COUNTS = (1, 2, 3, 4, 5, 6)
RELATIONS = ("left", "right", "above", "below")
SHAPE_FAMILIES = {"round": ("circle", "star"), "angular": ("square", "triangle")}
COLOR_FAMILIES = {
    "warm": ("red", "yellow", "orange", "white"),
    "cool": ("green", "blue", "purple", "cyan"),
}
MAX_TOKENS = 16
HOLDOUT_FRAC = 0.25
# A few meanings ("a star") are most of their kind. Of 4,000 salts this one holds out the most even
# share of every kind and family: 9 to 36 % of its prompts.
_SALT = 906

_OPENINGS = (
    (),
    ("a", "picture", "of"),
    ("a", "photo", "of"),
    ("an", "image", "of"),
    ("a", "drawing", "of"),
    ("show", "me"),
    ("draw",),
    ("please", "draw"),
    ("paint",),
    ("there", "is"),
)
_NOUNS = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"), ("wedge", "wedges")),
    "star": (("star", "stars"), ("sparkle", "sparkles")),
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_RELATION_PHRASES = {
    "left": (("left", "of"), ("to", "the", "left", "of"), ("on", "the", "left", "of")),
    "right": (("right", "of"), ("to", "the", "right", "of"), ("on", "the", "right", "of")),
    "above": (("above",), ("over",), ("on", "top", "of")),
    "below": (("below",), ("under",), ("beneath",)),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_CONNECTIVES = ("and", "with", "plus")
_ARTICLES = ("a", "an", "the")


def _vocabulary() -> tuple[str, ...]:
    words = ["<pad>", "<start>", "<unk>", *_ARTICLES]
    for opening in _OPENINGS:
        words += opening
    words.append("are")
    for forms in _NOUNS.values():
        words += [word for form in forms for word in form]
    words += COLORS
    for forms in _SIZE_WORDS.values():
        words += forms
    for number, word in _NUMBERS.items():
        words += [str(number), word]
    for phrases in _RELATION_PHRASES.values():
        words += [word for phrase in phrases for word in phrase]
    words += _CONNECTIVES
    return tuple(dict.fromkeys(words))


WORDS = _vocabulary()
PAD_ID, START_ID, UNK_ID = 0, 1, 2
_IDS = {word: index for index, word in enumerate(WORDS)}
_SHAPE_OF = {w: shape for shape, forms in _NOUNS.items() for form in forms for w in form}
_SIZE_OF = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_NUMBER_OF = {w: n for n, word in _NUMBERS.items() for w in (word, str(n))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeObject:
    """One noun phrase of a prompt; what the prompt leaves open is None."""

    shape: str
    """One of `SHAPES`."""
    color: str | None = None
    """One of `COLORS`."""
    size: str | None = None
    """One of `SIZES`."""
    count: int = 1
    """How many of them, 1 to 6; above 1 only in the kind `counting`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """What a prompt asks for."""

    kind: str
    """One of `KINDS`."""
    objects: tuple[ShapeObject, ...]
    """One object, or two for the kinds two, position and binding."""
    relation: str | None = None
    """One of `RELATIONS`: where the first object lies, seen from the second; for `position`."""
    text: str = dataclasses.field(default="", compare=False)
    """The wording; no part of the meaning."""

    @property
    def meaning(self) -> str:
        """The same string for every wording; unordered pairs are sorted, relations mirrored."""
        names = [
            "/".join((o.size or "-", o.color or "-", o.shape, str(o.count))) for o in self.objects
        ]
        relation = self.relation
        if relation in ("right", "below"):
            relation, names = _OPPOSITE[relation], names[::-1]
        elif relation is None:
            names = sorted(names)
        return "|".join((self.kind, ",".join(names), relation or "-"))


def sample_prompt(
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    shapes: Sequence[str] = SHAPES,
    colors: Sequence[str] = COLORS,
    counts: Sequence[int] = COUNTS,
    size_frac: float = 0.2,
    color_frac: float = 0.75,
) -> PromptSpec:
    """Draw one prompt: kind, then attributes, then wording, each uniformly.

    Args:
        rng: Source of all choices.
        kinds: Kinds to choose from; repeat one to weight it.
        shapes: Shapes to choose from; the kinds with two objects need at least two.
        colors: Colours that may be named.
        counts: Numbers that `counting` may ask for.
        size_frac: Share of objects whose size is named (never in `counting`).
        color_frac: Share of `counting` prompts that name a colour.

    Raises:
        ValueError: An unknown kind.
    """

    def pick(values: Sequence) -> Any:
        return values[int(rng.integers(len(values)))]

    def size():
        return pick(SIZES) if rng.random() < size_frac else None

    kind = pick(kinds)
    relation = None
    if kind == "single":
        objects = (ShapeObject(shape=pick(shapes), size=size()),)
    elif kind == "colors":
        objects = (ShapeObject(shape=pick(shapes), color=pick(colors), size=size()),)
    elif kind == "counting":
        color = pick(colors) if rng.random() < color_frac else None
        objects = (ShapeObject(shape=pick(shapes), color=color, count=int(pick(counts))),)
    elif kind in ("two", "position", "binding"):
        pair = [str(shapes[i]) for i in rng.permutation(len(shapes))[:2]]
        tints: list[str | None] = [None, None]
        if kind == "binding":
            tints = [str(colors[i]) for i in rng.permutation(len(colors))[:2]]
        objects = tuple(
            ShapeObject(shape=s, color=c, size=size()) for s, c in zip(pair, tints, strict=True)
        )
        if kind == "position":
            relation = pick(RELATIONS)
    else:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    spec = PromptSpec(kind=kind, objects=objects, relation=relation)
    return dataclasses.replace(spec, text=_word(spec, pick))


def _word(spec: PromptSpec, pick: Callable[[Sequence], Any]) -> str:
    """One wording of a meaning; `pick` chooses among synonyms."""
    phrases = []
    for item in spec.objects:
        forms = pick(_NOUNS[item.shape])
        counted = spec.kind == "counting"
        words = [pick((str(item.count), _NUMBERS[item.count]))] if counted else []
        if item.size:
            words.append(pick(_SIZE_WORDS[item.size]))
        if item.color:
            words.append(item.color)
        words.append(forms[0] if item.count == 1 else forms[1])
        if not counted:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        phrases.append(words)
    body = phrases[0]
    if spec.relation:
        body = body + list(pick(_RELATION_PHRASES[spec.relation])) + phrases[1]
    elif len(phrases) == 2:
        body = body + [pick(_CONNECTIVES)] + phrases[1]
    opening = list(pick(_OPENINGS))
    if opening == ["there", "is"] and spec.objects[0].count > 1:
        opening = ["there", "are"]
    return " ".join(opening + body)


def word_list(text: str) -> list[str]:
    """Lower-case words of a text; punctuation separates."""
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


def tokenize(text: str) -> list[int]:
    """Token ids of a text: `<start>`, then one id per word, at most `MAX_TOKENS` in all.

    Words outside `WORDS` become `<unk>`; the empty text is `[START_ID]`.
    """
    return [START_ID, *(_IDS.get(word, UNK_ID) for word in word_list(text))][:MAX_TOKENS]


def parse(text: str) -> PromptSpec:
    """Read a prompt, the inverse of the grammar at the head of this file.

    Raises:
        ValueError: The text is outside the language; names the place and what is expected there.
    """
    reader = _Reader(text)
    reader.opening()
    first, counted = reader.noun_phrase()
    relation, second = None, None
    if counted:
        kind = "counting"
    elif reader.done():
        kind = "colors" if first.color else "single"
    else:
        relation = reader.link()
        second, counted = reader.noun_phrase()
        if counted:
            raise reader.error(
                "'a' or a shape, since a number stands only in a prompt of one phrase"
            )
        if relation:
            kind = "position"
        elif first.color and second.color:
            kind = "binding"
        elif first.color or second.color:
            raise reader.error("a colour for both objects or for neither")
        else:
            kind = "two"
    if not reader.done():
        raise reader.error("the end of the prompt")
    objects = (first,) if second is None else (first, second)
    return PromptSpec(kind=kind, objects=objects, relation=relation, text=text)


class _Reader:
    """A cursor over the words of one prompt."""

    def __init__(self, text: str):
        self.text = text
        self.words = word_list(text)
        self.at = 0
        for word in self.words:
            if word not in _IDS:
                raise ValueError(
                    f"prompt {text!r}: unknown word {word!r}; expected words such as "
                    f"{', '.join(SHAPES)}, {', '.join(COLORS)}, small, large, 1-6, one-six, "
                    "and, left of, right of, above, below"
                )

    def done(self) -> bool:
        return self.at == len(self.words)

    def error(self, expected: str) -> ValueError:
        found = "the end" if self.done() else repr(self.words[self.at])
        return ValueError(
            f"prompt {self.text!r}: at word {self.at + 1}: got {found}, expected {expected}"
        )

    def take(self, *phrase: str) -> bool:
        if tuple(self.words[self.at : self.at + len(phrase)]) != phrase:
            return False
        self.at += len(phrase)
        return True

    def opening(self) -> None:
        openings = sorted((*_OPENINGS, ("there", "are")), key=len, reverse=True)
        any(self.take(*opening) for opening in openings if opening)

    def noun_phrase(self) -> tuple[ShapeObject, bool]:
        """The object, and whether a number was written."""
        count, size, color = 1, None, None
        word = self.peek()
        counted = word in _NUMBER_OF
        if counted:
            count = _NUMBER_OF[word]
            self.at += 1
        elif word in _ARTICLES:
            self.at += 1
        if self.peek() in _SIZE_OF:
            if counted:
                raise self.error("a colour or a shape (sizes are not counted)")
            size = _SIZE_OF[self.peek()]
            self.at += 1
        if self.peek() in COLORS:
            color = self.peek()
            self.at += 1
        noun = self.peek()
        if noun not in _SHAPE_OF:
            raise self.error(f"a shape ({', '.join(SHAPES)})")
        plural = any(noun == form[1] for form in _NOUNS[_SHAPE_OF[noun]])
        if plural != (count > 1):
            raise self.error("a plural" if count > 1 else "a singular, or a number before it")
        self.at += 1
        return ShapeObject(shape=_SHAPE_OF[noun], color=color, size=size, count=count), counted

    def peek(self) -> str:
        return "" if self.done() else self.words[self.at]

    def link(self) -> str | None:
        """A relation, or None for a connective."""
        if self.peek() in _CONNECTIVES:
            self.at += 1
            return None
        for relation, phrases in _RELATION_PHRASES.items():
            if any(self.take(*phrase) for phrase in phrases):
                return relation
        raise self.error(f"one of {', '.join(_CONNECTIVES)}, left of, right of, above, below")


@cache
def _bucket(meaning: str) -> float:
    digest = hashlib.sha256(f"{_SALT}/{meaning}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(spec: PromptSpec) -> str:
    """'holdout' for a fixed `HOLDOUT_FRAC` of all meanings, else 'train'; by meaning alone."""
    return "holdout" if _bucket(spec.meaning) < HOLDOUT_FRAC else "train"


def prompt_concepts(spec: PromptSpec) -> dict[str, str]:
    """Families a prompt stays inside.

    Returns:
        `shapes`: round, angular or mixed; `colors`: warm, cool, mixed, or any where none is named.
    """

    def family(values, families):
        if not values:
            return "any"
        inside = [name for name, members in families.items() if set(values) <= set(members)]
        return inside[0] if inside else "mixed"

    return {
        "shapes": family([o.shape for o in spec.objects], SHAPE_FAMILIES),
        "colors": family([o.color for o in spec.objects if o.color], COLOR_FAMILIES),
    }

"""The prompt language of the shapes world: sampling, reading, token ids, splits by meaning.

    prompt  := [opening] body
    single  := a [size] shape                          "a clean photo of a star"
    colors  := a [size] colour shape                   "a small red circle"
    counting:= number [colour] shape(s)                "three red circles"
    two     := a [size] shape and a [size] shape       "a circle and a large square"
    three   := a shape, a shape and a shape            "a red disc, a blue box and a green star"
    binding := a [size] colour shape and a [size] colour shape
    position:= a [size] shape relation a [size] shape  "a star left of a square"
             | a [size] shape with a [size] shape side "a star with a square to its right"

Six kinds are those of GenEval (arXiv 2310.11513), `three` is ours: in it all objects have a colour,
or none has and sizes may be named. Every phrase has synonyms; what a prompt *means* is the same for
all of them, and splits are made by meaning. Some openings are held out: new combinations of known
words, and words that no model has a row for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

KINDS = ("single", "two", "counting", "colors", "position", "binding", "three")
SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SIZES = ("small", "large")
COUNTS = (1, 2, 3, 4, 5, 6)
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SHAPE_FAMILIES = {"round": ("circle", "star"), "angular": ("square", "triangle")}
COLOR_FAMILIES = {
    "warm": ("red", "yellow", "orange", "white"),
    "cool": ("green", "blue", "purple", "cyan"),
}
WORDINGS = ("train", "held_out")
MAX_TOKENS = 16
HOLDOUT_FRAC = 0.25
SPLIT_SEED = 1823
"""A few meanings ("a star") are most of their kind. Of 4,000 seeds this one holds out the most even
share of every kind and family: 13 to 46 % of its prompts."""

_STYLES = ("simple", "clean", "bright", "flat")
_MEDIA = ("picture", "photo", "image", "drawing")
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
_STYLED = tuple(("a", style, medium, "of") for style in _STYLES for medium in _MEDIA)
_STYLED_SHARE = 4
"""Styled openings are drawn as often as this many plain ones."""
_HELD_OUT_OPENINGS = (
    ("a", "flat", "photo", "of"),
    ("a", "bright", "drawing", "of"),
    ("a", "clean", "picture", "of"),
    ("a", "simple", "image", "of"),
    ("a", "neat", "sketch", "of"),
    ("render",),
    ("i", "want"),
    ("could", "you", "draw"),
)
_NOUNS = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"), ("wedge", "wedges")),
    "star": (("star", "stars"), ("sparkle", "sparkles")),
}
_COLOR_WORDS = {color: (color,) for color in COLORS} | {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_RELATION_PHRASES = {
    "left": (("left", "of"), ("to", "the", "left", "of"), ("on", "the", "left", "of")),
    "right": (("right", "of"), ("to", "the", "right", "of"), ("on", "the", "right", "of")),
    "above": (("above",), ("over",), ("on", "top", "of")),
    "below": (("below",), ("under",), ("beneath",)),
}
# Where the second object lies, said after it: "a star with a square to its right".
_SIDE_PHRASES = {
    "left": (("to", "its", "left"), ("on", "its", "left")),
    "right": (("to", "its", "right"), ("on", "its", "right")),
    "above": (("above", "it"), ("over", "it")),
    "below": (("below", "it"), ("under", "it")),
}
_SIDE_FRAC = 0.2
"""Share of the prompts of kind `position` that say it this way."""
_CONNECTIVES = (("and",), ("with",), ("plus",), ("next", "to"), ("beside",))
_LAST_CONNECTIVES = (("and",), ("plus",))
_ARTICLES = ("a", "an", "the")


def _vocabulary() -> tuple[str, ...]:
    words = ["<pad>", "<start>", "<unk>", *_ARTICLES]
    for opening in (*_OPENINGS, *_STYLED):
        words += opening
    words.append("are")
    for forms in _NOUNS.values():
        words += [word for form in forms for word in form]
    for forms in (*_COLOR_WORDS.values(), *_SIZE_WORDS.values()):
        words += forms
    for number, word in _NUMBERS.items():
        words += [str(number), word]
    for phrases in (*_RELATION_PHRASES.values(), *_SIDE_PHRASES.values(), _CONNECTIVES):
        words += [word for phrase in phrases for word in phrase]
    return tuple(dict.fromkeys(words))


WORDS = _vocabulary()
"""Words that the models have a row for, by token id; what held-out openings add is not among
them."""
PAD_ID, START_ID, UNK_ID = 0, 1, 2
_IDS = {word: index for index, word in enumerate(WORDS)}
_READABLE = {*WORDS[3:], *(word for opening in _HELD_OUT_OPENINGS for word in opening)}
_SHAPE_OF = {w: shape for shape, forms in _NOUNS.items() for form in forms for w in form}
_COLOR_OF = {word: color for color, words in _COLOR_WORDS.items() for word in words}
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
    """One object; two for the kinds two, position and binding; three for the kind three."""
    relation: str | None = None
    """One of `RELATIONS`: where the first object lies, seen from the second; for `position`."""
    text: str = dataclasses.field(default="", compare=False)
    """The wording; no part of the meaning."""

    @property
    def meaning(self) -> str:
        """The same string for every wording; unordered objects are sorted, relations mirrored."""
        names = [
            "/".join((o.size or "-", o.color or "-", o.shape, str(o.count))) for o in self.objects
        ]
        relation = self.relation
        if relation in ("right", "below"):
            relation, names = OPPOSITE[relation], names[::-1]
        elif relation is None:
            names = sorted(names)
        return "|".join((self.kind, ",".join(names), relation or "-"))


Pick = Callable[[Sequence], Any]
"""Chooses among synonyms or values."""


def sample_prompt(
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    shapes: Sequence[str] = SHAPES,
    colors: Sequence[str] = COLORS,
    counts: Sequence[int] = COUNTS,
    size_frac: float = 0.2,
    color_frac: float = 0.75,
    wording: str = "train",
) -> PromptSpec:
    """Draw one prompt: kind, then attributes, then wording, each uniformly.

    Args:
        rng: Source of all choices.
        kinds: Kinds to choose from; repeat one to weight it.
        shapes: Shapes to choose from; kinds with n objects need at least n.
        colors: Colours that may be named.
        counts: Numbers that `counting` may ask for.
        size_frac: Share of objects whose size is named (never in `counting`, nor with a colour in
            `three`).
        color_frac: Share of `counting` and of `three` prompts that name colours.
        wording: One of `WORDINGS`: which openings it may have.

    Raises:
        ValueError: An unknown kind or wording.
    """
    if wording not in WORDINGS:
        raise ValueError(f"wording: got {wording!r}, expected one of {', '.join(WORDINGS)}")

    def pick(values: Sequence) -> Any:
        return values[int(rng.integers(len(values)))]

    def size() -> str | None:
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
    elif kind in ("two", "three", "position", "binding"):
        number = 3 if kind == "three" else 2
        names = [str(shapes[i]) for i in rng.permutation(len(shapes))[:number]]
        tints: list[str | None] = [None] * number
        if kind == "binding" or (kind == "three" and rng.random() < color_frac):
            tints = [str(colors[i]) for i in rng.permutation(len(colors))[:number]]
        sized = kind != "three" or tints[0] is None
        objects = tuple(
            ShapeObject(shape=shape, color=tint, size=size() if sized else None)
            for shape, tint in zip(names, tints, strict=True)
        )
        if kind == "position":
            relation = pick(RELATIONS)
    else:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    spec = PromptSpec(kind=kind, objects=objects, relation=relation)
    inverted = relation is not None and rng.random() < _SIDE_FRAC
    body = _body(spec, pick, inverted=inverted)
    opening = _opening(pick, wording)
    if opening == ("there", "is") and spec.objects[0].count > 1:
        opening = ("there", "are")
    return dataclasses.replace(spec, text=" ".join((*opening, *body)))


def _opening(pick: Pick, wording: str) -> tuple[str, ...]:
    if wording == "held_out":
        return pick(_HELD_OUT_OPENINGS)
    opening = pick((*_OPENINGS, *[_STYLED] * _STYLED_SHARE))
    return opening if opening is not _STYLED else pick(_TRAIN_STYLED)


_TRAIN_STYLED = tuple(opening for opening in _STYLED if opening not in _HELD_OUT_OPENINGS)


def _body(spec: PromptSpec, pick: Pick, *, inverted: bool) -> list[str]:
    """One wording of a meaning without its opening; `pick` chooses among synonyms."""
    phrases = [_noun_phrase(item, pick, counted=spec.kind == "counting") for item in spec.objects]
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) == 3:
        first, second, third = phrases
        first[-1] += ","
        return [*first, *second, *pick(_LAST_CONNECTIVES), *third]
    first, second = phrases
    if spec.relation is None:
        return [*first, *pick(_CONNECTIVES), *second]
    if inverted:
        return [*first, "with", *second, *pick(_SIDE_PHRASES[OPPOSITE[spec.relation]])]
    return [*first, *pick(_RELATION_PHRASES[spec.relation]), *second]


def _noun_phrase(item: ShapeObject, pick: Pick, *, counted: bool) -> list[str]:
    forms = pick(_NOUNS[item.shape])
    words = [pick((str(item.count), _NUMBERS[item.count]))] if counted else []
    if item.size:
        words.append(pick(_SIZE_WORDS[item.size]))
    if item.color:
        words.append(pick(_COLOR_WORDS[item.color]))
    words.append(forms[0] if item.count == 1 else forms[1])
    if not counted:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return words


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
    reader.at = len(opening_of(text))
    first, counted = reader.noun_phrase()
    objects, relation = [first], None
    if not counted and not reader.done():
        relation = reader.link()
        objects.append(reader.plain_noun_phrase())
        if not reader.done():
            relation = relation or reader.side()
        if not reader.done() and relation is None:
            reader.link()
            objects.append(reader.plain_noun_phrase())
    if not reader.done():
        raise reader.error("the end of the prompt")
    colored = [item.color is not None for item in objects]
    if len(objects) == 1:
        kind = "counting" if counted else "colors" if first.color else "single"
    elif relation is not None:
        kind = "position"
    elif any(colored) and not all(colored):
        raise reader.error("a colour for every object or for none")
    else:
        kind = "three" if len(objects) == 3 else "binding" if first.color else "two"
    return PromptSpec(kind=kind, objects=tuple(objects), relation=relation, text=text)


_SHOWN = 80
"""Characters of a prompt that an error repeats."""


class _Reader:
    """A cursor over the words of one prompt."""

    def __init__(self, text: str):
        self.shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
        self.words = word_list(text)
        self.at = 0
        for word in self.words:
            if word not in _READABLE:
                raise ValueError(
                    f"prompt {self.shown}: unknown word {word[:_SHOWN]!r}; expected words such as "
                    f"{', '.join(SHAPES)}, {', '.join(COLORS)}, small, large, 1-6, one-six, "
                    "and, left of, right of, above, below"
                )

    def done(self) -> bool:
        return self.at == len(self.words)

    def error(self, expected: str) -> ValueError:
        found = "the end" if self.done() else repr(self.words[self.at])
        return ValueError(
            f"prompt {self.shown}: at word {self.at + 1}: got {found}, expected {expected}"
        )

    def take(self, *phrase: str) -> bool:
        if tuple(self.words[self.at : self.at + len(phrase)]) != phrase:
            return False
        self.at += len(phrase)
        return True

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
        if self.peek() in _COLOR_OF:
            color = _COLOR_OF[self.peek()]
            self.at += 1
        noun = self.peek()
        if noun not in _SHAPE_OF:
            raise self.error(f"a shape ({', '.join(SHAPES)})")
        plural = any(noun == form[1] for form in _NOUNS[_SHAPE_OF[noun]])
        if plural != (count > 1):
            raise self.error("a plural" if count > 1 else "a singular, or a number before it")
        self.at += 1
        return ShapeObject(shape=_SHAPE_OF[noun], color=color, size=size, count=count), counted

    def plain_noun_phrase(self) -> ShapeObject:
        item, counted = self.noun_phrase()
        if counted:
            raise self.error("'a' or a shape, since a number stands only in a prompt of one phrase")
        return item

    def peek(self) -> str:
        return "" if self.done() else self.words[self.at]

    def link(self) -> str | None:
        """A relation, or None for a connective or for nothing before a further noun phrase."""
        if any(self.take(*phrase) for phrase in _CONNECTIVES):
            return None
        for relation, phrases in _RELATION_PHRASES.items():
            if any(self.take(*phrase) for phrase in phrases):
                return relation
        if any(self.peek() in words for words in (_ARTICLES, _SIZE_OF, _COLOR_OF, _SHAPE_OF)):
            return None
        raise self.error("one of and, with, plus, left of, right of, above, below")

    def side(self) -> str | None:
        """The relation that "with a square to its right" gives the first object, if it is one."""
        for side, phrases in _SIDE_PHRASES.items():
            if any(self.take(*phrase) for phrase in phrases):
                return OPPOSITE[side]
        return None


_ALL_OPENINGS = sorted(
    {*_OPENINGS[1:], *_STYLED, *_HELD_OUT_OPENINGS, ("there", "are")}, key=lambda o: (-len(o), o)
)


@cache
def _bucket(meaning: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}/{meaning}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(spec: PromptSpec, seed: int = SPLIT_SEED) -> str:
    """'holdout' for a share `HOLDOUT_FRAC` of all meanings, else 'train'; by meaning and seed."""
    return "holdout" if _bucket(spec.meaning, seed) < HOLDOUT_FRAC else "train"


def opening_of(text: str) -> tuple[str, ...]:
    """The words before the first noun phrase; empty where there is no known opening."""
    words = tuple(word_list(text))
    return next((o for o in _ALL_OPENINGS if words[: len(o)] == o), ())


def wording_of(text: str) -> str:
    """Which of `WORDINGS` the opening of a prompt belongs to."""
    return "held_out" if opening_of(text) in _HELD_OUT_OPENINGS else "train"


def noun_tokens(text: str) -> list[int]:
    """Places of the nouns among the tokens of a prompt; object k is said by noun k."""
    return [place + 1 for place, word in enumerate(word_list(text)) if word in _SHAPE_OF]


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

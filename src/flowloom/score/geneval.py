"""GenEval (arXiv 2310.11513): what a prompt asks for, and whether detections answer it.

    single    a photo of a bench                       the object is there
    two       a photo of a bench and a cat             both are
    counting  a photo of three cats                    just so many are
    colors    a photo of a red car                     it has that colour
    position  a photo of a cat left of a dog           each is where the other says
    binding   a photo of a red car and a blue bench    both have their colours

Nouns are free: the detector has an open vocabulary. As GenEval defines them, an object is left of
another where the unit vector between their box centres points left by more than a half, after the
distance was shortened by a tenth of both boxes' sizes; and so for right, above and below.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import lru_cache

COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
"""Those of GenEval."""
SLACK = 0.1
"""Share of both boxes' sizes that two centres must lie apart to count as apart."""
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: number for number, word in enumerate(_WORDS, 1)}
_RELATIONS = {
    "left": ("to the left of", "on the left of", "left of"),
    "right": ("to the right of", "on the right of", "right of"),
    "above": ("above", "on top of", "over"),
    "below": ("below", "under", "beneath", "underneath"),
}
_OPENING = re.compile(r"^(an?|the) (photo|photograph|picture|image|drawing|painting) of( |$)")
_ARTICLE = re.compile(r"^(an?|the) ")
_IRREGULAR = {"people": "person", "knives": "knife", "mice": "mouse", "geese": "goose"}
_SAME = ("sheep", "skis", "scissors", "glasses", "fish", "deer")
_MAX_WORDS = 4
"""Of a noun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """One kind of object that a prompt asks for."""

    noun: str
    """What the detector looks for, singular."""
    color: str | None = None
    """One of `COLORS`."""
    count: int = 1
    """How many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a prompt asks for."""

    wanted: tuple[Wanted, ...]
    """Kinds of objects."""
    exact: bool = False
    """Whether more than `count` are wrong too: for counting."""
    relation: str | None = None
    """left, right, above or below: where the first object lies, seen from the second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """A detected object."""

    noun: str
    """What was looked for."""
    score: float
    """The detector's confidence."""
    corners: tuple[float, float, float, float]
    """Left, top, right and bottom, pixels."""
    color: str | None = None
    """Its colour; None where no colour was asked for."""


@lru_cache(maxsize=4096)
def parse(prompt: str) -> Spec:
    """Read a prompt of one of the forms at the head of this file.

    Raises:
        ValueError: It is of none; names it and the forms.
    """
    text = _OPENING.sub("", " ".join(prompt.lower().replace(",", " ").strip(" .").split()))
    for relation, phrases in _RELATIONS.items():
        for phrase in phrases:
            first, found, second = text.partition(f" {phrase} ")
            if found:
                pair = (_wanted(first, prompt), _wanted(second, prompt))
                return Spec(wanted=pair, relation=relation)
    parts = re.split(r"\s*\b(?:and|with)\b\s*", text)
    if len(parts) == 1:
        head, _, rest = text.partition(" ")
        count = _NUMBERS.get(head) or (int(head) if head.isdecimal() and int(head) > 0 else None)
        if count is not None:
            one = _wanted(rest, prompt, plural=count > 1)
            return Spec(wanted=(dataclasses.replace(one, count=count),), exact=True)
    return Spec(wanted=tuple(_wanted(part, prompt) for part in parts))


def judge(spec: Spec, boxes: Sequence[Box], *, strict: bool) -> float:
    """How well detections answer a prompt, in [0, 1].

    Args:
        spec: What it asks for.
        boxes: What was detected with enough confidence.
        strict: 1 where all is right and else 0, as GenEval counts; otherwise the mean of one part
            per object, number and colour in one, and of one for the relation.
    """
    parts, chosen = [], []
    for wanted in spec.wanted:
        alike = sorted((b for b in boxes if b.noun == wanted.noun), key=lambda b: -b.score)
        found = len(alike)
        part = min(found, wanted.count) / wanted.count
        if spec.exact:
            part = max(0.0, 1 - abs(found - wanted.count) / wanted.count)
        if wanted.color is not None:
            fitting = sum(box.color == wanted.color for box in alike)
            part *= min(fitting, wanted.count) / wanted.count
        parts.append(part)
        # Those of the right colour first, so that a bystander does not spoil a relation.
        alike.sort(key=lambda box: box.color != wanted.color)
        chosen.append(alike[: wanted.count])
    if spec.relation is not None:
        pairs = [(a, b) for a in chosen[0] for b in chosen[1] if a is not b]
        right = [spec.relation in relations(a, b) for a, b in pairs]
        parts.append(float(bool(right) and all(right)))
    return float(all(part == 1 for part in parts)) if strict else sum(parts) / len(parts)


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` lies, seen from `b`: some of left, right, above, below."""
    sizes = [[c[2] - c[0], c[3] - c[1]] for c in (a.corners, b.corners)]
    offset = []
    for axis in (0, 1):
        apart = (a.corners[axis] + a.corners[axis + 2] - b.corners[axis] - b.corners[axis + 2]) / 2
        shorter = max(abs(apart) - SLACK * (sizes[0][axis] + sizes[1][axis]), 0.0)
        offset.append(math.copysign(shorter, apart))
    length = math.hypot(*offset)
    if length < 1e-3:
        return set()
    x, y = offset[0] / length, offset[1] / length
    holds = {"left": x < -0.5, "right": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    (al, at, ar, ab), (bl, bt, br, bb) = a.corners, b.corners
    inner = max(min(ar, br) - max(al, bl), 0.0) * max(min(ab, bb) - max(at, bt), 0.0)
    union = (ar - al) * (ab - at) + (br - bl) * (bb - bt) - inner
    return inner / union if union > 0 else 0.0


def suppress(boxes: Sequence[Box], max_overlap: float, max_count: int) -> list[Box]:
    """The strongest boxes, without those of a noun that overlap a stronger one of the same noun."""
    kept: list[Box] = []
    for box in sorted(boxes, key=lambda b: -b.score):
        if all(box.noun != k.noun or overlap(box, k) <= max_overlap for k in kept):
            kept.append(box)
    return kept[:max_count]


def _wanted(text: str, prompt: str, *, plural: bool = False) -> Wanted:
    """Read `[article] [colour] noun`."""
    words = _ARTICLE.sub("", text).split()
    color = words.pop(0) if len(words) > 1 and words[0] in COLORS else None
    # A clause or a list is no noun, and would be looked for as one.
    if not 1 <= len(words) <= _MAX_WORDS or any(word in _NUMBERS for word in words):
        shown = prompt if len(prompt) <= 80 else prompt[:80] + "..."
        raise ValueError(
            f"prompt {shown!r}: got {text!r}, expected a GenEval prompt such as 'a photo of a red "
            "car', 'three cats', 'a cat and a dog', 'a cat left of a dog'"
        )
    if plural:
        words[-1] = _singular(words[-1])
    return Wanted(noun=" ".join(words), color=color)


def _singular(word: str) -> str:
    """The singular of an English plural."""
    if word in _SAME:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "ches", "shes", "xes", "zes")) or word == "buses":
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word

"""What a CONDITIONING link carries: encoded texts, each with the times at which it takes part.

A sampler calls the model on every text that is active and takes the mean of what it says, so
`combine` costs one call more per step, while `concat` and `average` make one text of two. A text
that is combined with itself is called once and counts twice.

A text that is joined to itself again and again doubles each time. Attention does not ask where a
token stands, so what stands behind `MAX_TOKENS` is kept once for each different token, with its
number; the places before are known, for a text that is averaged with it.

Shapes: n tokens of a text without padding, D = width, E texts, L the longest of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.shapes import prompts
from flowloom.shapes.model import Conditioning, ShapesModel

MAX_TEXTS = 64
"""Texts that one CONDITIONING may hold."""
MAX_TOKENS = MAX_TEXTS * prompts.MAX_TOKENS
"""Tokens of a text that are kept in order; those behind them are counted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """One encoded text, or what nodes made of several."""

    tokens_nD: Tensor
    """One vector per token, without padding."""
    pooled_D: Tensor
    """One vector for the whole."""
    num_slots: int
    """Tokens that it is charged for: every text as if padded to the encoder's length."""
    start: float = 0.0
    """Share of the sampling range after which it takes part."""
    end: float = 1.0
    """Share of the sampling range until which it takes part."""
    times: int = 1
    """How often it counts in the mean."""
    tail_mD: Tensor | None = None
    """The different tokens behind the first `MAX_TOKENS`; None: there are none."""
    counts_m: Tensor | None = None
    """How often each of these stands there."""

    @property
    def is_bounded(self) -> bool:
        """Whether there may be times at which it takes no part."""
        return self.start > 0 or self.end < 1


Texts = tuple[Text, ...]
"""What a CONDITIONING link carries; not empty."""


def encode(model: ShapesModel, texts: Sequence[str]) -> list[Text]:
    """Encode texts in one batch.

    Raises:
        ValueError: The model's word table is that of another version.
    """
    ids = [prompts.tokenize(text) for text in texts]
    if len(prompts.WORDS) != model.config.num_words:
        raise ValueError(
            f"text: the checkpoint knows {model.config.num_words} words, "
            f"expected {len(prompts.WORDS)}: it is of another version of the world"
        )
    encoded = model.encode_text(ids)
    lengths = encoded.mask_BL.sum(1).tolist()
    return [
        Text(encoded.tokens_BLD[row, :length], encoded.pooled_BD[row], model.config.max_tokens)
        for row, length in enumerate(lengths)
    ]


def combine(first: Texts, second: Texts) -> Texts:
    """Both, each called on its own (ConditioningCombine).

    Raises:
        ValueError: More than `MAX_TEXTS`.
    """
    found: dict[tuple, Text] = {}
    for text in first + second:
        key = (id(text.tokens_nD), id(text.pooled_D), text.start, text.end)
        known = found.get(key)
        times = text.times + (known.times if known else 0)
        found[key] = dataclasses.replace(text, times=times) if known else text
    if len(found) > MAX_TEXTS:
        raise ValueError(f"conditioning: got {len(found)} texts, expected at most {MAX_TEXTS}")
    return tuple(found.values())


def concat(to: Texts, other: Texts) -> Texts:
    """The first of the other's texts behind each text; pooled vector and times stay.

    Raises:
        ValueError: Too many different tokens behind the first, or widths differ.
    """
    end = _first(to, other)
    return tuple(_joined(text, end) for text in to)


def _joined(text: Text, end: Text) -> Text:
    ordered_nD, behind = text.tokens_nD, [*_tail(text)]
    if not behind:
        ordered_nD = torch.cat([text.tokens_nD, end.tokens_nD])
        ordered_nD, rest_nD = ordered_nD[:MAX_TOKENS], ordered_nD[MAX_TOKENS:]
        behind += _counted(rest_nD)
    else:
        behind += _counted(end.tokens_nD)
    behind += _tail(end)
    if not behind:
        slots = text.num_slots + end.num_slots
        return dataclasses.replace(text, tokens_nD=ordered_nD, num_slots=slots)
    tail_mD, counts_m = _merged(behind)
    if len(tail_mD) > MAX_TOKENS:
        raise ValueError(
            f"conditioning: got {len(tail_mD)} different tokens, expected at most {MAX_TOKENS}"
        )
    return dataclasses.replace(
        text,
        tokens_nD=ordered_nD,
        num_slots=MAX_TOKENS + len(tail_mD),
        tail_mD=tail_mD,
        counts_m=counts_m,
    )


def _counted(tokens_nD: Tensor) -> list[tuple[Tensor, Tensor]]:
    # In double precision, which holds what any chain of doublings comes to.
    ones_n = torch.ones(len(tokens_nD), dtype=torch.double)
    return [(tokens_nD, ones_n)] if len(tokens_nD) else []


def _tail(text: Text) -> list[tuple[Tensor, Tensor]]:
    if text.tail_mD is None or text.counts_m is None:
        return []
    return [(text.tail_mD, text.counts_m)]


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The different tokens of all parts, and how often each stands in them together."""
    tokens_mD, place = torch.unique(
        torch.cat([tokens for tokens, _ in parts]), dim=0, return_inverse=True
    )
    several = torch.cat([counts for _, counts in parts])
    return tokens_mD, several.new_zeros(len(tokens_mD)).index_add_(0, place, several)


def average(to: Texts, other: Texts, weight: float) -> Texts:
    """Each text times `weight` plus the first of the other's times 1 - `weight`, token by token.

    The shorter is padded with zeros; a text of weight 0 leaves no tokens behind. Tokens that are
    counted have no places: two texts' are put beside each other in the order in which they are
    kept, so that a text and itself are that text.

    Raises:
        ValueError: Widths differ.
    """
    end = _first(to, other)
    if weight == 1:
        return to
    mixed = []
    for text in to:
        if weight == 0:
            mixed.append(dataclasses.replace(end, start=text.start, end=text.end, times=text.times))
            continue
        length = max(len(text.tokens_nD), len(end.tokens_nD))
        tokens_nD = _lengthen(text.tokens_nD, length)
        other_nD = _lengthen(end.tokens_nD, length)
        tail_mD, counts_m = _mixed_tails(text, end, weight)
        mixed.append(
            dataclasses.replace(
                text,
                tokens_nD=torch.lerp(other_nD, tokens_nD, weight),
                pooled_D=torch.lerp(end.pooled_D, text.pooled_D, weight),
                num_slots=max(end.num_slots, text.num_slots),
                tail_mD=tail_mD,
                counts_m=counts_m,
            )
        )
    return tuple(mixed)


def _mixed_tails(text: Text, end: Text, weight: float) -> tuple[Tensor | None, Tensor | None]:
    """Counted tokens of an average, run by run; zeros stand where one text has no more of them."""
    runs = [(one.tail_mD, one.counts_m) for one in (text, end)]
    ends = [counts_m.cumsum(0) for _, counts_m in runs if counts_m is not None]
    if not ends:
        return None, None
    edges = torch.cat(ends).unique()
    starts = torch.cat([edges.new_zeros(1), edges[:-1]])
    total = 0.0
    for (tail_mD, counts_m), share in zip(runs, (weight, 1 - weight), strict=True):
        if tail_mD is not None and counts_m is not None:
            place = torch.searchsorted(counts_m.cumsum(0), starts, right=True)
            padded_mD = torch.cat([tail_mD, tail_mD.new_zeros(1, tail_mD.shape[1])])
            total = total + share * padded_mD[place]
    assert isinstance(total, Tensor), "one of them has a tail"
    return total, edges - starts


def zero_out(texts: Texts) -> Texts:
    """The same shapes without content (ConditioningZeroOut)."""
    return tuple(
        dataclasses.replace(
            text,
            tokens_nD=torch.zeros_like(text.tokens_nD),
            pooled_D=torch.zeros_like(text.pooled_D),
            tail_mD=None if text.tail_mD is None else torch.zeros_like(text.tail_mD),
        )
        for text in texts
    )


def set_range(texts: Texts, start: float, end: float) -> Texts:
    """Let texts take part only between two shares of the sampling range."""
    return tuple(dataclasses.replace(text, start=start, end=end) for text in texts)


def stack(texts: Sequence[Text]) -> Conditioning:
    """One batch of E texts, padded to the most slots of any and masked.

    The length does not depend on the words, and sums of attention round alike at equal lengths.
    """
    tokens = [text.tokens_nD for text in texts]
    length = max(text.num_slots for text in texts)
    lengths_E = torch.tensor([len(row) for row in tokens])
    mask_EL = torch.arange(length) < lengths_E[:, None]
    if any(text.tail_mD is not None for text in texts):
        # Counted as a whole, which leaves few: what is charged for is what is written out.
        counted = [_merged([*_counted(text.tokens_nD), *_tail(text)]) for text in texts]
        tokens, counts = [row for row, _ in counted], [row for _, row in counted]
        length = max(map(len, tokens))
        mask_EL = torch.stack([F.pad(row, (0, length - len(row))) for row in counts])
    return Conditioning(
        torch.stack([_lengthen(row, length) for row in tokens]),
        mask_EL,
        torch.stack([text.pooled_D for text in texts]),
    )


def _lengthen(tokens_nD: Tensor, length: int) -> Tensor:
    return F.pad(tokens_nD, (0, 0, 0, length - len(tokens_nD)))


def _first(to: Texts, other: Texts) -> Text:
    """The text that is added to others, as the server takes it: the first one."""
    widths = {text.tokens_nD.shape[1] for text in (*to, other[0])}
    if len(widths) > 1:
        raise ValueError(f"conditioning: got texts of widths {sorted(widths)}, expected one width")
    return other[0]

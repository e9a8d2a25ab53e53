"""What a CONDITIONING link carries: encoded texts, each with the times at which it takes part.

A sampler calls the model on every text that is active and takes the mean of what it says, so
`combine` costs one call more per step, while `concat` and `average` make one text of two. A text
that is combined with itself is called once and counts twice.

A text that is joined to itself again and again doubles each time. Attention does not ask where a
token stands, so beyond `MAX_TOKENS` equal tokens are kept once with their number.

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
"""Tokens that a text may have; a longer one is counted."""


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
    counts_n: Tensor | None = None
    """How often each token stands in it; None: once."""

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
        ValueError: A text would have more than `MAX_TOKENS` different tokens, or widths differ.
    """
    end = _first(to, other)
    return tuple(_joined(text, end) for text in to)


def _joined(text: Text, end: Text) -> Text:
    tokens_nD = torch.cat([text.tokens_nD, end.tokens_nD])
    slots, counts_n = text.num_slots + end.num_slots, None
    counted = text.counts_n is not None or end.counts_n is not None
    if counted or len(tokens_nD) > MAX_TOKENS:
        several = torch.cat([_counts(text), _counts(end)])
        tokens_nD, place = torch.unique(tokens_nD, dim=0, return_inverse=True)
        counts_n = several.new_zeros(len(tokens_nD)).index_add_(0, place, several)
        if len(tokens_nD) > MAX_TOKENS:
            raise ValueError(
                f"conditioning: got {len(tokens_nD)} different tokens, expected <= {MAX_TOKENS}"
            )
        slots = -(-len(tokens_nD) // prompts.MAX_TOKENS) * prompts.MAX_TOKENS
    return dataclasses.replace(text, tokens_nD=tokens_nD, num_slots=slots, counts_n=counts_n)


def _counts(text: Text) -> Tensor:
    # In double precision, which holds what any chain of doublings comes to.
    if text.counts_n is None:
        return torch.ones(len(text.tokens_nD), dtype=torch.double)
    return text.counts_n


def average(to: Texts, other: Texts, weight: float) -> Texts:
    """Each text times `weight` plus the first of the other's times 1 - `weight`, token by token.

    The shorter is padded with zeros; a text of weight 0 leaves no tokens behind.

    Raises:
        ValueError: Widths differ, or a text has tokens that are counted: they have no places.
    """
    end = _first(to, other)
    if weight == 1:
        return to
    if weight != 0 and any(text.counts_n is not None for text in (end, *to)):
        raise ValueError(f"conditioning: got a text of more than {MAX_TOKENS} tokens to average")
    mixed = []
    for text in to:
        tokens_nD, pooled_D, slots = end.tokens_nD, end.pooled_D, end.num_slots
        if weight != 0:
            length = max(len(text.tokens_nD), len(tokens_nD))
            longer, other_longer = _lengthen(text.tokens_nD, length), _lengthen(tokens_nD, length)
            tokens_nD = torch.lerp(other_longer, longer, weight)
            pooled_D = torch.lerp(pooled_D, text.pooled_D, weight)
            slots = max(slots, text.num_slots)
        mixed.append(
            dataclasses.replace(
                text,
                tokens_nD=tokens_nD,
                pooled_D=pooled_D,
                num_slots=slots,
                counts_n=end.counts_n if weight == 0 else None,
            )
        )
    return tuple(mixed)


def zero_out(texts: Texts) -> Texts:
    """The same shapes without content (ConditioningZeroOut)."""
    return tuple(
        dataclasses.replace(
            text,
            tokens_nD=torch.zeros_like(text.tokens_nD),
            pooled_D=torch.zeros_like(text.pooled_D),
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
    length = max(text.num_slots for text in texts)
    lengths_E = torch.tensor([len(text.tokens_nD) for text in texts])
    mask_EL = torch.arange(length) < lengths_E[:, None]
    if any(text.counts_n is not None for text in texts):
        counts = [_counts(text) for text in texts]
        mask_EL = torch.stack([F.pad(row, (0, length - len(row))) for row in counts])
    return Conditioning(
        torch.stack([_lengthen(text.tokens_nD, length) for text in texts]),
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

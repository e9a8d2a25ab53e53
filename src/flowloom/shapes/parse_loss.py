"""An auxiliary loss that ties words to objects: every noun must know its attributes.

The flow loss alone hardly asks whose colour "red" is: a prompt with its sides exchanged costs a
model .001 of squared error. So while a model learns, linear heads read shape, colour, size, side
and count of every object from the text encoder's output at its noun. They are not part of the
model's file.

Shapes: B pictures, O = 3 objects at most, A = 5 attributes, L text tokens, D = width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from flowloom.shapes.prompts import (
    COLORS,
    COUNTS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    PromptSpec,
    noun_tokens,
)

MAX_OBJECTS = 3
_VALUES: tuple[Sequence, ...] = (
    SHAPES,
    (None, *COLORS),
    (None, *SIZES),
    (None, *RELATIONS),
    COUNTS,
)
_ABSENT = -1


def parse_labels(spec: PromptSpec) -> tuple[np.ndarray, np.ndarray]:
    """What the heads should read.

    Returns:
        Token of each object's noun `[O]` int64 (0 where there is no such object), and the index of
        each attribute `[O, A]` int64 (-1 where there is none).
    """
    places_O = np.zeros(MAX_OBJECTS, np.int64)
    labels_OA = np.full((MAX_OBJECTS, len(_VALUES)), _ABSENT, np.int64)
    places = noun_tokens(spec.text)
    for k, item in enumerate(spec.objects):
        side = spec.relation if k == 0 or spec.relation is None else OPPOSITE[spec.relation]
        attributes = (item.shape, item.color, item.size, side, item.count)
        places_O[k] = places[k]
        labels_OA[k] = [v.index(a) for v, a in zip(_VALUES, attributes, strict=True)]
    return places_O, labels_OA


class ParseHeads(nn.Module):
    """One linear map per attribute."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in _VALUES)

    def loss(self, tokens_BLD: Tensor, places_BO: Tensor, labels_BOA: Tensor) -> Tensor:
        """Sum over attributes of the mean cross-entropy over the objects that are there, nats."""
        at = tokens_BLD.gather(1, places_BO[..., None].expand(-1, -1, tokens_BLD.shape[-1]))
        return sum(
            (
                F.cross_entropy(
                    head(at).flatten(0, 1), labels_BOA[..., a].flatten(), ignore_index=_ABSENT
                )
                for a, head in enumerate(self.heads)
            ),
            start=tokens_BLD.new_zeros(()),
        )

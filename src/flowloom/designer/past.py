"""What a language model has read, row by row: the cache that its policy fills and reads.

Shapes: B rows, L prompt positions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclasses.dataclass
class Past:
    """Keys and values of rows."""

    cache: DynamicCache
    """Appended to in place."""
    seen_BL: Tensor
    """False where a prompt position is padding."""
    num_written: int = 0
    """Workflow positions."""

    def changed(self, change: Callable[..., Tensor], *others: Past) -> Past:
        """Apply `change` to each tensor of rows, and those of `others` beside it."""
        cache = copy.copy(self.cache)
        cache.layers = []
        for layers in zip(*(past.cache.layers for past in (self, *others)), strict=True):
            layer = copy.copy(layers[0])
            layer.keys = change(*(part.keys for part in layers))
            layer.values = change(*(part.values for part in layers))
            cache.layers.append(layer)
        seen_BL = change(*(past.seen_BL for past in (self, *others)))
        return Past(cache, seen_BL, self.num_written)


class Cache:
    """What rows have read. Repeating and selecting are noted, and done when more is read."""

    def __init__(self, past: Past, rows: Tensor):
        """Look at `rows` of what was read."""
        self._past, self._rows, self._settled = past, rows, False

    def repeat(self, num: int) -> Cache:
        """Give each row `num` neighbouring copies."""
        return Cache(self._past, self._rows.repeat_interleave(num))

    def select(self, rows: Tensor) -> None:
        """Keep `rows`, in their order."""
        self._rows, self._settled = self._rows[rows], False

    @staticmethod
    def gather(caches: Sequence[Cache]) -> Past:
        """The rows of all caches, in turn, in one place that is theirs alone."""
        past = caches[0]._past
        num_rows = sum(len(cache._rows) for cache in caches)
        together = all(cache._settled and cache._past is past for cache in caches)
        if together and len(past.seen_BL) == num_rows:
            return past
        device = past.seen_BL.device
        parts = []
        for cache in caches:
            rows = cache._rows.to(device)
            parts.append(cache._past.changed(lambda tensor, r=rows: tensor.index_select(0, r)))
        if len(parts) > 1:
            parts = [parts[0].changed(lambda *tensors: torch.cat(tensors), *parts[1:])]
        (past,) = parts
        first = 0
        for cache in caches:
            cache._rows = torch.arange(first, first + len(cache._rows))
            cache._past, cache._settled = past, True
            first += len(cache._rows)
        return past

"""Configuration of `promote`; `register` has nothing to configure."""

from __future__ import annotations

import dataclasses

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """`promote`: what a candidate must show before it becomes the champion."""

    margin: float = 0.0
    """The 95 % interval of candidate - opponent must lie above this, in rubric points."""
    min_prompts: int = 100
    """Held-out prompts that the interval must rest on."""
    min_designs: int = 5000
    """Unrendered designs that must have been checked; all must be valid and decodable."""
    min_unique_frac: float = 0.002
    """Distinct designs among them, at least this share."""
    max_kind_drop: float = 0.05
    """No kind of prompt may score lower than the opponent's by more than this."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(-1 <= self.margin <= 1, "margin", self.margin, "-1 to 1")
        check(self.min_prompts >= 1, "min_prompts", self.min_prompts, ">= 1")
        check(self.min_designs >= 1, "min_designs", self.min_designs, ">= 1")
        check(0 <= self.min_unique_frac <= 1, "min_unique_frac", self.min_unique_frac, "0 to 1")
        check(self.max_kind_drop >= 0, "max_kind_drop", self.max_kind_drop, ">= 0")

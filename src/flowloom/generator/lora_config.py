"""What a generator's LoRA looks like; torch-free, since recipes and `--help` read it."""

from __future__ import annotations

import dataclasses

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank updates of linear layers: W + alpha / rank * B A (arXiv 2106.09685)."""

    rank: int = 16
    """Rows of A, columns of B."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    """Ends of the module paths that are adapted: `to_q`, `to_out.0`, `attn.to_q`."""
    skip_modules: tuple[str, ...] = ()
    """Modules that stay as they are with all below them, as paths: `text`, `blocks.0`."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self.rank >= 1, "rank", self.rank, ">= 1")
        check(self.alpha > 0, "alpha", self.alpha, "> 0")
        check(len(self.target_modules) > 0, "target_modules", self.target_modules, "a name")

"""Draw prompts and random valid workflows."""

from components.build_pairs.component import build_pairs

__all__ = ["build_pairs"]

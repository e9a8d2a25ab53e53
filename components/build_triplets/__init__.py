"""Render workflows and score the pictures."""

from components.build_triplets.component import build_triplets

__all__ = ["build_triplets"]

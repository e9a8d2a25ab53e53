"""Bring what an earlier turn left."""

from components.recall.component import recall

__all__ = ["recall"]

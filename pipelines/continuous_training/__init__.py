"""One turn of the loop, from data to a champion."""

from pipelines.continuous_training.pipeline import continuous_training

__all__ = ["continuous_training"]

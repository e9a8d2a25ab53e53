"""Optimise the designer against the frozen reward ensemble."""

from components.train_grpo.component import train_grpo

__all__ = ["train_grpo"]

"""Tune a generator for a score, by FDFO or Flow-GRPO."""

from components.tune_generator.component import tune_generator

__all__ = ["tune_generator"]

"""Tune a generator with FDFO."""

from components.tune_generator.component import tune_generator

__all__ = ["tune_generator"]

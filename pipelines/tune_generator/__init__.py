"""Tune a generator for a score, publish it in the catalogue, and report what it does."""

from pipelines.tune_generator.pipeline import tune_generator

__all__ = ["tune_generator"]

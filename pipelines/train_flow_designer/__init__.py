"""Train a designer for the catalogue as it is, from data to a gated champion; report."""

from pipelines.train_flow_designer.pipeline import train_flow_designer

__all__ = ["train_flow_designer"]

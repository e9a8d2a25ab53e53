"""Compare policies by rendering held-out prompts."""

from components.evaluate.component import evaluate

__all__ = ["evaluate"]

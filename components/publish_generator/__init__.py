"""Publish a tuned generator as part of the catalogue."""

from components.publish_generator.component import publish_generator

__all__ = ["publish_generator"]

"""Policies compared by rendering on held-out prompts, and the report that a person reads."""

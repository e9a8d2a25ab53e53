"""Let the gate decide, and move the alias `champion`."""

from components.promote.component import promote

__all__ = ["promote"]

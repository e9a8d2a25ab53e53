"""Write the report that a person reads."""

from components.report.component import report

__all__ = ["report"]

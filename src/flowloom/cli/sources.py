"""Workflows that a command is given; see `flowloom.dataset.sources` for what is read and how."""

from __future__ import annotations

from flowloom.cli.output import warn
from flowloom.dataset.sources import API, UI, Inputs, Source

__all__ = ["API", "UI", "Inputs", "Source", "report_unreadable"]


def report_unreadable(command: str, source: Source) -> bool:
    """Name an input that cannot be read on standard error, on one line; whether it is one."""
    if source.error is not None:
        warn(f"flowloom {command}: {source.path}: {source.error}")
    return source.error is not None

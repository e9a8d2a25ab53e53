"""Other libraries' progress bars, which have no place in a run's log."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars(library: str) -> Iterator[None]:
    """None of `transformers` or `diffusers` inside; as before after it."""
    logging = importlib.import_module(f"{library}.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

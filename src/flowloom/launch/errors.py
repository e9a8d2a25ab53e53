"""What a launched stage ends with when it is not its result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

NUM_LINES = 20
"""Last lines of a failed process that its error repeats."""


class LaunchError(ValueError):
    """A stage's processes failed, or could not be reached; its last lines say why."""

    def __init__(self, text: str, lines: Iterable[str] = ()):
        """Say `text`, then the last `lines` of what failed."""
        tail = list(lines)[-NUM_LINES:]
        super().__init__("\n  ".join([text + "; its last lines:", *tail] if tail else [text]))


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM unwind like an interrupt at the keyboard, so that what was started is ended.

    The exit status is then the shell's for that signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

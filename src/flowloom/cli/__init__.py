"""The command `flowloom`. Importing it imports nothing heavy; each command imports what it uses.

Exit status: 0 as asked; 1 the answer is no (an invalid workflow, a picture that failed, a gate that
holds); 2 the question was wrong (usage, unreadable input), with one line on standard error. 130
after an interrupt, 141 where nobody reads on (`flowloom ... | head`), as other programs have it.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

OK, NO, USAGE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    # Read when torch is first imported: busy waiting makes a step 4 to 200 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end; there must be something to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def _run(arguments: Sequence[str] | None) -> int:
    from flowloom.cli.parser import build_parser

    parsed = build_parser().parse_args(arguments)
    name = " ".join(filter(None, (parsed.command, getattr(parsed, "action", None))))
    module, _, function = parsed.handler.partition(":")
    try:
        return getattr(importlib.import_module(f"flowloom.cli.{module}"), function)(parsed)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"flowloom {name}: {one_line(error)}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"flowloom {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def one_line(error: BaseException) -> str:
    """An error as a person reads it: its message on one line."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

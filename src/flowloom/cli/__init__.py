"""The command `flowloom`. Importing it imports nothing heavy; each command imports what it uses.

Exit status: 0 as asked; 1 the answer is no (an invalid workflow, a picture that failed, a gate that
holds); 2 the question was wrong (usage, unreadable input), with one line on standard error.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

OK, NO, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    # Read when torch is first imported: busy waiting makes a step 4 to 200 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from flowloom.cli.parser import build_parser

    parsed = build_parser().parse_args(arguments)
    module, _, function = parsed.handler.partition(":")
    try:
        return getattr(importlib.import_module(f"flowloom.cli.{module}"), function)(parsed)
    except (ValueError, OSError) as error:
        print(f"flowloom {parsed.command}: {one_line(error)}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"flowloom {parsed.command}: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """An error as a person reads it: its message on one line."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

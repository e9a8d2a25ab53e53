"""What commands print: one JSON object, or text for people; progress on standard error."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

ItemT = TypeVar("ItemT")
Part = str | tuple[str, str]
"""A text, or a text and its style."""

PATIENCE_S = 0.5
"""Seconds of work before a progress bar appears."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Lines:
    """Lines on standard output; styled where that is a terminal, plain elsewhere."""

    def __init__(self) -> None:
        self._console = None
        if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
            from rich.console import Console

            self._console = Console(highlight=False)

    def print(self, *parts: Part) -> None:
        """Print one line of the parts, each a text or (text, style)."""
        cleaned = [
            printable(part) if isinstance(part, str) else (printable(part[0]), part[1])
            for part in parts
        ]
        if self._console is None:
            print("".join(part if isinstance(part, str) else part[0] for part in cleaned))
            return
        from rich.text import Text

        # Whole lines: the terminal wraps them, so that a path can be copied.
        self._console.print(Text.assemble(*cleaned), soft_wrap=True)


def print_json(value: Any) -> None:
    """The one object `--json` prints. Non-finite numbers are no JSON, so they are refused."""
    print(json.dumps(value, allow_nan=False))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    styles: Mapping[str, str] | None = None,
) -> None:
    """A table on standard output; columns that hold only numbers are aligned right.

    Args:
        title: Line above it.
        columns: Their names.
        rows: Cells.
        styles: Style of every cell that holds a text.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = rows and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    # A pipe has no width: do not wrap there.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def progress(
    items: Iterable[ItemT],
    description: str,
    total: int,
    position: Callable[[], int] | None = None,
    *,
    prints: bool = False,
) -> Iterator[ItemT]:
    """Go through `items` with a bar on standard error, where that is a terminal.

    Args:
        items: What to go through.
        description: What is done with them.
        total: How far there is to go: a number of items, or what `position` ends at.
        position: Says how far one is; the number of items gone through if left out.
        prints: Whether the loop prints a line for each item; on a terminal these are enough.
    """
    if not sys.stderr.isatty() or (prints and sys.stdout.isatty()):
        yield from items
        return
    bar, started_s = None, time.monotonic()
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - started_s > PATIENCE_S:
                bar = _start_bar(description, total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done if position is None else position())
            yield item
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(description: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    # Results stay on standard output; only what is warned about is moved above the bar.
    bar = Progress(console=Console(stderr=True), transient=True, redirect_stdout=False)
    bar.add_task(description, total=total)
    bar.start()
    return bar


def warn(message: str) -> None:
    """A line on standard error."""
    print(printable(message), file=sys.stderr)


def printable(text: str) -> str:
    """The text with control characters spelled out: files come from strangers."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 error", "2 errors", "2 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that appears under its name once it is whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True

"""What commands print: one JSON object, or tables for people; progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


def print_json(value: Any) -> None:
    """The one object `--json` prints. Non-finite numbers are no JSON, so they are refused."""
    print(json.dumps(value, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; columns that hold only numbers are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    rows = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = rows and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # A pipe has no width: do not wrap there.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def progress(items: Iterable[ItemT], description: str, total: int) -> Iterator[ItemT]:
    """Go through `items` with a bar on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(description, total=total)
        for item in items:
            yield item
            bars.advance(bar)


def warn(message: str) -> None:
    """A line on standard error."""
    print(message, file=sys.stderr)


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True

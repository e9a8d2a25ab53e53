"""`convert`: between the API format and the editor's."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowloom.cli import NO, OK, USAGE, one_line
from flowloom.cli.catalogues import open_catalogue
from flowloom.cli.output import Lines, print_json, progress, warn, written_whole
from flowloom.cli.sources import UI, Inputs, Source, report_unreadable
from flowloom.workflow import Catalogue
from flowloom.workflow.canvas import Converted, is_ui, to_ui


def convert(parsed: Namespace) -> int:
    """Write workflows in another format; status 1 where one cannot be converted."""
    catalogue = open_catalogue(parsed.catalogue, parsed.header)
    inputs = Inputs(parsed.paths, prefer=parsed.to)
    names = Names(Path(parsed.out), inputs.files)
    results, num_unreadable, num_failed, lines = [], 0, 0, Lines()
    for source in progress(
        inputs, "converting", inputs.size, inputs.position, prints=not parsed.json
    ):
        row: dict[str, Any] = {"path": source.path, "out": None, "error": source.error}
        if report_unreadable("convert", source):
            num_unreadable += 1
        else:
            try:
                value, notes = converted(source, parsed.to, catalogue)
                out = names.take(source)
                _write(out, value)
                row["out"] = str(out)
                for note in notes:
                    warn(f"{source.path}: {note}")
            except ValueError as error:
                row["error"] = one_line(error)
                num_failed += 1
            if not parsed.json:
                failed = row["out"] is None
                said = (f"not converted: {row['error']}", "bold red") if failed else row["out"]
                lines.print((source.path, "bold"), ": ", said)
        if parsed.json:
            results.append(row)
    if parsed.json:
        print_json({"results": results})
    if num_unreadable:
        return USAGE
    return NO if num_failed else OK


def converted(source: Source, to: str, catalogue: Catalogue) -> tuple[Any, tuple[str, ...]]:
    """A workflow in the format `to`, and what is to be said of it.

    A file of the editor stays as it is, layout and all, where that format is asked for.

    Raises:
        ValueError: It cannot be converted.
    """
    if to == UI and is_ui(source.value):
        return source.value, ()
    found = source.read(catalogue)
    if to == UI:
        return to_ui(found.workflow, catalogue, found.titles), found.warnings
    return titled(found), found.warnings


def titled(found: Converted) -> dict[str, dict[str, Any]]:
    """API JSON that keeps the titles people gave to nodes."""
    api = found.workflow.to_api()
    for node_id, title in found.titles.items():
        api[node_id]["_meta"] = {"title": title}
    return api


class Names:
    """Distinct files to write to, none of which is an input."""

    def __init__(self, out: Path, inputs: Iterable[Path]) -> None:
        self._out = out
        self._inputs = {path.resolve() for path in inputs}
        self._taken: set[Path] = set()

    def take(self, source: Source) -> Path:
        """The file for a workflow, below the folder as its source was below its own.

        Raises:
            ValueError: It would replace an input.
        """
        name, number = source.name, 1
        while name in self._taken:
            number += 1
            name = source.name.with_name(f"{source.name.name}_{number}")
        path = self._out / f"{name}.json"
        if path.resolve() in self._inputs:
            raise ValueError(f"--out: {path} is an input, expected a folder where it is not")
        self._taken.add(Path(name))
        return path


def _write(path: Path, value: Any) -> None:
    try:
        data = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (ValueError, RecursionError):
        raise ValueError("got NaN, Infinity or deep nesting, expected what JSON can hold") from None
    with written_whole(path) as file:
        file.write(data.encode())

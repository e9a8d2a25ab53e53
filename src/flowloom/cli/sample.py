"""`sample`: random valid workflows of a catalogue."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flowloom.cli import OK, USAGE, one_line
from flowloom.cli.catalogues import open_catalogue
from flowloom.cli.output import counted, progress, warn, written_whole
from flowloom.cli.sources import Inputs, report_unreadable
from flowloom.workflow import Catalogue, Grammar, Workflow
from flowloom.workflow.estimation import estimate_weights
from flowloom.workflow.profile import text_to_image
from flowloom.workflow.sampling import stream

T2I, ALL = "t2i", "all"
"""Profiles that have a name; without one it is the first."""


def sample(parsed: Namespace) -> int:
    """Draw random valid workflows into a .jsonl, each a template with '{prompt}'."""
    if not parsed.out.endswith(".jsonl"):
        raise ValueError(f"--out: got {parsed.out!r}, expected a name that ends with .jsonl")
    catalogue = open_catalogue(parsed.catalogue, parsed.header)
    given: dict[str, Any] = {} if parsed.budget is None else {"budget": parsed.budget}
    grammar = Grammar(
        catalogue,
        classes=classes_of(catalogue, parsed.classes, parsed.profile),
        require=parsed.require,
        forbid=parsed.forbid,
        **given,
    )
    examples = Examples(parsed.like, catalogue)
    weights = estimate_weights(examples, grammar) if parsed.like else None
    drawn = islice(stream(grammar, parsed.seed, weights), parsed.n)
    with written_whole(Path(parsed.out)) as file:
        for encoded in progress(drawn, "sampling", parsed.n):
            workflow = grammar.codec.decode(encoded.tokens, encoded.texts, encoded.seeds)
            file.write(json.dumps({"workflow": workflow.to_api()}).encode() + b"\n")
    said = f", like {counted(examples.read, 'example')}" if parsed.like else ""
    warn(
        f"{parsed.out}: {counted(parsed.n, 'workflow')} of {len(grammar.class_names)} classes{said}"
    )
    return USAGE if examples.unreadable else OK


class Examples:
    """The workflows under paths; those that cannot be read or converted are named and left out."""

    def __init__(self, paths: Sequence[str], catalogue: Catalogue) -> None:
        self._inputs, self._catalogue = Inputs(paths), catalogue
        self.read = self.unreadable = 0

    def __iter__(self) -> Iterator[Workflow]:
        """Read on."""
        for source in self._inputs:
            if report_unreadable("sample", source):
                self.unreadable += 1
                continue
            try:
                workflow = source.workflow(self._catalogue)
            except ValueError as error:
                warn(f"flowloom sample: {source.path}: not counted: {one_line(error)}")
                continue
            self.read += 1
            yield workflow


def classes_of(
    catalogue: Catalogue, classes: str | None, profile: str | None
) -> tuple[str, ...] | None:
    """The classes that may be drawn; None means every class that can be run.

    Raises:
        ValueError: There is none, or a file of names cannot be read.
    """
    if classes is not None:
        return tuple(filter(None, map(str.strip, classes.split(","))))
    if profile == ALL:
        return None
    if profile in (None, T2I):
        return text_to_image(catalogue)
    return text_to_image(catalogue, _names(Path(profile)))


def _names(path: Path) -> list[str]:
    """Class names of a file: a JSON list, or one name per line."""
    try:
        text = path.read_text()
        names = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--profile {path}: cannot read: {error}") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"--profile {path}: got a list with other things, expected class names")
    return [name.strip() for name in names if name.strip()]

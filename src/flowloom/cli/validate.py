"""`validate`: every problem of workflows, without a server."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

from flowloom.cli import NO, OK, USAGE, one_line
from flowloom.cli.catalogues import open_catalogue
from flowloom.cli.output import Lines, Part, counted, print_json, progress
from flowloom.cli.sources import Inputs, Source, report_unreadable
from flowloom.workflow import Catalogue, Problem
from flowloom.workflow import validate as find_problems
from flowloom.workflow.canvas import from_ui, is_ui
from flowloom.workflow.literals import ERROR, WARNING

FIELDS = ("type", "severity", "node_id", "class_type", "input", "message", "suggestion")
"""What `--json` tells of a problem."""
_STYLES = {ERROR: "bold red", WARNING: "yellow"}
_MOST_NODES = 6
_LABEL = 9
"""Columns of "error" and "warning"."""


def validate(parsed: Namespace) -> int:
    """Check workflows; status 0 all valid, 1 problems, 2 unreadable input."""
    catalogue = open_catalogue(parsed.catalogue, parsed.header)
    inputs = Inputs(parsed.paths)
    results, tally, lines = [], Tally(), Lines()
    for source in progress(
        inputs, "validating", inputs.size, inputs.position, prints=not parsed.json
    ):
        if report_unreadable("validate", source):
            problems = [Problem("unreadable", ERROR, "", "", "", source.error or "")]
            tally.unreadable += 1
        else:
            problems = check(source, catalogue)
            tally.add(problems)
            if not parsed.json:
                print_problems(lines, source.path, problems)
        if parsed.json:
            rows = [{name: getattr(problem, name) for name in FIELDS} for problem in problems]
            results.append({"path": source.path, "valid": is_valid(problems), "problems": rows})
    if parsed.json:
        print_json({"results": results})
    elif tally.checked:
        tally.print(lines, catalogue.name or parsed.catalogue)
    if tally.unreadable:
        return USAGE
    return OK if tally.valid == tally.checked else NO


def check(source: Source, catalogue: Catalogue) -> list[Problem]:
    """Every problem of a workflow that could be read, also one that cannot be converted."""
    if not is_ui(source.value):
        return find_problems(source.value, catalogue)
    try:
        converted = from_ui(source.value, catalogue, known_only=False)
    except (ValueError, RecursionError) as error:
        return [Problem("invalid_prompt", ERROR, "", "", "", one_line(error))]
    notes = [Problem("conversion", WARNING, "", "", "", text) for text in converted.warnings]
    return [*notes, *find_problems(converted.workflow, catalogue)]


def is_valid(problems: Sequence[Problem]) -> bool:
    """Whether nothing worse than a warning was found."""
    return all(problem.severity != ERROR for problem in problems)


def print_problems(lines: Lines, path: str, problems: Sequence[Problem]) -> None:
    """What is to be said of one workflow; nodes with the same problems are named together."""
    counts = Counter(problem.severity for problem in problems)
    said = ", ".join(counted(counts[s], s) for s in (ERROR, WARNING) if counts[s])
    verdict: Part = ("not valid", "bold red") if counts[ERROR] else ("valid", "green")
    lines.print((path, "bold"), ": ", verdict, f", {said}" if said else "")
    alike: dict[tuple, list[str]] = {}
    for node_id, group in _by_node(problems).items():
        key = tuple((p.class_type, p.severity, p.input, p.message, p.suggestion) for p in group)
        alike.setdefault(key, []).append(node_id)
    for faults, nodes in alike.items():
        if nodes != [""]:
            few = ", ".join(nodes[:_MOST_NODES])
            more = f" and {len(nodes) - _MOST_NODES} more" if len(nodes) > _MOST_NODES else ""
            class_type = f" ({faults[0][0]})" if faults[0][0] else ""
            noun = "node" if len(nodes) == 1 else "nodes"
            lines.print(f"  {noun} {few}{more}", (class_type, "cyan"))
        for _, severity, name, message, suggestion in faults:
            label = (f"    {severity:<{_LABEL}}", _STYLES.get(severity, ""))
            lines.print(label, (f"{name}: " if name else "", "bold"), message)
            if suggestion:
                lines.print(" " * (4 + _LABEL), (suggestion, "green"))


def _by_node(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    nodes: dict[str, list[Problem]] = {}
    for problem in problems:
        nodes.setdefault(problem.node_id, []).append(problem)
    return nodes


class Tally:
    """How many workflows were valid, and what the others have in common."""

    def __init__(self) -> None:
        self.checked = self.valid = self.unreadable = 0
        self.types: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()

    def add(self, problems: Sequence[Problem]) -> None:
        """Count one workflow in."""
        self.checked += 1
        self.valid += is_valid(problems)
        errors = [problem for problem in problems if problem.severity == ERROR]
        self.types.update({problem.type for problem in errors})
        self.missing.update({p.class_type for p in errors if p.type == "missing_node_type"})

    def print(self, lines: Lines, against: str) -> None:
        """The last lines: what is wrong most often, and how many are valid."""
        if self.checked - self.valid > 1:
            for title, counts in (("problems", self.types), ("missing classes", self.missing)):
                named = [f"{name} ({number})" for name, number in counts.most_common(8)]
                if len(counts) > len(named):
                    named.append(f"{len(counts) - len(named)} more")
                if named:
                    lines.print(f"{title}, by number of workflows: {', '.join(named)}")
        style = "green" if self.valid == self.checked else "bold red"
        unread = f"; {self.unreadable} unreadable" if self.unreadable else ""
        verdict = (f"{self.valid} of {self.checked} valid", style)
        lines.print(verdict, f" against {against}{unread}")

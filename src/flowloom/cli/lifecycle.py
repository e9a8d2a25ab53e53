"""`lineage`, `reproduce`, `compare`, `gc`: what became of runs, and what they came from."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowloom.cli import NO, OK
from flowloom.cli.output import (
    Lines,
    counted,
    print_json,
    print_table,
    printable,
    warn,
    written_whole,
)

if TYPE_CHECKING:
    from flowloom.lifecycle.comparison import Comparison
    from flowloom.lifecycle.lineage import Artifact, Lineage
    from flowloom.lifecycle.record import Record, Subject

SHORT = 12
"""Digits of a digest that are shown to people."""
UNEXPLAINED = (
    "nothing that is recorded: another kind of processor, another number of processes, or a stage "
    "that is not deterministic"
)


def lineage(parsed: Namespace) -> int:
    """Show the lineage of a model version or a run."""
    from flowloom.lifecycle.lineage import trace
    from flowloom.lifecycle.records import Records

    records = Records()
    subject = records.subject(parsed.subject)
    if subject.digest is None:
        raise ValueError(f"{subject.title}: got no artifact, expected a finished run")
    first = {subject.digest: subject.record} if subject.record else None
    found = trace(records, [subject.digest], first)
    if parsed.json:
        print_json({"subject": subject.title, "version": subject.version, **found.to_dict()})
    else:
        _print_tree(subject, found)
    return NO if found.to_dict()["problems"] else OK


def reproduce(parsed: Namespace) -> int:
    """Repeat a run, or all runs below a model version, and compare; status 1 where one differs."""
    from flowloom.config import parse_assignments
    from flowloom.lifecycle import reproduce as reproduction
    from flowloom.lifecycle.records import Records

    records = Records()
    subject = records.subject(parsed.subject)
    chain = reproduction.plan(records, subject, parsed.only, parsed.from_inputs)
    say = warn if parsed.json else _say
    say(f"{subject.title}: {counted(len(chain), 'run')} to repeat")
    overrides = parse_assignments(parsed.assignments)
    found = reproduction.reproduce(records, chain, overrides, say=say, keep=parsed.keep)
    if parsed.json:
        print_json(found.to_dict())
    elif found.equal:
        say(f"{subject.title}: equal, {counted(len(found.outcomes), 'artifact')}")
    else:
        unexplained = () if found.failed else (UNEXPLAINED,)
        for line in found.changes or unexplained:
            say(f"cause: {line}")
        if found.left:
            say(f"not tried: {', '.join(found.left)}")
    return OK if found.equal else NO


def compare(parsed: Namespace) -> int:
    """Show two runs side by side."""
    from flowloom.lifecycle import comparison
    from flowloom.lifecycle.records import Records

    out = None if parsed.out is None else Path(parsed.out)
    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out: got {parsed.out!r}, expected FILE.html")
    records = Records()
    found = comparison.compare(records, *(records.subject(text) for text in parsed.subjects))
    if out is not None:
        page = comparison.page(found)
        with written_whole(out) as file:
            file.write(page.encode())
    if parsed.json:
        print_json({**found.to_dict(), "page": str(out) if out else None})
    else:
        _print_comparison(found)
        if out is not None:
            Lines().print(f"page: {out}")
    return OK


def gc(parsed: Namespace) -> int:
    """Show or delete what nothing needs; or pin a run."""
    from flowloom.lifecycle import retention
    from flowloom.lifecycle.records import Records

    records, lines = Records(), Lines()
    if parsed.pin or parsed.unpin:
        run_id = retention.pin(records, parsed.pin or parsed.unpin, bool(parsed.pin))
        if parsed.json:
            print_json({"run": run_id, "pinned": bool(parsed.pin)})
        else:
            lines.print(f"{run_id}: {'pinned' if parsed.pin else 'no longer pinned'}")
        return OK
    age_s = parsed.min_age_hours * 3600
    found = retention.look(records, remote=parsed.remote, min_age_s=age_s)
    deleted = retention.delete(found) if parsed.delete else None
    if parsed.json:
        print_json({**found.to_dict(), "deleted_bytes": deleted})
        return OK
    if found.items:
        rows = [[item.kind, item.name, _size(item.size), item.why] for item in found.items]
        print_table("Not needed", ["what", "which", "size", "why"], rows)
    lines.print(found.summary(), (f" {_size(found.size)}", "bold"))
    for reason, number in found.kept.items():
        lines.print(f"kept: {counted(number, 'artifact')}: {reason}")
    if deleted is None and found.items:
        lines.print("nothing was deleted; --delete does it")
    elif deleted is not None:
        lines.print(f"deleted {_size(deleted)}")
    return OK


def _say(line: str) -> None:
    print(printable(line))
    sys.stdout.flush()  # stages take minutes


def _print_tree(subject: Subject, found: Lineage) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    shown: set[str] = set()
    root = found.artifacts[found.roots[0]]
    tree = Tree(Text(printable(subject.title), style="bold"), guide_style="dim")

    def add(branch: Tree, name: str, artifact: Artifact) -> None:
        again = artifact.digest in shown
        shown.add(artifact.digest)
        node = branch.add(_label(name, artifact, again))
        if again:
            return
        for text in _facts(artifact):
            node.add(text)
        for key, digests in artifact.inputs.items():
            for number, digest in enumerate(digests):
                label = f"{key}[{number}]" if len(digests) > 1 else key
                add(node, label, found.artifacts[digest])

    add(tree, "model" if subject.version else "artifact", root)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(tree)
    _print_sources(found)


def _label(name: str, artifact: Artifact, again: bool) -> Any:
    from rich.text import Text

    label = Text.assemble((name, "cyan"), f" {artifact.digest.removesuffix('.dir')} ")
    if again:
        return label.append("(above)", "dim")
    for record in artifact.makers[:1]:
        label.append(f"by {record.stage}", "bold")
        label.append(f" run {_where(record)}")
    if not artifact.followed:
        label.append(" (whom it was compared with)", "dim")
    return label


def _facts(artifact: Artifact) -> list[Any]:
    from rich.text import Text

    facts = []
    if artifact.problem:
        facts.append(Text(printable(f"! {artifact.problem}"), style="yellow"))
    for record in artifact.makers[:1]:
        data = (record.data or "untracked").removesuffix(".dir")[:SHORT]
        commit = (record.commit or "none")[:SHORT]
        catalogue = f", catalogue {record.catalogue[:SHORT]}" if record.catalogue else ""
        text = f"code {record.code[:SHORT]}, commit {commit}, data {data}{catalogue}"
        facts.append(Text(text, style="dim"))
    return facts


def _print_sources(found: Lineage) -> None:
    lines, record = Lines(), found.to_dict()
    for name in ("catalogues", "data", "code", "commits", "problems"):
        for value in record[name] or ["none recorded"] * (name != "problems"):
            lines.print((f"{name}: ", "bold"), str(value))


def _where(record: Record) -> str:
    if record.run_ids:
        more = len(record.run_ids) - 1
        return record.run_ids[0] + (f" and {more} more" if more else "")
    return str(record.folder)


def _print_comparison(found: Comparison) -> None:
    a, b = found.titles
    print_table("Runs", ["", "a", "b"], [["run", a, b], *found.facts])
    tables = {"Configuration": found.config, "Inputs": found.inputs}
    for title, rows in tables.items():
        if rows:
            print_table(f"{title}: what differs", ["field", "a", "b"], rows)
        else:
            Lines().print(f"{title}: equal")
    if found.metrics:
        rows = [[m.name, _number(m.a), _number(m.b), _signed(m.difference)] for m in found.metrics]
        print_table("Metrics, final", ["metric", "a", "b", "b - a"], rows)
    if found.pictures:
        rows = [[p.name, p.a or "none", p.b or "none", p.verdict] for p in found.pictures]
        print_table("Pictures", ["picture", "a", "b", ""], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.6g}"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"

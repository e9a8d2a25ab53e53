"""`promote` and `rollback`: who designs for those who do not say, and why."""

from __future__ import annotations

from argparse import Namespace
from datetime import UTC, datetime

from flowloom.cli import NO, OK
from flowloom.cli.output import print_json


def promote(parsed: Namespace) -> int:
    """Hold a registered version against the gate of a recipe; status 1 where it is refused."""
    from flowloom.lifecycle import registry
    from flowloom.recipes import resolve

    if parsed.history:
        return _history(parsed)
    version = None if parsed.version is None else str(parsed.version)
    version, decision = registry.reconsider(resolve(parsed.recipe).promote, version)
    if parsed.json:
        print_json({"version": version, **decision.to_dict()})
    else:
        print(f"version {version}: {'promoted' if decision.promoted else 'refused'}")
        for check in decision.checks:
            print(f"  {check}")
    return OK if decision.promoted else NO


def _history(parsed: Namespace) -> int:
    """Every decision on every machine, oldest first, each with the numbers it rests on."""
    from flowloom.lifecycle import registry
    from flowloom.lifecycle.gate import Check

    rows = registry.history()
    if parsed.json:
        print_json({"history": rows})
        return OK
    for row in rows:
        at = datetime.fromtimestamp(row["at_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        before = f"champion before: {row['previous'] or 'none'}"
        print(
            f"{at}  {row['event']} version {row['version'] or 'none'} ({before}): {row['reason']}"
        )
        for check in row["checks"]:
            print(f"  {Check(**check)}")
    return OK


def rollback(parsed: Namespace) -> int:
    """Give the alias champion back to an earlier champion."""
    from flowloom.lifecycle import registry

    version = registry.rollback(None if parsed.to is None else str(parsed.to))
    if parsed.json:
        print_json({"version": version})
    else:
        print(f"champion is now version {version}")
    return OK

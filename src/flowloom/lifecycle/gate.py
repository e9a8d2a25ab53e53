"""The gate: may this candidate become the champion? A pure function of its evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from flowloom.lifecycle.config import GateConfig

CANDIDATE = "grpo"
"""Name, in an evaluation, of the policy that would become the champion."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One condition with its number."""

    name: str
    """What is looked at."""
    value: float | int | str
    """What was found."""
    bound: float | int | str
    """What it is held against."""
    rule: str
    """How: `>`, `>=` or `=`."""
    holds: bool
    """The verdict."""

    def __str__(self) -> str:
        """The check as a line for a person."""
        verdict = "holds" if self.holds else "FAILS"
        return f"{self.name}: {_text(self.value)} {self.rule} {_text(self.bound)}: {verdict}"


@dataclasses.dataclass(frozen=True)
class Decision:
    """The gate's verdict: promoted if every check holds."""

    opponent: str
    """Whom the candidate was compared with: `champion` or `best_fixed`."""
    checks: tuple[Check, ...]
    """Every condition, those that hold and those that fail."""

    @property
    def promoted(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)

    @property
    def reason(self) -> str:
        """The failed checks, or what carried the promotion, in one line."""
        failed = [str(check) for check in self.checks if not check.holds]
        return "; ".join(failed) if failed else str(self.checks[0])

    def to_dict(self) -> dict[str, Any]:
        """The decision as `decision.json` holds it."""
        return {"promoted": self.promoted, "opponent": self.opponent, "checks": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """The checks as JSON holds them; a number that is none becomes its name."""
        return [_row(check) for check in self.checks]


def gate(evaluation: Mapping[str, Any], config: GateConfig) -> Decision:
    """Hold an evaluation against the bounds.

    Args:
        evaluation: `evaluation.json` of the `evaluate` stage.
        config: The bounds.

    Raises:
        ValueError: If the evaluation lacks something that must be checked.
    """
    opponent = _get(evaluation, "opponent")
    paired = _get(evaluation, "paired", f"vs_{opponent}")
    designs = _get(evaluation, "designs")
    checked = int(_get(evaluation, "designs", "n"))
    checks = [
        _above(f"paired difference to {opponent}, lower end", paired["low"], config.margin),
        _at_least("held-out prompts", int(paired["n"]), config.min_prompts),
        _at_least("unrendered designs", checked, config.min_designs),
        _equal("valid designs", int(_get(designs, "valid")), checked),
        _equal("decodable designs", int(_get(designs, "decodable")), checked),
        _at_least("distinct share", float(_get(designs, "unique_frac")), config.min_unique_frac),
    ]
    ours = _get(evaluation, "policies", CANDIDATE, "by_kind")
    theirs = _get(evaluation, "policies", opponent, "by_kind")
    for kind in sorted(theirs):
        change = float(ours.get(kind, float("nan"))) - float(theirs[kind])
        checks.append(_at_least(f"change on {kind}", change, -config.max_kind_drop))
    return Decision(opponent=opponent, checks=tuple(checks))


# A value that is not a number fails every comparison, and so every check.
def _above(name: str, value: float, bound: float) -> Check:
    return Check(name, value, bound, ">", value > bound)


def _at_least(name: str, value: float, bound: float) -> Check:
    return Check(name, value, bound, ">=", value >= bound)


def _equal(name: str, value: int | str, bound: int | str) -> Check:
    return Check(name, value, bound, "=", value == bound)


def champion_unchanged(now: str | None, expected: str | None) -> Check:
    """The compare of the compare-and-swap: the champion is still the one evaluated against."""
    return _equal("champion", now or "none", expected or "none")


def _get(value: Mapping[str, Any], *path: str) -> Any:
    for depth, name in enumerate(path):
        if name not in value:
            where = ".".join(path[: depth + 1])
            raise ValueError(f"evaluation.json: got no {where!r}, expected what the gate checks")
        value = value[name]
    return value


def _row(check: Check) -> dict[str, Any]:
    row = dataclasses.asdict(check)
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _text(value: float | int | str) -> str:
    return f"{value:+.4f}" if isinstance(value, float) else str(value)

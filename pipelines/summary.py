"""What a person reads at the end of a turn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.table import Table

from flowloom.dataset.card import read_card
from flowloom.lifecycle import recall, tracking
from flowloom.lifecycle.gate import CANDIDATE, Check
from flowloom.lifecycle.turns import Turn
from pipelines.local import Step


def show(console: Console, turn: Turn, steps: Sequence[Step], total: float, before: float) -> None:
    """Print times, the comparison, the gate's verdict, and where everything is.

    Args:
        console: Where to print.
        turn: The finished turn.
        steps: Its steps as the runner saw them.
        total: Seconds of the whole command.
        before: Seconds of it before the first step.
    """
    records = {record["step"]: record for record in turn.steps()}
    _times(console, steps, records, total, before)
    if turn.record.get("recalled"):
        _gone_on(console, turn.record["recalled"], records)
    evaluation, has_champion = None, turn.champion is not None
    if "evaluate" in records:
        evaluation = Path(records["evaluate"]["out"])
        _comparison(console, json.loads((evaluation / "evaluation.json").read_text()))
        decision = json.loads((Path(records["promote"]["out"]) / "decision.json").read_text())
        _verdict(console, decision)
        has_champion = has_champion or decision["promoted"]
    elif "tune_generator" in records:
        _tuned(console, Path(records["tune_generator"]["out"]))
    report = Path(records["report"]["out"]) / "report.html"
    _places(console, turn, evaluation, report, has_champion)


def start_up_share(
    steps: Sequence[Step], records: dict[str, Any], total: float, before: float
) -> float:
    """Share of `total` spent in starting processes and importing, not in the stages themselves.

    Two steps at the same time count both, so this is an upper bound.
    """
    inside = sum(records[step.name]["stage_s"] for step in steps if step.name in records)
    return min(1.0, (before + sum(step.wall_s for step in steps) - inside) / total)


def _times(
    console: Console,
    steps: Sequence[Step],
    records: dict[str, Any],
    total: float,
    before: float,
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("step", "seconds", "start-up", "artifact"):
        table.add_column(title, justify="left" if title in ("step", "artifact") else "right")
    for step in steps:
        record = records.get(step.name)
        if record is None:  # it makes no artifact
            table.add_row(step.name, f"{step.wall_s:.1f}", f"{step.wall_s:.1f}", "")
            continue
        start_s = step.wall_s - record["stage_s"]
        note = "  as before" if record["cached"] else ""
        table.add_row(
            step.name, f"{step.wall_s:.1f}", f"{start_s:.1f}", record["digest"][:12] + note
        )
    share = start_up_share(steps, records, total, before)
    table.add_row("total", f"{total:.1f}", f"{100 * share:.0f} %", "", style="bold")
    console.print()
    console.print(table)


def _gone_on(console: Console, left: dict[str, str], records: dict[str, Any]) -> None:
    before = sum(read_card(recall.bring(left["triplets"]))["counts"]["split"].values())
    now = records["build_triplets_round_2"]["metrics"]["triplets/renders"]
    console.print()
    console.print(
        f"Went on from version {left['version']}: {before} renders, {now - before:.0f} added",
        highlight=False,
    )


def _comparison(console: Console, evaluation: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("policy", "score", "candidate's lead", "95 % interval"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    policies = evaluation["policies"]
    for name in sorted(policies, key=lambda name: -policies[name]["mean"]):
        lead = evaluation["paired"].get(f"vs_{name}")
        cells = ("", "")
        if lead:
            cells = (f"{lead['mean']:+.3f}", f"{lead['low']:+.3f} to {lead['high']:+.3f}")
        label = "candidate (GRPO + guidance)" if name == CANDIDATE else name.replace("_", " ")
        table.add_row(label, f"{policies[name]['mean']:.3f}", *cells)
    prompts = evaluation["paired"][f"vs_{evaluation['opponent']}"]["n"]
    console.print()
    console.print(f"Rendered score on {prompts} held-out prompts:", highlight=False)
    console.print(table)


def _verdict(console: Console, decision: dict[str, Any]) -> None:
    failed = [check for check in decision["checks"] if not check["holds"]]
    console.print()
    if not failed:
        console.print("[bold green]The candidate is the new champion.[/bold green]")
        return
    console.print("[bold yellow]The gate held the candidate back:[/bold yellow]")
    for check in failed:
        console.print(f"  {Check(**check)}", highlight=False, markup=False, soft_wrap=True)


def _tuned(console: Console, generator: Path) -> None:
    curve = json.loads((generator / "curve.json").read_text())
    before, after = (curve[when]["serve/score"] for when in ("before", "after"))
    console.print()
    console.print(
        f"Score of the generator's pictures: {before:.3f} before, {after:.3f} after tuning",
        highlight=False,
    )


def _places(
    console: Console, turn: Turn, evaluation: Optional[Path], report: Path, has_champion: bool
) -> None:
    # Without a champion, what was trained can still be tried.
    model = "" if has_champion else " --model models:/flow-designer@candidate"
    pair = picture_pair(evaluation) if evaluation else None
    lines = [("report", report.as_uri())]
    if pair:
        prompt, candidate, fixed = pair
        lines += [
            (f'"{prompt}"', ""),
            ("  candidate", str(candidate)),
            ("  best fixed", str(fixed)),
        ]
    pictures = sorted(evaluation.glob("*.png")) if evaluation else []
    lines += [("pictures", str(path)) for path in pictures]
    lines += [
        ("runs", f"mlflow ui --backend-store-uri {tracking.tracking_uri()}"),
        ("logs", str(turn.dir / "logs")),
    ]
    if evaluation:
        lines.append(("try", f'flowloom design "three red circles"{model} --render --out out'))
    lines.append(("again", f"python -m pipelines run {turn.record['pipeline']} --new-turn"))
    console.print()
    for label, text in lines:
        console.print(f"{label:<13} {text}", highlight=False, markup=False, soft_wrap=True)


def picture_pair(evaluation: Path) -> Optional[tuple[str, Path, Path]]:
    """The example where the candidate's first picture beats the best fixed workflow's by most."""
    path = evaluation / "examples.json"
    if not path.is_file():
        return None
    best = None
    for example in json.loads(path.read_text())["examples"]:
        designs = example["designs"]
        if CANDIDATE not in designs or "best_fixed" not in designs:
            continue
        ours, theirs = designs[CANDIDATE]["renders"][0], designs["best_fixed"]["renders"][0]
        lead = ours["score"] - theirs["score"]
        if best is None or lead > best[0]:
            files = evaluation / ours["picture"], evaluation / theirs["picture"]
            best = (lead, (example["prompt"], *files))
    return best[1] if best else None

"""The report of a turn: one HTML file with pictures and charts inside, for a person to read.

A turn that only tunes a generator has no designer to compare, and one that only trains a designer
has no generator: the page shows what there is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowloom.evaluation.charts import Bar, interval_chart, line_chart
from flowloom.evaluation.config import CANDIDATE, ReportConfig
from flowloom.evaluation.describe import stem
from flowloom.runs import Run

NAMES = {
    "grpo": "GRPO + guidance",
    "grpo_unguided": "GRPO, no guidance",
    "sft": "SFT",
    "sft_cold": "SFT, low temperature",
    "grpo_one": "GRPO + guidance, one",
    "sft_one": "SFT, one",
    "conditioned": "SFT on scores",
    "best_fixed": "best fixed workflow",
    "retrieval": "nearest neighbour",
    "random": "random valid",
    "champion": "champion so far",
}
"""How a person calls the policies; "one" writes a single design."""
CURVES: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "train_sft": (
        (
            "SFT: nats per choice",
            {"sft/prior_loss": "on the pairs", "sft/best_loss": "on the best triplets"},
        ),
    ),
    "train_reward": (("Reward members: loss", {"train/loss": "member"}),),
    "train_grpo": (
        ("GRPO: predicted reward", {"grpo/reward": "reward"}),
        ("GRPO: entropy per choice", {"grpo/entropy": "entropy"}),
        ("GRPO: KL to the SFT model", {"grpo/kl": "KL"}),
    ),
}
"""Charts of the training stages: title, and what each metric's curve is called."""


def report(
    config: ReportConfig,
    run: Run,
    *,
    evaluation: Path | None = None,
    generator: Path | None = None,
    decision: Path | None = None,
    training: Sequence[Path] = (),
) -> dict[str, float]:
    """Write `report.html`.

    Args:
        config: What to show.
        run: Its run folder.
        evaluation: What `evaluate` wrote.
        generator: What `tune_generator` wrote.
        decision: `decision.json` of the gate, or the folder that holds it.
        training: What training stages wrote, earlier rounds first; metrics of their runs are drawn
            where they lie beside.

    Raises:
        ValueError: If there is neither an evaluation nor a generator.
    """
    if evaluation is None and generator is None:
        raise ValueError("report: got neither evaluation nor generator, expected at least one")
    page = render(
        config,
        evaluated=json.loads((evaluation / "evaluation.json").read_text()) if evaluation else None,
        examples=_examples(evaluation, config) if evaluation else [],
        tuned=_generator(generator) if generator else None,
        decision=_decision(decision),
        curves=_training(training),
    )
    (run.out / "report.html").write_text(page)
    run.log(f"report of {len(page) / 1e6:.1f} MB")
    return {"report/bytes": float(len(page))}


def render(
    config: ReportConfig,
    *,
    evaluated: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    tuned: Mapping[str, Any] | None = None,
    decision: Mapping[str, Any] | None = None,
    curves: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text. Nothing in it refers to a file or an address elsewhere.

    Args:
        config: What to show.
        evaluated: `evaluation.json`, or None where no designer was compared.
        examples: Prompts with designs and pictures, the pictures as data addresses.
        tuned: Before and after of the generator, or None where none was tuned.
        decision: `decision.json`, or None where the gate has not spoken.
        curves: Titles and pictures of training curves.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(signed=signed, fixed=fixed, percent=percent, stem=stem)
    compared = _compared(evaluated) if evaluated else {}
    return environment.get_template("report.html.j2").render(
        config=config,
        evaluated=evaluated,
        candidate=CANDIDATE,
        names=NAMES,
        examples=examples,
        tuned=tuned,
        decision=decision,
        curves=curves,
        **compared,
    )


def _compared(evaluated: Mapping[str, Any]) -> dict[str, Any]:
    """Order of the policies, kinds of prompts, and charts."""
    policies = evaluated["policies"]
    order = sorted(policies, key=lambda name: -policies[name]["mean"])
    return {
        "order": order,
        "kinds": sorted({kind for policy in policies.values() for kind in policy["by_kind"]}),
        "policy_chart": _policy_chart(policies, order),
        "paired_chart": _paired_chart(evaluated["paired"]),
        "kind_chart": _kind_chart(evaluated["paired_by_kind"][f"vs_{evaluated['opponent']}"]),
    }


def signed(value: float, digits: int = 3) -> str:
    """A difference: `+0.083`."""
    return f"{value:+.{digits}f}"


def fixed(value: float, digits: int = 3) -> str:
    """A score: `0.412`."""
    return f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share: `42 %`."""
    return f"{100 * value:.0f} %"


def picture(path: Path) -> str:
    """A PNG file as a data address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _policy_chart(policies: Mapping[str, Any], order: Sequence[str]) -> str:
    rows = []
    for name in order:
        mean, se = policies[name]["mean"], policies[name]["se"]
        low, high = mean - 1.96 * se, mean + 1.96 * se
        rows.append(Bar(NAMES.get(name, name), mean, low, high, name == CANDIDATE))
    return interval_chart(rows, unit="mean score of held-out prompts, 95 % interval of each mean")


def _paired_chart(paired: Mapping[str, Any]) -> str:
    rows = []
    for key, interval in sorted(paired.items(), key=lambda item: item[1]["mean"]):
        name = NAMES.get(key.removeprefix("vs_"), key.removeprefix("vs_"))
        bar = Bar(name, interval["mean"], interval["low"], interval["high"], True)
        rows.append(bar)
    return interval_chart(rows, zero=True, unit="paired difference, same prompts and noise")


def _kind_chart(by_kind: Mapping[str, Any]) -> str:
    rows = [
        Bar(f"{kind} ({row['n']} prompts)", row["mean"], row["low"], row["high"], True)
        for kind, row in by_kind.items()
    ]
    return interval_chart(rows, zero=True, unit="paired difference, same prompts and noise")


def _examples(evaluation: Path, config: ReportConfig) -> list[dict[str, Any]]:
    """Prompts with designs; pictures become data addresses."""
    path = evaluation / "examples.json"
    if not path.is_file():
        return []
    examples = json.loads(path.read_text())["examples"][: config.num_examples]
    for example in examples:
        for design in example["designs"].values():
            design["renders"] = [
                {**render, "picture": picture(evaluation / render["picture"])}
                for render in design["renders"][: config.num_render_seeds]
            ]
    return examples


def _generator(folder: Path) -> dict[str, Any] | None:
    """Before and after of the tuned generator."""
    if not (folder / "curve.json").is_file():
        return None
    curve = json.loads((folder / "curve.json").read_text())
    points = [(row["images"], row["train/reward"]) for row in curve["epochs"]]
    file = json.loads((folder / "files.json").read_text())[0]
    kinds = sorted(
        key.removeprefix("serve/")
        for key in curve["before"]
        # Other measures have names of three parts.
        if key.startswith("serve/")
        and key.count("/") == 1
        and key not in ("serve/score", "serve/out_of_range", "serve/spread")
    )
    return {
        "file": file["name"],
        "before": curve["before"],
        "after": curve["after"],
        "kinds": kinds,
        "images": curve["epochs"][-1]["images"] if curve["epochs"] else 0,
        "chart": line_chart({"mean score of the pictures": points}, "pictures rendered", width=420),
        "grid": picture(folder / "grid.png"),
    }


def _decision(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return json.loads((path / "decision.json" if path.is_dir() else path).read_text())


def _training(folders: Sequence[Path]) -> list[tuple[str, str]]:
    """Curves of training stages, from the metrics beside the folders they wrote, where they are."""
    runs: dict[str, list[dict[int, dict[str, float]]]] = {}
    for folder in folders:
        run_dir = folder.parent
        if (run_dir / "metrics.jsonl").is_file():
            stage = json.loads((run_dir / "config.json").read_text())["stage"]
            runs.setdefault(stage, []).append(_read_metrics(run_dir / "metrics.jsonl"))
    charts = []
    for stage, of_stage in CURVES.items():
        for title, metrics in of_stage:
            series = {}
            for number, rows in enumerate(runs.get(stage, ())):
                for metric, label in metrics.items():
                    points = [(step, rows[step][metric]) for step in rows if metric in rows[step]]
                    name = label if len(runs[stage]) == 1 else _numbered(label, stage, number)
                    if len(points) > 1:
                        series[name] = points
            if series:
                charts.append((title, line_chart(series, "step")))
    return charts


def _numbered(label: str, stage: str, number: int) -> str:
    """Members of an ensemble have numbers; rounds follow one another."""
    return f"{label} {number}" if stage == "train_reward" else f"{label}, round {number + 1}"


def _read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step. A run that was killed logged some steps twice, equal both times."""
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(int(row.pop("step")), {}).update(row)
    return dict(sorted(rows.items()))

"""The comparison itself: rendered rows to means, paired intervals, tables and examples.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowloom.dataset.tables import write_table
from flowloom.evaluation.choices import choices
from flowloom.evaluation.config import CANDIDATE, CHAMPION, EvaluateConfig
from flowloom.evaluation.describe import describe
from flowloom.evaluation.diversity import Known, distinct
from flowloom.evaluation.frame import Choice, Frame
from flowloom.evaluation.statistics import coverage, paired_interval, spearman, standard_error
from flowloom.runs import Run, write_json
from flowloom.workflow import Catalogue

Rows = Sequence[Sequence[Mapping[str, Any]]]
"""Rubric rows of one policy, by prompt and seed, each with the `id` of its picture."""
SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("faithfulness", pa.float64()),
        ("crispness", pa.float64()),
        ("flops", pa.int64()),
        ("fingerprint", pa.string()),
        ("predicted", pa.float64()),
    ]
)


def compare(
    config: EvaluateConfig,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    rows: Mapping[str, Rows],
    opponent: str,
    known: Known,
) -> dict[str, Any]:
    """What `evaluation.json` says of the rendered policies.

    Args:
        config: Of the stage.
        frame: Prompts and seeds.
        designs: Each policy's choice per prompt.
        rows: Its rendered rows.
        opponent: Whom the gate compares the candidate with.
        known: Workflows of training.
    """
    scores = {policy: _column(rows[policy], "score") for policy in designs}
    kinds_P = np.array(frame.kinds)

    def against(policy: str, rows_P: np.ndarray) -> dict[str, Any]:
        interval = paired_interval(
            scores[CANDIDATE][rows_P],
            scores[policy][rows_P],
            level=config.level,
            num_resamples=config.num_resamples,
            seed=config.seed,
        )
        return dataclasses.asdict(interval)

    everywhere_P = np.ones(len(kinds_P), bool)
    others = [policy for policy in designs if policy != CANDIDATE]
    kinds = sorted(set(frame.kinds))
    return {
        "candidate": CANDIDATE,
        "opponent": opponent,
        "level": config.level,
        "guidance": config.guidance,
        "num_designs": config.num_designs,
        "num_prompts": len(frame.prompts),
        "num_seeds": config.num_seeds,
        "rubric": config.rubric,
        "paired": {f"vs_{policy}": against(policy, everywhere_P) for policy in others},
        "paired_by_kind": {
            f"vs_{policy}": {kind: against(policy, kinds_P == kind) for kind in kinds}
            for policy in others
        },
        "policies": {
            policy: _summary(frame, scores[policy], rows[policy], designs[policy], known)
            for policy in designs
        },
        "predicted_vs_true": _honesty(designs, scores),
        "choices": choices(frame.prompts, [choice.workflow for choice in designs[CANDIDATE]]),
    }


def _column(rows_PS: Rows, name: str) -> np.ndarray:
    return np.array([[row[name] for row in rows] for rows in rows_PS], float)


def _summary(
    frame: Frame,
    scores_PS: np.ndarray,
    rows_PS: Rows,
    choices_P: Sequence[Choice],
    known: Known,
) -> dict[str, Any]:
    kinds_P = np.array(frame.kinds)
    flops_mean = float(_column(rows_PS, "flops").mean())
    workflows = [choice.workflow for choice in choices_P]
    different = distinct(workflows)
    return {
        "mean": float(scores_PS.mean()),
        "se": standard_error(scores_PS),
        "by_kind": {
            str(kind): float(scores_PS[kinds_P == kind].mean()) for kind in sorted(set(frame.kinds))
        },
        "faithfulness": float(_column(rows_PS, "faithfulness").mean()),
        "crispness": float(_column(rows_PS, "crispness").mean()),
        "flops_mean": flops_mean,
        "score_per_gflop": float(scores_PS.mean()) / (flops_mean / 1e9) if flops_mean else 0.0,
        **predictions(choices_P, scores_PS),
        "num_workflows": different["raw"],
        "num_collapsed": different["collapsed"],
        "similarity": float(known.nearest(workflows).mean()),
        "num_tokens": float(np.mean([choice.num_tokens for choice in choices_P])),
    }


def predictions(choices_P: Sequence[Choice], scores_PS: np.ndarray) -> dict[str, float]:
    """Predicted scores against rendered ones.

    Returns:
        `predicted`, the mean; `predicted_error`, its mean excess over the rendered mean;
        `predicted_abs_error`, the mean distance of a prompt's prediction to the mean of its
        renders (few renders add their own noise to it); `coverage`, the share of single renders
        within their interval.
    """
    predicted_P = np.array([choice.predicted for choice in choices_P])
    errors_P = predicted_P - scores_PS.mean(axis=1)
    low_P, high_P = np.array([choice.interval for choice in choices_P]).T
    return {
        "predicted": float(predicted_P.mean()),
        "predicted_error": float(errors_P.mean()),
        "predicted_abs_error": float(np.abs(errors_P).mean()),
        "coverage": coverage(scores_PS, low_P, high_P),
    }


def _honesty(
    designs: Mapping[str, Sequence[Choice]], scores: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Predicted against rendered means: rank correlation over all, gap of the candidate's."""
    own = [policy for policy in designs if policy != CHAMPION]
    predicted = {policy: np.array([c.predicted for c in designs[policy]]) for policy in own}
    true = {policy: scores[policy].mean(axis=1) for policy in own}
    return {
        "spearman": spearman(
            np.concatenate([predicted[p] for p in own]), np.concatenate([true[p] for p in own])
        ),
        "gap": float((predicted[CANDIDATE] - true[CANDIDATE]).mean()),
    }


def describe_catalogue(catalogue: Catalogue) -> dict[str, Any]:
    """Hash and files of a catalogue, for a reader."""
    keys = ("folder", "name", "sha256", "role", "card")
    files = [{key: getattr(file, key) for key in keys} for file in catalogue.files]
    return {"hash": catalogue.hash, "files": files}


def write_rows(
    path: Path,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    rows: Mapping[str, Rows],
) -> None:
    """One row per render: policy, prompt, kind, seed, the rubric's row, design, prediction."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for policy, choices_P in designs.items():
        for p, choice in enumerate(choices_P):
            for s, row in enumerate(rows[policy][p]):
                values = {
                    **row,
                    "policy": policy,
                    "prompt": frame.prompts[p],
                    "kind": frame.kinds[p],
                    "seed": int(frame.seeds_PS[p, s]),
                    "fingerprint": choice.fingerprint,
                    "predicted": choice.predicted,
                }
                for name, column in columns.items():
                    column.append(values[name])
    write_table(path, columns, SCHEMA)


def write_examples(
    run: Run,
    frame: Frame,
    designs: Mapping[str, Sequence[Choice]],
    rows: Mapping[str, Rows],
    shown: Sequence[str],
    number: int,
) -> list[dict[str, Any]]:
    """The first prompts with the designs and pictures of the policies shown."""
    examples = []
    (run.out / "pictures").mkdir()
    for p in range(min(number, len(frame.prompts))):
        by_policy = {}
        for policy in shown:
            choice = designs[policy][p]
            renders = []
            for s, row in enumerate(rows[policy][p]):
                name = f"pictures/{p:02d}-{policy}-{s}.png"
                shutil.copyfile(run.work / "pictures" / f"{row['id']}.png", run.out / name)
                seed = int(frame.seeds_PS[p, s])
                renders.append({"seed": seed, "score": row["score"], "picture": name})
            by_policy[policy] = {
                **dataclasses.asdict(describe(choice.workflow)),
                "workflow": choice.workflow.to_api(),
                "predicted": choice.predicted,
                "score": float(np.mean([render["score"] for render in renders])),
                "renders": renders,
            }
        examples.append({"prompt": frame.prompts[p], "kind": frame.kinds[p], "designs": by_policy})
    write_json(run.out / "examples.json", {"examples": examples})
    return examples


def final_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `evaluation.json` that a tracker should show."""
    metrics = {f"score/{name}": row["mean"] for name, row in evaluation["policies"].items()}
    for name, interval in evaluation["paired"].items():
        metrics[f"paired/{name}"] = interval["mean"]
        metrics[f"paired/{name}_low"] = interval["low"]
    for name in ("n", "valid", "decodable", "unique_frac"):
        metrics[f"designs/{name}"] = float(evaluation["designs"][name])
    for name, value in evaluation["predicted_vs_true"].items():
        metrics[f"predicted/{name}"] = value
    metrics["predicted/coverage"] = evaluation["policies"][CANDIDATE]["coverage"]
    for name, row in evaluation["diversity"].items():
        metrics[f"diversity/{name}"] = float(row["collapsed"])
    return metrics

"""Which workflows look best so far, by concept and over the panel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from flowloom.dataset.cells import Rendered, Template
from flowloom.dataset.prompts import Concept, concept_of
from flowloom.dataset.splits import TRAIN
from flowloom.workflow import Workflow

SHRINK_RENDERS = 4.0
"""Renders that a prior mean counts for: variance of noise over that of workflows, (.3 / .15)^2."""
SHRINK_FILES = 4.0
"""The same for the mean over workflows with the same model files."""
NEARNESS = 0.3
"""Weight of a render for a concept that differs in one part."""


def rank_by_concept(history: Iterable[Rendered]) -> dict[Concept, list[Template]]:
    """Workflows for each concept among the train cells, best first, by shrunk mean score.

    With w the nearness of a render's concept to the one ranked for (1 for the same, `NEARNESS` for
    every part that differs) and s its score, a workflow's value is

        (sum w s + SHRINK_RENDERS m) / (sum w + SHRINK_RENDERS),

    where m is the same mean over all workflows with the same model files, drawn toward the mean of
    everything by SHRINK_FILES. So what was rendered for one concept speaks, weakly, for others.
    """
    # Per concept and workflow: number and sum of scores.
    counts: dict[Concept, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(_nothing))
    flow_of: dict[str, Template] = {}
    for rendered in history:
        cell = rendered.cell
        if cell.split == TRAIN:
            flow_of.setdefault(cell.fingerprint, Template(cell.workflow, cell.fingerprint))
            seen = np.array([len(rendered.scores), sum(rendered.scores)])
            counts[concept_of(cell.spec)][cell.fingerprint] += seen
    files = {fingerprint: files_of(flow.workflow) for fingerprint, flow in flow_of.items()}
    return {concept: _rank(concept, counts, flow_of, files) for concept in counts}


def nearness(one: Concept, other: Concept) -> float:
    """`NEARNESS` to the power of the number of parts in which two concepts differ."""
    return NEARNESS ** sum(a != b for a, b in zip(one, other, strict=True))


def _rank(
    concept: Concept,
    counts: Mapping[Concept, Mapping[str, np.ndarray]],
    flow_of: Mapping[str, Template],
    files: Mapping[str, tuple[str, ...]],
) -> list[Template]:
    total: dict[str, np.ndarray] = defaultdict(_nothing)
    by_files: dict[tuple[str, ...], np.ndarray] = defaultdict(_nothing)
    for other, seen in counts.items():
        weight = nearness(concept, other)
        for fingerprint, count_sum in seen.items():
            total[fingerprint] += weight * count_sum
            by_files[files[fingerprint]] += weight * count_sum
    everything = sum(by_files.values(), _nothing())
    mean = everything[1] / everything[0]
    prior = {name: _shrunk(seen, mean, SHRINK_FILES) for name, seen in by_files.items()}
    value = {f: _shrunk(seen, prior[files[f]], SHRINK_RENDERS) for f, seen in total.items()}
    return [flow_of[f] for f in sorted(value, key=lambda f: (-value[f], f))]


def _nothing() -> np.ndarray:
    return np.zeros(2)


def _shrunk(count_sum: np.ndarray, toward: float, weight: float) -> float:
    return float((count_sum[1] + weight * toward) / (count_sum[0] + weight))


def files_of(workflow: Workflow) -> tuple[str, ...]:
    """Model files a workflow loads, sorted."""
    names = ("ckpt_name", "lora_name")
    values = (node.inputs.get(name) for node in workflow.nodes.values() for name in names)
    return tuple(sorted(str(value) for value in values if value is not None))


def panel_means(history: Iterable[Rendered]) -> list[dict]:
    """Panel workflows with their mean over panel renders, best first."""
    scores: dict[str, list[float]] = defaultdict(list)
    flow_of: dict[str, Workflow] = {}
    for rendered in history:
        if rendered.cell.origin == "panel":
            fingerprint = rendered.cell.fingerprint
            flow_of.setdefault(fingerprint, rendered.cell.workflow)
            scores[fingerprint] += rendered.scores
    rows = [
        {
            "workflow": flow_of[fingerprint],
            "fingerprint": fingerprint,
            "mean": float(np.mean(values)),
            "num_renders": len(values),
        }
        for fingerprint, values in scores.items()
    ]
    return sorted(rows, key=lambda row: (-row["mean"], row["fingerprint"]))

"""Triplets of prompt, workflow and score: cells planned in rounds, rendered in shards, scored.

A round's renders are sorted so that equal samplers lie together and cut into shards of fixed size.
A finished shard is a file in the run's work folder; the same command renders only what is missing.
Every decision is made from the stored scores, so an interrupted run ends with the same bytes.

    flowloom run build_triplets --recipe demo
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowloom.dataset.config import BuildTripletsConfig
from flowloom.dataset.pairs import load_pairs
from flowloom.dataset.plan import Cell, Plan, Rendered
from flowloom.dataset.prompts import draw_prompts, draw_unrendered
from flowloom.dataset.tables import read_table, write_table
from flowloom.render.engine import RenderJob, RenderResult, batch_key
from flowloom.render.pool import RenderPool
from flowloom.runs import Run, write_json
from flowloom.shapes.prompts import PromptSpec
from flowloom.workflow import Catalogue

SHARD = pa.schema(
    [
        ("score", pa.float32()),
        ("faithfulness", pa.float32()),
        ("crispness", pa.float32()),
        ("flops", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("cell", pa.int32()),
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("workflow", pa.string()),
        ("fingerprint", pa.string()),
        ("seed", pa.int64()),
        *SHARD,
        ("split", pa.string()),
        ("origin", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class ScoredJob(RenderJob):
    """A render job that knows what the picture should show."""

    prompt: str


def score_chunk(
    rubric: str, jobs: Sequence[ScoredJob], results: list[RenderResult]
) -> list[dict[str, float]]:
    """Score a rendered chunk where it was rendered."""
    from flowloom.score.rubric import get_rubric

    prompts = [job.prompt for job in jobs]
    images = [result.image for result in results]
    return get_rubric(rubric).score(prompts, images, [result.flops for result in results])


def build_triplets(
    config: BuildTripletsConfig, run: Run, *, catalogue: Path, pairs: Path
) -> dict[str, float]:
    """Render and score workflows on train and calibration prompts.

    Args:
        config: What to render.
        run: Run folder; `out` gets `triplets.parquet`, `prompts.json` (held-out prompts),
            `unrendered_prompts.json` (train prompts for policy optimisation), `best_fixed.json` (a
            template) and `card.json`.
        catalogue: Folder that `publish_generator` wrote.
        pairs: Folder of `build_pairs`; its first pairs of each prompt are the random cells.

    Returns:
        Counts, mean scores by origin and the best fixed workflow's mean.

    Raises:
        ValueError: A model file is missing or a workflow cannot be rendered.
        FloatingPointError: A picture or a score is not finite; names the jobs.
    """
    facts = Catalogue.load(catalogue / "catalogue.json.gz")
    plan = Plan(config, facts, load_pairs(pairs))
    then = functools.partial(score_chunk, config.rubric)
    history: list[Rendered] = []
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    cell_ids: dict[tuple[str, str], int] = {}

    with RenderPool(catalogue, config.num_processes, then) as pool:
        for number in range(plan.num_rounds):
            cells = plan.cells(number, history)
            scores = _render_round(config, run, pool, number, cells)
            done = _join(cells, scores, cell_ids, rows)
            history += done
            means = {
                f"triplets/{origin}_mean": float(np.mean(values))
                for origin, values in _by_origin(done).items()
            }
            run.metric(number, {"triplets/renders": float(len(rows["score"])), **means})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            run.log(f"round {number}: {len(cells)} cells, {shown}")

    best, panel = plan.best_fixed(history)
    write_table(run.out / "triplets.parquet", rows, SCHEMA)
    write_json(run.out / "best_fixed.json", best.to_api())
    lists = config.prompts
    held_out = draw_prompts("test", lists.num_test, lists.kinds, lists.seed)
    write_json(run.out / "prompts.json", _as_rows(held_out))
    unrendered = draw_unrendered(lists.num_unrendered, lists.kinds, lists.seed)
    write_json(run.out / "unrendered_prompts.json", _as_rows(unrendered))
    write_json(run.out / "card.json", _card(rows, panel, facts, len(held_out)))
    run.log(f"best fixed: {panel[0]['mean']:.3f} over {panel[0]['num_renders']} renders")
    train = [split == "train" for split in rows["split"]]
    metrics = {
        "triplets/renders": float(len(train)),
        "triplets/cells": float(len(cell_ids)),
        "triplets/best_fixed_mean": panel[0]["mean"],
        "triplets/test_prompts": float(len(held_out)),
    }
    for origin, values in _by_origin(history).items():
        metrics[f"triplets/{origin}_mean"] = float(np.mean(values))
    return metrics


def load(path: str | Path, split: str | None = None) -> dict[str, list[Any]]:
    """Columns of the triplets, one row per render.

    Args:
        path: `triplets.parquet` or the folder that holds it.
        split: `train` or `calibration`; None for both.

    Returns:
        cell, prompt, kind, workflow (API JSON of the template), fingerprint, seed, score,
        faithfulness, crispness, flops, split, origin.

    Raises:
        ValueError: There is no such file, or the split is empty.
    """
    path = Path(path)
    file = path / "triplets.parquet" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"triplets: got {str(path)!r}, expected the folder of build_triplets")
    columns = read_table(file)
    if split is None:
        return columns
    kept = [row for row, value in enumerate(columns["split"]) if value == split]
    if not kept:
        known = ", ".join(sorted(set(columns["split"])))
        raise ValueError(f"split: got {split!r}, expected one of {known}")
    return {name: [values[row] for row in kept] for name, values in columns.items()}


def load_prompts(path: str | Path) -> list[dict[str, str]]:
    """Held-out prompts, `[{"prompt", "kind"}]`, kinds in turn: any prefix is balanced."""
    return json.loads((Path(path) / "prompts.json").read_text())


def load_unrendered_prompts(path: str | Path) -> list[dict[str, str]]:
    """Train prompts that no triplet need have, `[{"prompt", "kind"}]`, kinds in turn."""
    return json.loads((Path(path) / "unrendered_prompts.json").read_text())


def _as_rows(specs: Sequence[PromptSpec]) -> list[dict[str, str]]:
    return [{"prompt": spec.text, "kind": spec.kind} for spec in specs]


def _render_round(
    config: BuildTripletsConfig, run: Run, pool: RenderPool, number: int, cells: Sequence[Cell]
) -> list[list[dict[str, float]]]:
    """Scores of every cell by seed, rendering the shards that are not there yet."""
    places = [(c, k) for c, cell in enumerate(cells) for k in range(len(cell.seeds))]
    keys = [batch_key(cell.workflow) for cell in cells]
    places.sort(key=lambda place: (keys[place[0]], place))
    size = config.shard_size
    shards = [places[first : first + size] for first in range(0, len(places), size)]
    files = [run.work / f"round-{number}-shard-{k:04d}.parquet" for k in range(len(shards))]

    missing = [k for k, file in enumerate(files) if not file.is_file()]
    chunks = [[_job(cells[c], k) for c, k in shards[shard]] for shard in missing]
    for shard, scored in zip(missing, pool.map(chunks), strict=True):
        columns = {name: [row[name] for row in scored] for name in SHARD.names}
        write_table(files[shard], columns, SHARD)

    results: list[list[dict[str, float]]] = [[{}] * len(cell.seeds) for cell in cells]
    for shard, file in zip(shards, files, strict=True):
        columns = read_table(file)
        for row, (c, k) in enumerate(shard):
            results[c][k] = {name: columns[name][row] for name in SHARD.names}
    return results


def _job(cell: Cell, number: int) -> ScoredJob:
    workflow = cell.workflow.fill(cell.spec.text, seed=cell.seeds[number])
    name = f"{cell.origin} {cell.fingerprint[:8]} on {cell.spec.text!r}, seed {cell.seeds[number]}"
    return ScoredJob(workflow=workflow, id=name, prompt=cell.spec.text)


def _join(
    cells: Sequence[Cell],
    scores: Sequence[Sequence[dict[str, float]]],
    cell_ids: dict[tuple[str, str], int],
    rows: dict[str, list[Any]],
) -> list[Rendered]:
    """Append a round to the table. A workflow on a prompt is one cell, whatever the round."""
    done = []
    for cell, results in zip(cells, scores, strict=True):
        number = cell_ids.setdefault((cell.spec.text, cell.fingerprint), len(cell_ids))
        text = json.dumps(cell.workflow.to_api(), separators=(",", ":"))
        for seed, result in zip(cell.seeds, results, strict=True):
            values = {
                "cell": number,
                "prompt": cell.spec.text,
                "kind": cell.spec.kind,
                "workflow": text,
                "fingerprint": cell.fingerprint,
                "seed": seed,
                "split": cell.split,
                "origin": cell.origin,
                **result,
            }
            for name, column in rows.items():
                column.append(values[name])
        done.append(Rendered(cell, tuple(result["score"] for result in results)))
    return done


def _by_origin(history: Sequence[Rendered]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for rendered in history:
        cell = rendered.cell
        origin = cell.origin if cell.split == "train" else cell.split
        values.setdefault(origin, []).extend(rendered.scores)
    return dict(sorted(values.items()))


def _card(
    rows: dict[str, list[Any]], panel: Sequence[dict], facts: Catalogue, num_test: int
) -> dict[str, Any]:
    """What is in the data, for people and for lineage."""
    scores = np.array(rows["score"])
    bins = np.linspace(0, 1, 11)
    counts = np.histogram(scores, bins)[0]
    groups = Counter(zip(rows["split"], rows["origin"], rows["kind"], strict=True))
    sums: dict[tuple, float] = defaultdict(float)
    for key, score in zip(
        zip(rows["split"], rows["origin"], rows["kind"], strict=True), scores, strict=True
    ):
        sums[key] += float(score)
    return {
        "catalogue": facts.hash,
        "renders": len(scores),
        "cells": len(set(rows["cell"])),
        "prompts": {
            split: len(
                {p for p, s in zip(rows["prompt"], rows["split"], strict=True) if s == split}
            )
            for split in ("train", "calibration")
        }
        | {"test": num_test},
        "workflows": len(set(rows["fingerprint"])),
        "groups": [
            {
                "split": split,
                "origin": origin,
                "kind": kind,
                "renders": count,
                "mean": round(sums[split, origin, kind] / count, 4),
            }
            for (split, origin, kind), count in sorted(groups.items())
        ],
        "histogram": {"from": bins[:-1].round(1).tolist(), "renders": counts.tolist()},
        "flops": {"mean": float(np.mean(rows["flops"])), "max": int(max(rows["flops"]))},
        "best_fixed": [
            {
                "fingerprint": row["fingerprint"],
                "mean": round(row["mean"], 4),
                "num_renders": row["num_renders"],
            }
            for row in panel[:8]
        ],
    }

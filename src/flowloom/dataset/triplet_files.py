"""Reading triplets: rows and prompt lists, without importing what renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowloom.dataset.cells import CALIBRATION
from flowloom.dataset.tables import read_table


def load(path: str | Path, split: str | None = None) -> dict[str, list[Any]]:
    """Columns of the triplets, one row per render.

    Args:
        path: The folder of `build_triplets`, or one of its Parquet files.
        split: `train`, `held_out_workflow` or `calibration`; None for all.

    Returns:
        cell, prompt, kind, workflow (API JSON of the template), fingerprint, seed, score, each term
        of the rubric by name, flops, split, origin.

    Raises:
        ValueError: There is no such file, or the split is empty.
    """
    path = Path(path)
    files = sorted(path.glob("triplets*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"triplets: got {str(path)!r}, expected the folder of build_triplets")
    columns: dict[str, list[Any]] = {}
    for file in files:
        for name, values in read_table(file).items():
            columns.setdefault(name, []).extend(values)
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


def load_calibration_prompts(path: str | Path) -> list[dict[str, str]]:
    """The prompts that the ensemble is calibrated on, `[{"prompt", "kind"}]`, each once."""
    columns = load(path, CALIBRATION)
    kinds = dict(zip(columns["prompt"], columns["kind"], strict=True))
    return [{"prompt": prompt, "kind": kind} for prompt, kind in kinds.items()]

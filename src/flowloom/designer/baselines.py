"""The policies that are no network: one workflow for all prompts, and nearest neighbour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowloom.dataset.triplets import load
from flowloom.designer.selection import best_cells, shrunk_means


def stored_policies(triplets: Path, num_prompts: int | None = None) -> dict[str, Any]:
    """What `Designer` and a model's `policies.json` hold of them.

    Args:
        triplets: Folder of `build_triplets`.
        num_prompts: Train prompts that retrieval keeps; None keeps all.

    Returns:
        `best_fixed`, a template; `retrieval` with `prompts` and, for each, the template in
        `workflows` that is best by shrunk mean: the best raw mean would mostly be the luckiest.
    """
    rows = load(triplets, "train")
    shrunk = shrunk_means(*(rows[name] for name in ("prompt", "kind", "fingerprint", "score")))
    workflow_of = dict(zip(rows["fingerprint"], rows["workflow"], strict=True))
    best = sorted(best_cells(shrunk, 1))[:num_prompts]
    return {
        "best_fixed": json.loads((triplets / "best_fixed.json").read_text()),
        "retrieval": {
            "prompts": [prompt for prompt, _ in best],
            "workflows": [json.loads(workflow_of[fingerprint]) for _, fingerprint in best],
        },
    }

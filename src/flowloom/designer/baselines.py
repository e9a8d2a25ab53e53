"""The policies that are no network: one workflow for all prompts, and nearest neighbour."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowloom.dataset.tokenizer import split_words
from flowloom.dataset.triplet_files import load
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


def prompt_similarity(known: Sequence[str]) -> Callable[[str], list[float]]:
    """Similarity of a prompt to each known one: cosine of their words weighted by rarity.

    A word in k of n prompts weighs log((n + 1) / (k + 1)), so openings and articles hardly count.
    """
    bags = [set(split_words(text)) for text in known]
    counts = Counter(word for bag in bags for word in bag)
    weight = {w: math.log((len(bags) + 1) / (k + 1)) ** 2 for w, k in counts.items()}
    norms = [math.sqrt(sum(weight[word] for word in bag)) or 1.0 for bag in bags]

    def similarity(prompt: str) -> list[float]:
        words = set(split_words(prompt))
        return [
            sum(weight[word] for word in bag & words) / norm
            for bag, norm in zip(bags, norms, strict=True)
        ]

    return similarity

"""Pairs of prompts and valid workflows: the prior that SFT learns before it sees any score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from flowloom.dataset.config import BuildPairsConfig
from flowloom.dataset.prompts import draw_prompts
from flowloom.dataset.tables import write_table
from flowloom.dataset.workflows import base_workflow, draw_workflows, edited, make_grammar
from flowloom.runs import Run
from flowloom.workflow import Catalogue

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("workflow", pa.string()),
        ("fingerprint", pa.string()),
        ("split", pa.string()),
    ]
)
MAX_DRAWS = 8


def build_pairs(config: BuildPairsConfig, run: Run, *, catalogue: Path) -> dict[str, float]:
    """Draw workflows and pair each with a train prompt.

    Args:
        config: How many, and what they look like.
        run: Run folder; `out` gets `pairs.parquet`.
        catalogue: Folder that `publish_generator` wrote.

    Returns:
        Counts and mean length.

    Raises:
        ValueError: The grammar has too few different workflows for the prompts.
    """
    facts = Catalogue.load(catalogue / "catalogue.json.gz")
    lists = config.prompts
    specs = draw_prompts("train", lists.num_train, lists.kinds, lists.seed)
    grammar = make_grammar(facts, config.prior.budget)
    rng = np.random.default_rng((config.seed, 1))

    num_edited = round(config.mutated_frac * config.num_pairs)
    seeds = [
        base_workflow(facts, file.name, steps, cfg, lora=lora)
        for file in facts.files_in("checkpoints")
        for steps, cfg in ((4, 2.0), (8, 2.5))
        for lora in (None, *(f.name for f in facts.files_in("loras") if f.family == file.family))
    ]
    chosen: dict[tuple[str, str], tuple[str, str, str]] = {}
    for draw in range(MAX_DRAWS):
        missing = config.num_pairs - len(chosen)
        if missing <= 0:
            break
        share = round(num_edited * missing / config.num_pairs)
        picks = [seeds[i] for i in rng.integers(len(seeds), size=share)]
        flows = edited(picks, grammar, rng, twice_frac=0.5)
        flows += draw_workflows(grammar, config.prior, missing - share, config.seed + 1000 * draw)
        flows = [flows[i] for i in rng.permutation(len(flows))]
        for flow in flows:
            spec = specs[len(chosen) % len(specs)]
            fingerprint = flow.template_fingerprint()
            text = json.dumps(flow.to_api(), separators=(",", ":"))
            chosen.setdefault((spec.text, fingerprint), (spec.kind, text, fingerprint))
    if len(chosen) < config.num_pairs:
        raise ValueError(
            f"num_pairs: got {len(chosen)} different pairs, expected {config.num_pairs}"
        )

    keys, values = list(chosen), list(chosen.values())
    write_table(
        run.out / "pairs.parquet",
        {
            "prompt": [prompt for prompt, _ in keys],
            "kind": [kind for kind, _, _ in values],
            "workflow": [text for _, text, _ in values],
            "fingerprint": [fingerprint for _, _, fingerprint in values],
            "split": ["train"] * len(keys),
        },
        SCHEMA,
    )
    different = len({fingerprint for _, fingerprint in keys})
    run.log(f"{len(keys)} pairs, {different} different workflows, {len(specs)} prompts")
    return {
        "pairs/num": float(len(keys)),
        "pairs/workflows": float(different),
        "pairs/prompts": float(len({prompt for prompt, _ in keys})),
    }

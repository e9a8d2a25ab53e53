"""Designs of a tuned policy, handed on to be rendered: where the next round of triplets looks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from flowloom.dataset.tables import write_table
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import rollout
from flowloom.reward.ensemble import Ensemble
from flowloom.workflow import Grammar, decode

FILE = "proposals.parquet"
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("workflow", pa.string()),
        ("fingerprint", pa.string()),
        ("predicted", pa.float64()),
        ("spread", pa.float64()),
    ]
)


def write_proposals(
    folder: Path,
    policy: Policy,
    grammar: Grammar,
    ensemble: Ensemble,
    prompts: Sequence[Mapping[str, str]],
    num: int,
    seed: int,
) -> int:
    """Sample `num` designs at temperature 1, as many for each prompt, and write the different ones.

    With fewer designs than prompts, the first prompts get one each.

    Args:
        folder: Gets `proposals.parquet`: prompt, kind, workflow (API JSON of the canonical
            template), fingerprint, predicted score in rubric units, and the members' standardised
            spread; a prompt's designs are neighbours, prompts in the given order.
        policy: The tuned policy.
        grammar: Which tokens are legal.
        ensemble: Predicts them.
        prompts: Rows with `prompt` and `kind`.
        num: How many to sample.
        seed: Seed of the samples.

    Returns:
        Number of rows.
    """
    per_prompt = -(-num // len(prompts))
    asked = prompts[: -(-num // per_prompt)]
    texts = [row["prompt"] for row in asked]
    tokens = rollout(policy, grammar, texts, per_prompt, seed=seed).tokens[:num]
    repeated = [row for row in asked for _ in range(per_prompt)][:num]
    mean_B, spread_B = ensemble.predict([row["prompt"] for row in repeated], tokens)
    predicted_B = ensemble.to_rubric(mean_B)
    rows: dict[tuple[str, str], tuple] = {}
    for b, (asked_for, design) in enumerate(zip(repeated, tokens, strict=True)):
        flow = decode(design, grammar).canonical(grammar.catalogue)
        text = json.dumps(flow.to_api(), separators=(",", ":"))
        prompt, fingerprint = asked_for["prompt"], flow.template_fingerprint()
        row = (prompt, asked_for["kind"], text, fingerprint, predicted_B[b], spread_B[b])
        rows.setdefault((prompt, fingerprint), row)
    columns = dict(zip(SCHEMA.names, zip(*rows.values(), strict=True), strict=True))
    write_table(folder / FILE, columns, SCHEMA)
    return len(rows)

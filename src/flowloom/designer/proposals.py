"""Designs of a tuned policy, handed on to be rendered: where the next round of triplets looks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from flowloom.dataset.cells import CALIBRATION
from flowloom.dataset.designed import PROPOSALS_FILE
from flowloom.dataset.splits import TRAIN
from flowloom.dataset.tables import write_table
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import rollout
from flowloom.reward.ensemble import Ensemble
from flowloom.workflow import Grammar, decode

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
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
    calibration: Sequence[Mapping[str, str]],
    num: int,
    seed: int,
) -> int:
    """Sample `num` designs at temperature 1, as many for each prompt, and write the different ones.

    With fewer designs than prompts, the first prompts get one each. Calibration prompts get one
    more each: intervals should hold where the policy goes.

    Args:
        folder: Gets `proposals.parquet`: prompt, kind, split, workflow (API JSON of the canonical
            template), fingerprint, predicted score in rubric units, and the members' standardised
            spread; a prompt's designs are neighbours, prompts in the given order.
        policy: The tuned policy.
        grammar: Which tokens are legal.
        ensemble: Predicts them.
        prompts: Train prompts, rows with `prompt` and `kind`.
        calibration: Calibration prompts, likewise.
        num: How many to sample for train prompts.
        seed: Seed of the samples.

    Returns:
        Number of rows.
    """
    per_prompt = -(-num // len(prompts))
    asked = [row for row in prompts for _ in range(per_prompt)][:num]
    splits = [TRAIN] * num + [CALIBRATION] * len(calibration)
    asked += calibration
    texts = [row["prompt"] for row in asked]
    # One stream of random numbers per row, wherever it stands.
    tokens = rollout(policy, grammar, texts, seed=seed).tokens
    mean_B, spread_B = ensemble.predict(texts, tokens)
    predicted_B = ensemble.to_rubric(mean_B)
    rows: dict[tuple[str, str], tuple] = {}
    for b, (known, split, design) in enumerate(zip(asked, splits, tokens, strict=True)):
        flow = decode(design, grammar).canonical(grammar.catalogue)
        text = json.dumps(flow.to_api(), separators=(",", ":"))
        prompt, fingerprint = known["prompt"], flow.template_fingerprint()
        row = (prompt, known["kind"], split, text, fingerprint, predicted_B[b], spread_B[b])
        rows.setdefault((prompt, fingerprint), row)
    columns = dict(zip(SCHEMA.names, zip(*rows.values(), strict=True), strict=True))
    write_table(folder / PROPOSALS_FILE, columns, SCHEMA)
    return len(rows)

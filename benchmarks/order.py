"""Top-down against topological order of the code: how well a policy of one size learns either.

    python -m benchmarks.order [--root DIR] [--steps 300] [--quick] [--json]

`--root` holds `pairs` and `catalogue`; by default what `benchmarks.rounds` made.

The same workflows are written top-down from the output (the code of `flowloom.workflow.codec`) and
in the order of execution, where every link is a reference to an earlier node. A fresh embedded
policy learns each from the same prompts, batches and steps. Without a grammar mask, since only the
top-down code has one; the last row is top-down with it, as it is really used.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.rounds import FIRST_SEED
from flowloom.dataset.pairs import read_pairs
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.designer.config import PolicyConfig
from flowloom.designer.guidance import masked_log_softmax
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import Sequences, replay
from flowloom.reward.features import FeatureTable
from flowloom.workflow import Catalogue, Grammar, Link, Workflow, decode, encode
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.steps import SEED

BATCH = 128


def topological(workflow: Workflow, table: FeatureTable) -> list[int] | None:
    """Tokens in the order of execution; None where a value has no token or a link is too long."""
    place: dict[str, int] = {}
    tokens: list[int] = []
    for node_id in workflow.order():
        node = workflow.nodes[node_id]
        tokens.append(table.vocabulary.class_ids[node.class_type])
        for step in table.schema.active(node.class_type, node.inputs):
            if step.how == SEED:
                continue
            value = node.inputs.get(step.name)
            if isinstance(value, Link):
                back = len(place) - 1 - place[value.node]
                tokens.append(voc.REF0 + back if back < voc.NUM_REFS else -1)
            else:
                tokens.append(table.token_of(step, node, workflow))
        place[node_id] = len(place)
    return None if min(tokens) < 0 else [*tokens, voc.EOS]


def learn(
    prompts: Sequence[str],
    rows: Sequence[list[int]],
    num_tokens: int,
    steps: int,
    legal: Sequences | None,
) -> float:
    """Held-out nats per workflow after `steps` batches; the last tenth of the rows is held out."""
    config = PolicyConfig(num_workflow_tokens=max(map(len, rows)))
    policy = Policy(config, WordTokenizer.fit(prompts), num_tokens, seed=0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    split = len(rows) * 9 // 10
    lengths = np.array([len(row) for row in rows])

    def nats(batch: np.ndarray) -> torch.Tensor:
        part = legal.select(torch.from_numpy(batch)) if legal is not None else None
        width = int(lengths[batch].max())
        tokens_BT = torch.zeros(len(batch), width, dtype=torch.long)
        for b, row in enumerate(batch):
            tokens_BT[b, : lengths[row]] = torch.tensor(rows[row])
        wanted_BT = torch.arange(width) < torch.from_numpy(lengths[batch])[:, None]
        if part is not None:
            wanted_BT = part.choice_BT
        ids = policy.encode_prompts([prompts[row] for row in batch])
        logits_NV = policy(ids, tokens_BT, wanted_BT)
        legal_NV = part.legal() if part is not None else torch.ones_like(logits_NV).bool()
        chosen_N1 = tokens_BT[wanted_BT][:, None]
        return -masked_log_softmax(logits_NV, legal_NV).gather(1, chosen_N1).sum() / len(batch)

    rng = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 11) * (1 - 0.9 * step / steps)
        pool = rng.choice(split, 8 * BATCH, replace=False)
        start = BATCH * int(rng.integers(8))
        loss = nats(pool[np.argsort(lengths[pool], kind="stable")][start : start + BATCH])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        batches = np.array_split(np.arange(split, len(rows)), max(1, (len(rows) - split) // BATCH))
        return float(np.average([nats(b).item() for b in batches], weights=[*map(len, batches)]))


def main() -> None:
    """Print nats per workflow; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=FIRST_SEED, help="folder of parts")
    parser.add_argument("--steps", type=int, default=300, help="batches of 128")
    parser.add_argument("--quick", action="store_true", help="40 steps")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    steps = 40 if options.quick else options.steps
    torch.set_num_threads(1)
    catalogue = Catalogue.load(options.root / "catalogue" / "catalogue.json.gz")
    grammar = Grammar(catalogue)
    table = FeatureTable(catalogue, grammar.vocabulary)
    columns = read_pairs(options.root / "pairs", columns=("prompt", "workflow"))
    prompts, down, forward = [], [], []
    for prompt, text in zip(columns["prompt"], columns["workflow"], strict=True):
        tokens = encode(Workflow.from_api(json.loads(text)), grammar).tokens
        other = topological(decode(tokens, grammar), table)
        if other is not None:
            prompts.append(prompt)
            down.append(tokens)
            forward.append(other)
    size = grammar.vocabulary.size
    result = {
        "workflows": len(down),
        "left_out": len(columns["prompt"]) - len(down),
        "tokens_top_down": float(np.mean([*map(len, down)])),
        "tokens_topological": float(np.mean([*map(len, forward)])),
        "nats_top_down": learn(prompts, down, size, steps, None),
        "nats_topological": learn(prompts, forward, size, steps, None),
        "nats_top_down_masked": learn(prompts, down, size, steps, replay(grammar, down)),
    }
    for name, value in result.items():
        print(f"{name:22} {value:.4g}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

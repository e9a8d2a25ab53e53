"""A small world: seven node classes, prompts of circles and squares, scores by a rule."""

import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pytest

from flowloom.dataset.tables import write_table
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.dataset.triplets import schema
from flowloom.designer.policy import Policy
from flowloom.runs import write_json
from flowloom.workflow import Catalogue, Grammar, decode, random_workflows
from tests.designer.tiny import CLASSES, PROMPTS, TINY
from tests.evaluation.parts import PROMPTS as WORLD_PROMPTS
from tests.evaluation.parts import write_parts


@pytest.fixture(scope="session")
def catalogue():
    whole = Catalogue.load("embedded")
    return dataclasses.replace(whole, nodes={name: whole.nodes[name] for name in CLASSES})


@pytest.fixture(scope="session")
def grammar(catalogue):
    return Grammar(catalogue, budget=TINY.num_workflow_tokens)


@pytest.fixture
def policy(grammar):
    """Fresh weights with a head large enough that probabilities differ."""
    policy = Policy(TINY, WordTokenizer.fit(PROMPTS), grammar.vocabulary.size, seed=1)
    policy.head.weight.data *= 20
    return policy


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, catalogue, grammar):
    """Folders as the stages before write them: catalogue, pairs, triplets."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("catalogue", "pairs", "triplets"):
        (root / name).mkdir()
    packed = gzip.compress(json.dumps(catalogue.to_json()).encode(), mtime=0)
    (root / "catalogue" / "catalogue.json.gz").write_bytes(packed)

    flows = [decode(e.tokens, grammar) for e in random_workflows(grammar, 160, 0)]
    rows = [
        (PROMPTS[i % 4], "single", json.dumps(flow.to_api()), flow.template_fingerprint(), "train")
        for i, flow in enumerate(flows)
    ]
    names = ("prompt", "kind", "workflow", "fingerprint", "split")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pairs_schema = pa.schema([(name, pa.string()) for name in names])
    write_table(root / "pairs" / "pairs.parquet", columns, pairs_schema)

    rng = np.random.default_rng(0)
    triplets_schema = schema(("faithfulness", "crispness"))
    triplets = {name: [] for name in triplets_schema.names}
    for cell, (prompt, kind, flow, fingerprint, split) in enumerate(rows[:64]):
        for seed in range(2):
            values = {
                "cell": cell, "prompt": prompt, "kind": kind, "workflow": flow,
                "fingerprint": fingerprint, "split": split, "seed": seed, "origin": "random",
                "score": float(np.clip(0.3 + ("star" in flow) * 0.4 + rng.normal() * 0.1, 0, 1)),
            }  # fmt: skip
            for name in triplets:
                triplets[name].append(values.get(name, 0))
    write_table(root / "triplets" / "triplets.parquet", triplets, triplets_schema)
    listed = [{"prompt": prompt, "kind": "single"} for prompt in PROMPTS]
    write_json(root / "triplets" / "unrendered_prompts.json", listed)
    return {name: root / name for name in ("catalogue", "pairs", "triplets")}


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders as the stages write them, with models that render and a reward that predicts."""
    parts = write_parts(tmp_path_factory.mktemp("parts"))
    listed = [{"prompt": prompt, "kind": "single"} for prompt in WORLD_PROMPTS["train"]]
    write_json(parts["triplets"] / "unrendered_prompts.json", listed)
    return parts

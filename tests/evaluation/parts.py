"""Artifacts of every stage before `evaluate`, tiny: untrained policies over two random models."""

import dataclasses
import json
import shutil

import numpy as np

from flowloom.dataset.tables import write_table
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.dataset.triplets import schema
from flowloom.designer.baselines import stored_policies
from flowloom.designer.config import PolicyConfig
from flowloom.designer.policy import Policy
from flowloom.render.model_records import save_catalogue
from flowloom.reward.calibration import calibrate_reward
from flowloom.reward.config import CalibrationConfig, NetworkConfig, RewardConfig
from flowloom.reward.member import train_reward
from flowloom.runs import Run, write_json
from flowloom.workflow import Catalogue, Grammar, decode, random_workflows
from tests.designer.tiny import CLASSES
from tests.render.tiny import flow, write_world

SCHEMA = schema(("faithfulness", "crispness"))
PROMPTS = {
    "train": ("a red circle", "two stars", "a square", "a blue star", "three circles", "a star"),
    "calibration": ("a green circle", "two squares", "a circle", "a white star"),
    "test": ("a red star", "four circles", "a triangle", "a blue circle", "two circles", "a disc"),
}
KINDS = ("colors", "counting", "single")


def write_parts(root):
    """Write catalogue, triplets, designer, adapter and reward; returns their folders by name."""
    parts = {
        name: root / name for name in ("catalogue", "triplets", "designer", "adapter", "reward")
    }
    write_world(parts["catalogue"])
    path = parts["catalogue"] / "catalogue.json.gz"
    whole = Catalogue.load(path)
    nodes = {name: whole.nodes[name] for name in CLASSES}
    catalogue = dataclasses.replace(whole, nodes=nodes)
    save_catalogue(path, catalogue)
    config = PolicyConfig(width=16, num_layers=1, num_heads=2, mlp_width=32)
    grammar = Grammar(catalogue, budget=config.num_workflow_tokens)
    _write_triplets(parts["triplets"], grammar)

    policy = Policy(config, WordTokenizer.fit(PROMPTS["train"]), grammar.vocabulary.size, seed=1)
    policy.head.weight.data *= 20
    policy.save(parts["designer"])
    write_json(parts["designer"] / "vocabulary.json", grammar.vocabulary.to_json())
    policy.head.weight.data *= 1.5
    policy.save_adapter(parts["adapter"], parts["designer"])

    members = []
    for member in range(2):
        config = RewardConfig(
            member=member,
            network=NetworkConfig(width=8),
            num_steps=3,
            prompts_per_step=2,
            rows_per_prompt=4,
        )
        inputs = {name: parts[name] for name in ("catalogue", "triplets")}
        members.append(_stage(root / f"member-{member}", train_reward, config, **inputs))
    ensemble = _stage(
        root / "ensemble", calibrate_reward, CalibrationConfig(), **inputs, members=members
    )
    shutil.copytree(ensemble, parts["reward"])
    return parts


def write_model(folder, parts, guidance=1.25):
    """Write a registered model's folder from the parts."""
    for name, part in (("model", "designer"), ("adapter", "adapter"), ("reward", "reward")):
        shutil.copytree(parts[part], folder / name)
    shutil.copyfile(parts["catalogue"] / "catalogue.json.gz", folder / "catalogue.json.gz")
    shutil.copytree(parts["catalogue"] / "models", folder / "models")
    write_json(folder / "policies.json", stored_policies(parts["triplets"]))
    write_json(folder / "config.json", {"guidance": guidance})
    return folder


def _stage(folder, function, config, **inputs):
    run = Run(function.__name__, folder)
    run.begin()
    function(config, run, **inputs)
    return run.out


def _write_triplets(folder, grammar):
    folder.mkdir()
    flows = [decode(encoded.tokens, grammar) for encoded in random_workflows(grammar, 12, 0)]
    columns = {name: [] for name in SCHEMA.names}
    rng = np.random.default_rng(0)
    for split in ("train", "calibration"):
        for p, prompt in enumerate(PROMPTS[split]):
            for cell, workflow in enumerate(flows[p : p + 4]):
                for seed in range(2):
                    values = {
                        "cell": 100 * p + cell,
                        "prompt": prompt,
                        "kind": KINDS[p % 3],
                        "workflow": json.dumps(workflow.to_api()),
                        "fingerprint": workflow.template_fingerprint(),
                        "seed": seed,
                        "score": float(rng.random()),
                        "faithfulness": 0.5,
                        "crispness": 0.5,
                        "flops": 1,
                        "split": split,
                        "origin": "random",
                    }
                    for name, column in columns.items():
                        column.append(values[name])
    write_table(folder / "triplets.parquet", columns, SCHEMA)
    write_json(folder / "best_fixed.json", flow(steps=4, cfg=2.0).to_api())
    held_out = [
        {"prompt": prompt, "kind": KINDS[p % 3]} for p, prompt in enumerate(PROMPTS["test"])
    ]
    write_json(folder / "prompts.json", held_out)
    more = [{"prompt": f"a small {prompt}", "kind": "single"} for prompt in PROMPTS["train"]]
    write_json(folder / "unrendered_prompts.json", more)

"""Facts: a snapshot of a profile keeps that profile's classes alone; the recipe `server` makes,
from such a snapshot and a file of prompts, a designer whose every workflow is valid on the whole
server; pairs follow a person's workflows where asked."""

import dataclasses
import json

import pytest

from flowloom import stages
from flowloom.cli import main
from flowloom.dataset.pair_shards import Drawer
from flowloom.dataset.pairs import read_pairs
from flowloom.designer.config import PolicyConfig
from flowloom.designer.loading import load_policy
from flowloom.designer.rollout import rollout
from flowloom.designer.sft import is_valid
from flowloom.recipes import stage_config
from flowloom.workflow import Catalogue, Grammar, Workflow, decode
from flowloom.workflow.profile import TEXT_TO_IMAGE

SERVER = "data/catalogues/example.json.gz"
PROMPTS = ("a fox in the snow", "portrait of a sailor, 85mm", "a lighthouse at dusk", "a red car")
PAIRS = {"num_pairs": 120, "num_processes": 1}
TRAINING = {
    "policy": dataclasses.asdict(
        PolicyConfig(
            width=16, num_layers=1, num_heads=2, mlp_width=16, num_prompt_tokens=8,
            num_workflow_tokens=128,
        )
    ),
    "prior_steps": 3, "batch_size": 16, "num_samples": 4, "num_threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the snapshot and prompts."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["catalogue", "snapshot", "--catalogue", SERVER, "--profile", "t2i"]
    assert main([*command, "--out", str(folder / "catalogue.json.gz")]) == 0
    return folder


def _pairs_config(folder, **changes):
    given = {"prompts": {"prompts_file": str(folder / "prompts.txt")}}
    return stage_config("server", "build_pairs", {**given, **PAIRS, **changes})


def test_a_snapshot_of_a_profile(folder):
    whole, narrow = Catalogue.load(SERVER), Catalogue.load(folder / "catalogue.json.gz")
    assert set(narrow.nodes) <= set(TEXT_TO_IMAGE) & set(whole.nodes)
    assert "KSampler" in narrow.nodes
    assert narrow.files == whole.files


def test_designs_are_valid_on_the_whole_server(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path))
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    inputs = {"catalogue": folder}
    pairs = stages.run("build_pairs", _pairs_config(folder), inputs).out_dir
    rows = read_pairs(pairs, split=None)
    assert set(rows["origin"]) == {"random"}
    assert set(rows["prompt"]) <= set(PROMPTS)
    config = stage_config("server", "train_sft", TRAINING)
    result = stages.run("train_sft", config, {**inputs, "pairs": pairs})
    assert result.metrics["sft/valid_frac"] == 1.0
    policy, whole = load_policy(result.out_dir), Catalogue.load(SERVER)
    grammar = Grammar(Catalogue.load(folder / "catalogue.json.gz"), budget=128)
    tokens = rollout(policy, grammar, PROMPTS, 8).tokens
    assert all(is_valid(decode(row, grammar), whole) for row in tokens)
    assert all(is_valid(Workflow.from_api(json.loads(row)), whole) for row in rows["workflow"])


def test_pairs_follow_given_workflows_where_asked(folder):
    plain = Drawer(_pairs_config(folder), Catalogue.load(folder / "catalogue.json.gz"))
    flows = [json.loads(row) for row in plain.table(0)["workflow"].to_pylist()]
    mine = next(f for f in flows if any(n["class_type"] == "KSampler" for n in f.values()))
    samplers = [n["inputs"] for n in mine.values() if n["class_type"] == "KSampler"]
    file = folder / "mine.jsonl"
    with file.open("w") as lines:
        for steps in (4, 8, 20, 25, 30):
            for inputs in samplers:
                inputs.update(sampler_name="lcm", steps=steps)
            lines.write(json.dumps(mine) + "\n")

    def lcm_frac(**changes):
        config = _pairs_config(folder, workflows_file=str(file), given_frac=0.0, **changes)
        drawn = Drawer(config, Catalogue.load(folder / "catalogue.json.gz")).table(0)
        return sum('"lcm"' in row for row in drawn["workflow"].to_pylist()) / len(drawn)

    assert lcm_frac(like_given=True) > 0.15 > 0.1 > lcm_frac(like_given=False)

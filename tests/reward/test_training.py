"""Members and ensemble on a synthetic score that depends on prompt and workflow together.

Facts pinned here:
- The ensemble orders unseen prompts' workflows like the truth (rank correlation >= 0.7, within
  prompts >= 0.7).
- The same call gives the same bytes; killed and run again it gives the bytes of an uninterrupted
  run.
- Predictions do not depend on the order of rows, on what shares their batch, or on how a workflow's
  nodes are numbered.
- reward = mean - beta * std, by hand; intervals hold their score and lie in [0, 1].
- Ten losses stay what they are (golden).
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from flowloom.dataset.tables import write_table
from flowloom.dataset.triplets import schema
from flowloom.render.model_records import save_catalogue
from flowloom.reward import member as member_module
from flowloom.reward.calibration import calibrate_reward
from flowloom.reward.config import CalibrationConfig, NetworkConfig, RewardConfig
from flowloom.reward.ensemble import Ensemble
from flowloom.reward.features import FeatureTable
from flowloom.reward.member import batches, pairwise_loss, train_reward
from flowloom.reward.network import Batch, Network
from flowloom.runs import Run, folder_digest
from flowloom.workflow import (
    Catalogue,
    Grammar,
    ModelFile,
    Vocabulary,
    Workflow,
    decode,
    encode,
    random_workflows,
)

REL_GOLDEN = 1e-3
SCHEMA = schema(("faithfulness", "crispness"))
NAMES = ("red.safetensors", "green.safetensors", "blue.safetensors")
CONFIG = RewardConfig(network=NetworkConfig(width=32), num_steps=120, checkpoint_every=40)


def file(name, role="checkpoint"):
    return ModelFile("checkpoints", name, name.encode().hex().ljust(64, "0")[:64], "shapes", role)


def truth(prompt, workflow):
    """High where the checkpoint is of the prompt's colour; few steps cost."""
    samplers = [n for n in workflow.nodes.values() if n.class_type == "KSampler"]
    names = [n.inputs["ckpt_name"] for n in workflow.nodes.values() if "ckpt_name" in n.inputs]
    score = 0.2 + 0.5 * any(name.split(".")[0] in prompt for name in names)
    return score + (0.02 * min(samplers[0].inputs["steps"], 10) if samplers else -0.2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A catalogue of three checkpoints and triplets whose score is `truth` plus noise."""
    root = tmp_path_factory.mktemp("world")
    bare = dataclasses.replace(Catalogue.load("embedded"), files=())
    facts = bare.with_files([file(name) for name in NAMES])
    (root / "catalogue").mkdir()
    save_catalogue(root / "catalogue" / "catalogue.json.gz", facts)
    grammar = Grammar(facts, classes=[c for c in facts.nodes if "Lora" not in c])
    flows = [decode(e.tokens, grammar) for e in random_workflows(grammar, 600, seed=1)]
    rng = np.random.default_rng(0)
    rows = {name: [] for name in SCHEMA.names}
    for number in range(1_500):
        split = "train" if number < 1_200 else "calibration"
        color = NAMES[number % 3].split(".")[0]
        # Wordings of the calibration split do not occur in training.
        verb = ("draw", "paint")[split == "calibration"]
        prompt = f"{verb} {number // 6} {color} things"
        flow = flows[rng.integers(len(flows))]
        for seed in range(1 if split == "train" else 4):
            score = float(np.clip(truth(prompt, flow) + rng.normal() * 0.1, 0, 1))
            values = {
                "cell": number,
                "prompt": prompt,
                "kind": color,
                "workflow": json.dumps(flow.to_api()),
                "fingerprint": flow.template_fingerprint(),
                "seed": seed,
                "score": score,
                "faithfulness": score,
                "crispness": 1.0,
                "flops": 1,
                "split": split,
                "origin": "random",
            }
            for name, column in rows.items():
                column.append(values[name])
    (root / "triplets").mkdir()
    write_table(root / "triplets" / "triplets.parquet", rows, SCHEMA)
    return root


def train(world, folder, config=CONFIG):
    run = Run("train_reward", folder)
    run.begin()
    metrics = train_reward(config, run, catalogue=world / "catalogue", triplets=world / "triplets")
    return run.out, metrics


def calibrate(world, folder, members, config=CalibrationConfig()):  # noqa: B008
    run = Run("calibrate_reward", folder)
    run.begin()
    metrics = calibrate_reward(
        config, run, catalogue=world / "catalogue", triplets=world / "triplets", members=members
    )
    return run.out, metrics


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Two members and their ensemble."""
    root = tmp_path_factory.mktemp("trained")
    members = [
        train(world, root / str(k), dataclasses.replace(CONFIG, member=k))[0] for k in (0, 1)
    ]
    folder, metrics = calibrate(world, root / "ensemble", members)
    return members, folder, metrics


@pytest.fixture(scope="module")
def ensemble(trained):
    return Ensemble.load(trained[1])


def designs(ensemble, num, seed=5):
    grammar = Grammar(ensemble.table.catalogue, ensemble.table.vocabulary)
    return [e.tokens for e in random_workflows(grammar, num, seed)]


def test_learns_what_depends_on_prompt_and_workflow(trained, ensemble):
    _, _, metrics = trained
    assert metrics["reward/spearman"] > 0.7
    assert metrics["reward/spearman_within"] > 0.7
    assert metrics["reward/coverage"] == pytest.approx(0.9, abs=0.05)
    # The same workflows, asked for with two colours: the predicted order follows the prompt.
    flows = [decode(tokens, ensemble.table.codec) for tokens in designs(ensemble, 40)]
    one = [f for f in flows if sum("ckpt_name" in n.inputs for n in f.nodes.values()) == 1]
    gaps = []
    for flow in one:
        name = next(n.inputs["ckpt_name"] for n in flow.nodes.values() if "ckpt_name" in n.inputs)
        color = name.split(".")[0]
        other = next(n.split(".")[0] for n in NAMES if n != name)
        tokens = encode(flow, ensemble.table.codec).tokens
        scores, _, _ = ensemble.score_and_interval(
            [f"draw 7 {color} things", f"draw 7 {other} things"], [tokens, tokens]
        )
        gaps.append(scores[0] - scores[1])
    assert np.mean(gaps) == pytest.approx(0.5, abs=0.15)


def test_same_bytes_and_resume(world, trained, tmp_path, monkeypatch):
    members, folder, metrics = trained
    # Interrupted between checkpoints, then finished by the same call.
    save, calls = member_module.write_state, []

    def killed(path, state):
        save(path, state)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(member_module, "write_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run")
    again, _ = train(world, tmp_path / "run")
    assert len(calls) == 3
    assert folder_digest(again) == folder_digest(members[0])
    assert folder_digest(members[0]) != folder_digest(members[1])
    other, other_metrics = calibrate(world, tmp_path / "ensemble", members)
    assert folder_digest(other) == folder_digest(folder)
    assert other_metrics == metrics


def test_reward_by_hand(ensemble):
    tokens = designs(ensemble, 6)
    prompts = ["draw 1 red things", "draw 2 blue things"] * 3
    flows = [decode(row, ensemble.table.codec) for row in tokens]
    members_KB = ensemble.predict_workflows(prompts, flows)
    mean_B, std_B = ensemble.predict(prompts, tokens)
    np.testing.assert_allclose(mean_B, (members_KB[0] + members_KB[1]) / 2, atol=1e-5)
    np.testing.assert_allclose(std_B, np.abs(members_KB[0] - members_KB[1]) / 2, atol=1e-5)
    expected = mean_B - 0.5 * std_B
    np.testing.assert_allclose(ensemble.reward(prompts, tokens), expected, atol=1e-6)
    scores, low, high = ensemble.score_and_interval(prompts, tokens)
    assert ((low >= 0) & (low <= scores) & (scores <= high) & (high <= 1)).all()
    assert ensemble.predict([], [])[0].shape == (0,)


def test_rows_do_not_see_each_other(ensemble):
    tokens = designs(ensemble, 30)
    prompts = [f"draw {k} {('red', 'green')[k % 2]} things" for k in range(30)]
    together, _ = ensemble.predict(prompts, tokens)
    order = np.random.default_rng(0).permutation(30)
    ensemble._known.clear()
    shuffled, _ = ensemble.predict([prompts[k] for k in order], [tokens[k] for k in order])
    ensemble._known.clear()
    alone = [ensemble.predict([p], [t])[0][0] for p, t in zip(prompts, tokens, strict=True)]
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_numbering_of_nodes_does_not_matter(ensemble):
    features = [ensemble.table.of_tokens(row) for row in designs(ensemble, 8)]
    turned = []
    for item in features:
        number = np.random.default_rng(0).permutation(item.num_nodes)
        order = np.argsort(number[item.nodes_E], kind="stable")
        turned.append(
            dataclasses.replace(
                item,
                rows_E=item.rows_E[order],
                nodes_E=number[item.nodes_E][order],
                sources_L=number[item.sources_L],
                targets_L=number[item.targets_L],
            )
        )
    prompts = ["paint 3 blue things"] * 8
    plain, other = ensemble._forward(prompts, features), ensemble._forward(prompts, turned)
    np.testing.assert_allclose(plain, other, atol=1e-5)


def test_a_new_file_starts_as_the_mean_of_its_like(ensemble):
    more = ensemble.table.catalogue.with_files([file("new.safetensors")])
    wide = ensemble.extended(more, ensemble.table.vocabulary.extend(more))
    tokens = designs(ensemble, 5)
    prompts = ["draw 1 red things"] * 5
    np.testing.assert_allclose(
        wide.predict(prompts, tokens)[0], ensemble.predict(prompts, tokens)[0], atol=1e-6
    )
    flow = decode(tokens[0], ensemble.table.codec).to_api()
    for node in flow.values():
        if "ckpt_name" in node["inputs"]:
            node["inputs"]["ckpt_name"] = "new.safetensors"
    tokens = encode(Workflow.from_api(flow), wide.table.codec).tokens
    assert np.isfinite(wide.predict(["draw 1 red things"], [tokens])[0]).all()
    with pytest.raises(ValueError, match="token"):
        ensemble.predict(["draw 1 red things"], [tokens])


def test_members_of_different_data_are_refused(world, trained, tmp_path):
    members, _, _ = trained
    record = json.loads((members[1] / "member.json").read_text())
    (tmp_path / "odd").mkdir()
    for path in members[1].iterdir():
        (tmp_path / "odd" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "odd" / "member.json").write_text(json.dumps({**record, "mean": 0.123}))
    with pytest.raises(ValueError, match=r"got mean 0\.123"):
        calibrate(world, tmp_path / "run", [members[0], tmp_path / "odd"])
    with pytest.raises(ValueError, match="members: got none"):
        calibrate(world, tmp_path / "none", [])


def test_an_epoch_has_every_row_once(world):
    facts = Catalogue.load(world / "catalogue" / "catalogue.json.gz")
    table = FeatureTable(facts, Vocabulary.build(facts))
    rows = member_module.Rows.read(world / "triplets", "train", table)
    config = dataclasses.replace(CONFIG, num_steps=25, prompts_per_step=64)
    plan = list(batches(config, rows))
    # 600 prompts, two rows each: ten steps an epoch.
    groups = [group for step in plan[:10] for group in step]
    assert sorted(np.concatenate(groups).tolist()) == list(range(1_200))
    assert all(len(set(rows.prompt_of_R[group])) == 1 for group in groups)
    later = list(batches(config, rows, first=13))
    for step, again in zip(plan[13:], later, strict=True):
        assert [group.tolist() for group in step] == [group.tolist() for group in again]


def test_pairwise_loss_by_hand():
    predicted = torch.tensor([1.0, 0.0, 5.0])
    loss = pairwise_loss(predicted, torch.tensor([0.3, 0.1, 0.9]), torch.tensor([0, 0, 1]))
    assert float(loss) == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-5)
    assert float(pairwise_loss(predicted, torch.ones(3), torch.zeros(3))) == 0


def test_losses(world, golden, tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=10, checkpoint_every=1, pair_coef=0.1)
    train(world, tmp_path / "run", config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    golden("reward.json", [json.loads(line)["train/loss"] for line in lines], rel=REL_GOLDEN)


def test_padding_nodes_add_nothing(world):
    facts = Catalogue.load(world / "catalogue" / "catalogue.json.gz")
    table = FeatureTable(facts, Vocabulary.build(facts))
    torch.manual_seed(0)
    network = Network(NetworkConfig(width=16), 9, table.num_rows).eval()
    torch.nn.init.normal_(network.out.weight)
    grammar = Grammar(facts)
    flows = [table.of_tokens(e.tokens) for e in random_workflows(grammar, 20, seed=2)]
    flows.sort(key=lambda item: item.num_nodes)
    assert flows[0].num_nodes < flows[-1].num_nodes
    ids, one = torch.tensor([[3, 4, 0, 0]]), torch.zeros(1, dtype=torch.long)
    alone = network(ids, one, Batch.of(flows[:1]))
    padded = network(ids[:, :2], torch.zeros(2, dtype=torch.long), Batch.of([flows[0], flows[-1]]))
    torch.testing.assert_close(alone[0], padded[0], rtol=0, atol=1e-5)


def test_loss_that_is_not_finite_names_the_step(world, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e30, warmup_steps=0, num_steps=30)
    with pytest.raises(FloatingPointError, match="at step"):
        train(world, tmp_path / "run", config)


def test_a_member_of_another_version_is_named(world, trained, tmp_path):
    for path in trained[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "member-1.json").read_text())
    del record["num_facts"]
    (tmp_path / "member-1.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"member-1\.json: got no num_facts"):
        Ensemble.load(tmp_path)

"""Facts: an option that is wide open is as if it were off (a KL gate for all rows, an entropy floor
at 0), and one between changes the weights; a minibatch in several backward passes, or shared by two
processes, gives the same weights up to the order of summation; a watch renders designs and changes
no weight; proposals are designs of the tuned policy with their predictions; a configuration that
cannot be is named."""

import dataclasses
import json
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowloom.dataset.tables import read_table
from flowloom.dataset.triplets import load_calibration_prompts
from flowloom.designer.config import GRPOConfig
from flowloom.designer.grpo import own_groups, train_grpo
from flowloom.designer.policy import Policy
from flowloom.designer.watch import Watch
from flowloom.reward.ensemble import Ensemble
from flowloom.workflow import Catalogue, Grammar, Vocabulary, Workflow, encode
from tests.designer.forked import run_joint, run_stage, start
from tests.evaluation.parts import PROMPTS

ATOL = 1e-5
"""Of weights after two steps at lr 1e-3: sums of gradients in another order."""
CONFIG = GRPOConfig(
    num_steps=2, prompts_per_step=4, designs_per_prompt=4, num_minibatches=1, kl_coef=0.5,
    entropy_coef=0.1, num_proposals=None, checkpoint_every=1,
)  # fmt: skip


@pytest.fixture
def train(parts, tmp_path):
    """Weights, digest and final metrics of GRPO with some fields replaced."""
    inputs = {name: parts[name] for name in ("catalogue", "triplets", "designer", "reward")}

    def train(**changes):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        config = dataclasses.replace(CONFIG, **changes)
        metrics, _ = run_stage(train_grpo, folder, config, inputs)
        train.last = folder
        return load_file(folder / "out" / "adapter.safetensors"), metrics

    train.inputs = inputs
    return train


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def _close(one, other, atol=ATOL):
    return all(torch.allclose(one[name], other[name], rtol=0, atol=atol) for name in one)


def test_what_is_wide_open_is_off(train):
    plain, metrics = train()
    assert _equal(train(kl_gate_frac=1.0)[0], plain)
    assert _equal(train(entropy_floor=1e9)[0], plain)
    assert _equal(train(advantage_clip=1e9)[0], plain)
    assert metrics["grpo/spread"] > 0
    assert metrics["grpo/grad_norm"] > 0
    assert metrics["grpo/valid_frac"] == 1.0


def test_what_is_shut_is_not_there(train):
    assert _equal(train(entropy_floor=0.0)[0], train(entropy_coef=0.0)[0])
    assert train(advantage_clip=1e-9, kl_coef=0.0, entropy_coef=0.0)[1]["grpo/grad_norm"] < 1e-8


def test_options_between_change_the_weights(train):
    runs = [{}, {"kl_gate_frac": 0.25}, {"kl_coef": 0.0}, {"kl": "k3"}, {"epochs": 2}]
    found = [train(**changes) for changes in runs]
    for index, (weights, _) in enumerate(found):
        assert not any(_close(weights, other) for other, _ in found[:index])
    # The second pass starts where the first one moved to.
    assert found[-1][1]["grpo/step_kl"] > 10 * found[0][1]["grpo/step_kl"]


def test_accumulation_is_the_same_gradient(train):
    whole, once = train(num_minibatches=2, epochs=2)
    split, twice = train(num_minibatches=2, epochs=2, accumulate=2)
    assert not _equal(whole, split)
    assert _close(whole, split)
    assert twice == pytest.approx(once, rel=1e-3)


def test_two_processes_do_what_one_does(train, tmp_path):
    changes = {"num_minibatches": 2, "kl_gate_frac": 0.5, "entropy_floor": 5.0, "num_proposals": 4}
    alone, metrics = train(**changes)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder, config = tmp_path / "joint", dataclasses.replace(CONFIG, **changes)
    args = (port, train_grpo, folder, config, train.inputs)
    processes = [start(run_joint, rank, 2, *args) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert _close(load_file(folder / "out" / "adapter.safetensors"), alone)
    found = json.loads((folder / "result.json").read_text())["metrics"]
    assert found == pytest.approx(metrics, rel=1e-3)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in logged] == [0, 1]


def test_each_process_has_a_share_of_each_minibatch():
    config = dataclasses.replace(CONFIG, prompts_per_step=8, num_minibatches=2, accumulate=2)
    assert own_groups(config, 1, 0).tolist() == list(range(8))
    assert own_groups(config, 2, 0).tolist() == [0, 1, 4, 5]
    assert own_groups(config, 2, 1).tolist() == [2, 3, 6, 7]
    with pytest.raises(ValueError, match=r"processes \* accumulate: got 6, expected a divisor"):
        own_groups(config, 3, 0)


def test_a_watch_changes_no_weight(train):
    plain, _ = train()
    watched, metrics = train(watch_every=1, watch_prompts=3)
    assert _equal(plain, watched)
    assert 0 <= metrics["grpo/true"] <= 1
    assert metrics["grpo/gap"] == metrics["grpo/predicted"] - metrics["grpo/true"]
    logged = [json.loads(line) for line in (train.last / "metrics.jsonl").open()]
    assert len({row["grpo/true"] for row in logged}) == 2
    train(watch_every=2, watch_prompts=3)
    seldom = [json.loads(line) for line in (train.last / "metrics.jsonl").open()]
    assert "grpo/true" not in seldom[0]
    assert seldom[1]["grpo/true"] == logged[1]["grpo/true"]


def test_a_watch_scores_what_it_rendered(parts, monkeypatch):
    asked = []

    class Scripted:
        def score(self, prompts, images, flops):
            asked.append((prompts, len(images), flops))
            return [{"score": 0.25}, {"score": 0.75}]

    monkeypatch.setattr("flowloom.score.rubric.get_rubric", lambda name: Scripted())
    ensemble = Ensemble.load(parts["reward"])
    monkeypatch.setattr(ensemble, "predict_workflows", lambda p, w: np.array([[1.0, 2], [3, 4]]))
    monkeypatch.setattr(ensemble, "to_rubric", lambda p: p / 10)
    config = dataclasses.replace(CONFIG, watch_every=1, watch_prompts=2)
    watch = Watch(config, parts["catalogue"], ensemble, PROMPTS["train"])
    policy, grammar = _policy(parts)
    seen = watch.look(policy, grammar, 0)
    # Members' means are 2 and 3.
    assert seen == pytest.approx({"grpo/true": 0.5, "grpo/predicted": 0.25, "grpo/gap": -0.25})
    assert asked[0][1] == 2
    assert set(asked[0][0]) <= set(PROMPTS["train"])
    assert all(flops > 0 for flops in asked[0][2])
    assert not ensemble._known


def _policy(parts, adapter=None):
    policy = Policy.load(parts["designer"], adapter)
    catalogue = Catalogue.load(parts["catalogue"] / "catalogue.json.gz")
    vocabulary = json.loads((parts["designer"] / "vocabulary.json").read_text())
    return policy, Grammar(
        catalogue, Vocabulary.from_json(vocabulary), policy.config.num_workflow_tokens
    )


def test_proposals(train, parts):
    plain, _ = train()
    weights, metrics = train(num_proposals=8)
    assert _equal(plain, weights)
    rows = read_table(train.last / "out" / "proposals.parquet")
    assert list(rows)[:4] == ["prompt", "kind", "split", "workflow"]
    assert list(rows)[4:] == ["fingerprint", "predicted", "spread"]
    known = load_calibration_prompts(parts["triplets"])
    assert len(rows["prompt"]) == metrics["grpo/proposals"] == 8 + len(known)
    # Two each for the first four of six prompts, and one for every calibration prompt.
    assert rows["prompt"][:8] == [prompt for prompt in PROMPTS["train"][:4] for _ in range(2)]
    assert rows["prompt"][8:] == [row["prompt"] for row in known]
    assert rows["split"] == ["train"] * 8 + ["calibration"] * len(known)
    assert set(rows["kind"][:8]) == {"single"}
    _, grammar = _policy(parts)
    flows = [Workflow.from_api(json.loads(text)) for text in rows["workflow"]]
    assert [flow.template_fingerprint() for flow in flows] == rows["fingerprint"]
    assert [flow.canonical(grammar.catalogue) for flow in flows] == flows
    ensemble = Ensemble.load(parts["reward"])
    mean, spread = ensemble.predict(rows["prompt"], [encode(f, grammar).tokens for f in flows])
    np.testing.assert_allclose(rows["predicted"], ensemble.to_rubric(mean), atol=1e-6)
    np.testing.assert_allclose(rows["spread"], spread, atol=1e-6)
    train(num_proposals=3)
    few = read_table(train.last / "out" / "proposals.parquet")
    assert few["prompt"][:3] == list(PROMPTS["train"][:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_gate_frac": 0.0}, r"kl_gate_frac: got 0.0, expected in \(0, 1\] or null"),
        ({"kl_gate_frac": 1.5}, "kl_gate_frac: got 1.5"),
        ({"entropy_floor": -1.0}, "entropy_floor: got -1.0, expected >= 0"),
        ({"entropy_floor": 0.5, "entropy_coef": 0.0}, "entropy_floor: got 0.5, expected null"),
        ({"advantage_clip": 0.0}, "advantage_clip: got 0.0, expected > 0"),
        ({"epochs": 0}, "epochs: got 0, expected >= 1"),
        ({"accumulate": 3}, "accumulate: got 3, expected a divisor of the 4 prompts"),
        ({"watch_every": 0}, "watch_every: got 0, expected >= 1 or null"),
        ({"num_proposals": 0}, "num_proposals: got 0, expected >= 1 or null"),
    ],
)
def test_a_configuration_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)

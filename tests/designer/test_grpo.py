"""Facts: the clipped gain and its gradient equal a two-token example worked by hand, and so do the
KL estimate and the gate; advantages are centred in their group; ten steps log what they always
logged; with a reward for one token that depends on the prompt it learns to read the
prompt, and embeddings stay as they are; a killed run started again ends with the same bytes; a
reward that is not finite, or a step beyond the trust region, stops the run with its step."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from flowloom.designer import grpo
from flowloom.designer.config import GRPOConfig
from flowloom.designer.grpo import train_grpo
from flowloom.designer.objective import (
    clipped_gain,
    group_advantages,
    is_clipped,
    k3,
    most_uncertain,
    moved,
)
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import rollout
from flowloom.runs import Run, write_json
from tests.designer.tiny import PROMPTS, files_of

ATOL = 1e-6
GOLDEN_RTOL = 1e-3
CONFIG = GRPOConfig(
    num_steps=4, prompts_per_step=4, num_minibatches=2, num_proposals=None, checkpoint_every=1
)
WANTED = {
    "circle": "shapes-circle-star.safetensors",
    "square": "shapes-square-triangle.safetensors",
}


class ScriptedEnsemble:
    """Reward 1 for the checkpoint that the prompt's shape asks for."""

    def __init__(self, grammar):
        self.grammar, self.num_asked = grammar, 0

    def reward(self, prompts, tokens):
        self.num_asked += len(prompts)
        wanted = [WANTED["circle" if "circle" in prompt else "square"] for prompt in prompts]
        found = [files_of(row, self.grammar) for row in tokens]
        return np.array([float(f[0] == w) for f, w in zip(found, wanted, strict=True)])

    def predict(self, prompts, tokens):
        """Longer designs are less certain."""
        spread = np.array([len(row) / 100 for row in tokens])
        return self.reward(prompts, tokens) + spread, spread


@pytest.fixture
def designer(policy, grammar, tmp_path):
    policy.save(tmp_path / "designer")
    write_json(tmp_path / "designer" / "vocabulary.json", grammar.vocabulary.to_json())
    return tmp_path / "designer"


@pytest.fixture
def ensemble(grammar, monkeypatch):
    scripted = ScriptedEnsemble(grammar)
    monkeypatch.setattr(grpo.Ensemble, "load", lambda folder: scripted)
    return scripted


def _train(folder, inputs, designer, config=CONFIG):
    run = Run("train_grpo", folder)
    run.work.mkdir(parents=True, exist_ok=True)
    run.begin()
    given = {name: inputs[name] for name in ("catalogue", "triplets")}
    metrics = train_grpo(config, run, **given, designer=designer, reward=folder)
    return metrics, run.finish(metrics).digest


def test_clipped_gain_and_gradient_by_hand():
    # Token 1: ratio 1.5 with A = 1, clipped at 1.2: no gradient. Token 2: ratio 0.5 with A = -2:
    # min(-1, -1.6) is the clipped -1.6, again without gradient.
    old = torch.tensor([math.log(0.4), math.log(0.6)])
    logprobs = (old + torch.tensor([1.5, 0.5]).log()).requires_grad_()
    gain = clipped_gain(logprobs, old, torch.tensor([1.0, -2.0]), 0.2)
    assert gain.tolist() == pytest.approx([1.2, -1.6], abs=ATOL)
    gain.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_gradient_inside_the_clip_range_is_ratio_times_advantage():
    old = torch.tensor([-1.0, -2.0])
    logprobs = (old + torch.tensor([1.1, 0.9]).log()).requires_grad_()
    clipped_gain(logprobs, old, torch.tensor([2.0, -3.0]), 0.2).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1.1 * 2, -0.9 * 3], abs=ATOL)


def test_clipping_stops_only_gains():
    # A worse token (ratio > 1, A < 0) and a better one (ratio < 1, A > 0) keep their gradient.
    old = torch.zeros(2)
    logprobs = torch.tensor([1.5, 0.5]).log().requires_grad_()
    clipped_gain(logprobs, old, torch.tensor([-1.0, 1.0]), 0.2).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.5, 0.5], abs=ATOL)


def test_what_is_clipped_has_no_gradient():
    old = torch.zeros(5)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    logprobs = ratio.log().requires_grad_()
    clipped_gain(logprobs, old, advantages, 0.2).sum().backward()
    expected = [True, False, False, True, False]
    assert is_clipped(logprobs, old, advantages, 0.2).tolist() == expected
    assert (logprobs.grad == 0).tolist() == expected


def test_k3_by_hand():
    # Reference 0.6, policy 0.3: r = 2, 2 - 1 - log 2. Its gradient in log pi is 1 - r.
    logprobs = torch.tensor([0.3, 0.5]).log().requires_grad_()
    estimate = k3(torch.tensor([0.6, 0.25]).log(), logprobs)
    assert estimate.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5], abs=ATOL)
    estimate.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.5], abs=ATOL)


def test_the_gate_takes_the_largest_spreads():
    spread = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.2])
    assert most_uncertain(spread, 0.4).tolist() == [False, True, False, True, False]
    assert most_uncertain(spread, 0.41).tolist() == [False, True, True, True, True]  # a tie
    assert most_uncertain(spread, 0.01).tolist() == [False, True, False, False, False]
    assert most_uncertain(spread, 1.0).all()


def test_one_choice_says_little_of_how_far_a_policy_moved():
    # From 1e-6 to 0.5 counts as from 0.05; any other choice as it is.
    old, now = torch.tensor([1e-6, 0.4, 0.2]).log(), torch.tensor([0.5, 0.2, 0.6]).log()
    expected = [9 - math.log(10), math.log(2) - 0.5, 2 - math.log(3)]
    assert moved(now, old).tolist() == pytest.approx(expected, rel=1e-5)


def test_k3_is_unbiased():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q).log()).sum()
    assert torch.allclose((p * k3(q.log(), p.log())).sum(), exact, atol=ATOL)


def test_group_advantages():
    rewards = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert group_advantages(rewards, False).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    by_std = group_advantages(rewards, True)
    assert by_std[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)
    assert by_std[1].tolist() == [0.0, 0.0]
    assert group_advantages(rewards * 2, False, 1.5).tolist() == [[-1.5, 1.5], [0.0, 0.0]]


GOLDEN = {
    "default": CONFIG,
    "options": dataclasses.replace(
        CONFIG, epochs=2, accumulate=2, kl="k3", kl_gate_frac=0.5, kl_coef=0.2, entropy_coef=0.02,
        entropy_floor=0.65, divide_by_std=True, advantage_clip=2.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name, tmp_path, inputs, designer, ensemble, golden):
    config = dataclasses.replace(GOLDEN[name], num_steps=10)
    _train(tmp_path / "run", inputs, designer, config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    # Not the KLs, which start as rounding.
    kept = ("reward", "spread", "entropy", "grad_norm", "unique_frac", "mean_tokens")
    logged = [{column: row[f"grpo/{column}"] for column in kept} for row in rows]
    golden(f"grpo_{name}.json", logged, rel=GOLDEN_RTOL)


def test_learns_to_read_the_prompt(tmp_path, inputs, designer, ensemble, grammar):
    config = dataclasses.replace(
        CONFIG, num_steps=18, lr=2e-2, designs_per_prompt=16, kl_coef=0.005, entropy_coef=0.02
    )
    metrics, _ = _train(tmp_path / "run", inputs, designer, config)
    assert metrics["grpo/first_reward"] < 0.35
    assert metrics["grpo/reward"] > 0.9
    assert metrics["grpo/valid_frac"] == 1.0
    assert metrics["grpo/unique_frac"] > 0.5  # only one choice was worth anything

    tuned = Policy.load(designer, tmp_path / "run" / "out")
    before = Policy.load(designer)
    assert torch.equal(tuned.embedding.weight, before.embedding.weight)
    designs = rollout(tuned, grammar, PROMPTS, 16, seed=99).tokens
    repeated = [prompt for prompt in PROMPTS for _ in range(16)]
    assert ScriptedEnsemble(grammar).reward(repeated, designs).mean() > 0.85


def test_resumed_equals_uninterrupted(tmp_path, inputs, policy, designer, ensemble, monkeypatch):
    # A sharp policy repeats designs, and predictions that depend on what is asked together stand
    # for the last bits of a network's: both matter only if the cache is not resumed.
    policy.head.weight.data *= 8
    policy.save(designer)
    plain_reward = ensemble.reward
    ensemble.reward = lambda prompts, tokens: plain_reward(prompts, tokens) + 0.01 * len(prompts)
    whole = _train(tmp_path / "whole", inputs, designer)
    plain, calls = grpo.rollout, []

    def dying(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(grpo, "rollout", dying)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", inputs, designer)
    assert (tmp_path / "broken" / "work" / "state.pt").is_file()
    assert _train(tmp_path / "broken", inputs, designer) == whole


def test_a_design_is_predicted_once(ensemble):
    reward = grpo.CachedReward(ensemble)
    ensemble.reward = lambda prompts, tokens: np.arange(len(prompts), dtype=float)
    spread = 0.01
    assert reward(["a", "b", "a"], [[1], [1], [1]]) == [(0.0, spread), (1.0, spread), (0.0, spread)]
    assert reward(["b", "a"], [[1], [2]]) == [(1.0, spread), (0.0, spread)]


def test_a_non_finite_reward_names_its_step(tmp_path, inputs, designer, ensemble):
    ensemble.reward = lambda prompts, tokens: np.full(len(prompts), np.nan)
    with pytest.raises(FloatingPointError, match="train_grpo: step 0: a reward is not finite"):
        _train(tmp_path / "run", inputs, designer)


def test_the_trust_region_is_watched(tmp_path, inputs, designer, ensemble):
    config = dataclasses.replace(CONFIG, max_step_kl=1e-9)
    with pytest.raises(FloatingPointError, match=r"train_grpo: step [01]: moved"):
        _train(tmp_path / "run", inputs, designer, config)

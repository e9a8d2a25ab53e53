"""Facts: a training that is killed with SIGKILL at any step, also while it resumes, and started
again ends with the bytes of one that was left alone: supervised fine-tuning, a reward member, and
GRPO with every option."""

import signal

import numpy as np
import pytest

from flowloom.designer.config import GRPOConfig, PolicyConfig, SFTConfig
from flowloom.designer.grpo import train_grpo
from flowloom.designer.sft import train_sft
from flowloom.reward.config import NetworkConfig, RewardConfig
from flowloom.reward.member import train_reward
from tests.designer.forked import count_calls, run_killed, run_stage, start

LOOPS = {
    "train_sft": (
        train_sft,
        SFTConfig(
            policy=PolicyConfig(width=16, num_layers=1, num_heads=2, mlp_width=32),
            prior_steps=3, best_steps=3, batch_size=8, num_samples=4, checkpoint_every=1,
        ),
    ),
    "train_reward": (
        train_reward,
        RewardConfig(
            network=NetworkConfig(width=8), num_steps=6, prompts_per_step=2, rows_per_prompt=4,
            checkpoint_every=1,
        ),
    ),
    "train_grpo": (
        train_grpo,
        GRPOConfig(
            num_steps=5, prompts_per_step=4, designs_per_prompt=4, num_minibatches=1, epochs=2,
            accumulate=2, kl="k3", kl_gate_frac=0.5, entropy_coef=0.01, entropy_floor=0.8,
            watch_every=2, watch_prompts=2, num_proposals=8, checkpoint_every=1,
        ),
    ),
}  # fmt: skip


@pytest.fixture
def folders(parts, inputs):
    given = ("catalogue", "triplets", "designer", "reward")
    return {
        "train_sft": inputs,
        "train_reward": {name: inputs[name] for name in ("catalogue", "triplets")},
        "train_grpo": {name: parts[name] for name in given},
    }


@pytest.mark.parametrize("name", LOOPS)
def test_killed_equals_left_alone(name, folders, tmp_path, monkeypatch):
    function, config = LOOPS[name]
    with monkeypatch.context() as patch:
        count = count_calls(patch.setattr)
        whole = run_stage(function, tmp_path / "whole", config, folders[name])
    rng = np.random.default_rng([ord(letter) for letter in name])
    anywhere, soon, late = (int(rng.integers(*span)) for span in ((4, count[0]), (1, 6), (-7, 1)))
    # Somewhere and again soon after it came back; and while it writes what it made.
    for kill, moments in enumerate([(anywhere, soon), (count[0] + late,)]):
        folder = tmp_path / f"killed-{kill}"
        for at in moments:
            process = start(run_killed, at, function, folder, config, folders[name])
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert (folder / "work" / "state.pt").is_file()
        assert run_stage(function, folder, config, folders[name]) == whole

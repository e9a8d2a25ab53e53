"""Recipes of the embedded world: any laptop, no downloads, no GPU."""

from __future__ import annotations

from flowloom.dataset.config import (
    BuildPairsConfig,
    BuildTripletsConfig,
    PanelConfig,
    PromptsConfig,
)
from flowloom.designer.config import GRPOConfig, SFTConfig
from flowloom.evaluation.config import EvaluateConfig, ReportConfig
from flowloom.generator.config import TuneGeneratorConfig
from flowloom.lifecycle.config import GateConfig
from flowloom.recipes.recipe import Recipe
from flowloom.reward.config import RewardConfig


def demo() -> Recipe:
    """The whole loop on 2 CPU cores in under ten minutes; the stages' defaults are its scale."""
    return Recipe()


def smoke() -> Recipe:
    """Every stage at its smallest, a few seconds each: shows that the loop closes, learns nothing.

    The gate asks for little evidence, and usually refuses.
    """
    prompts = PromptsConfig(num_train=24, num_calibration=8, num_test=12)
    return Recipe(
        tune_generator=TuneGeneratorConfig(
            num_epochs=2, pairs_per_epoch=8, num_steps=4, num_eval_prompts=8, eval_seeds=1,
            num_grid_prompts=4, checkpoint_every=1,
        ),
        build_pairs=BuildPairsConfig(prompts=prompts, num_pairs=200),
        build_triplets=BuildTripletsConfig(
            prompts=prompts, panel=PanelConfig(num_prompts=(4, 4), num_kept=(3,)),
            random_cells=2, evolved_cells=(1,), evolved_seeds=(1,), calibration_cells=2,
            calibration_seeds=2,
        ),
        train_sft=SFTConfig(prior_steps=6, best_steps=3, batch_size=32, num_samples=20),
        train_reward=RewardConfig(num_steps=20, checkpoint_every=10),
        train_grpo=GRPOConfig(num_steps=2, prompts_per_step=8, num_minibatches=2),
        evaluate=EvaluateConfig(
            num_prompts=8, num_seeds=1, num_designs=2, num_unrendered=100, num_resamples=1000,
            num_grid_prompts=4,
        ),
        promote=GateConfig(min_prompts=8, min_designs=100),
        report=ReportConfig(num_examples=4),
    )  # fmt: skip


def bench() -> Recipe:
    """The demo's loop at several times its scale, for figures: about an hour on 2 CPU cores."""
    return Recipe()

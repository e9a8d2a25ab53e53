"""Recipes of the embedded world: any laptop, no downloads, no GPU."""

from __future__ import annotations

import dataclasses

from flowloom.dataset.config import (
    BuildPairsConfig,
    BuildTripletsConfig,
    PanelConfig,
    PromptsConfig,
)
from flowloom.designer.config import GRPOConfig, SFTConfig
from flowloom.evaluation.config import EvaluateConfig, ReportConfig
from flowloom.generator.config import FDFOConfig, TuneGeneratorConfig
from flowloom.generator.config import PromptsConfig as TunedPromptsConfig
from flowloom.generator.judging_config import JudgingConfig
from flowloom.lifecycle.config import GateConfig
from flowloom.recipes.recipe import Recipe
from flowloom.reward.config import RewardConfig
from flowloom.shapes.prompts import KINDS


def demo() -> Recipe:
    """The whole loop on 2 CPU cores in under ten minutes; the other stages' defaults are its scale.

    FDFO tunes the base for two kinds of prompts: on all seven at once its few minutes buy little,
    since it strengthens what the base sometimes draws, and pairs and counts it hardly ever does.
    """
    return Recipe(
        tune_generator=TuneGeneratorConfig(
            prompts=TunedPromptsConfig(kinds=("single", "colors")),
            card="the base tuned by FDFO for single objects, with or without a colour",
            method=FDFOConfig(num_branches=4, churn=0.1, min_rms=0.1, pull_frac=0.4, kl_coef=0.6),
            num_epochs=20,
            lr=8e-4,
            average_epochs=2.0,
            judging=JudgingConfig(held_out_rubrics=("shapes-likeness",)),
        ),
        # A kind has 27 prompts here, and its mean a standard error of about .06.
        promote=GateConfig(max_kind_drop=0.1),
    )


def smoke() -> Recipe:
    """Every stage at its smallest, a few seconds each: shows that the loop closes, learns nothing.

    The gate asks for little evidence, and usually refuses.
    """
    prompts = PromptsConfig(num_train=24, num_calibration=8, num_test=12)
    return Recipe(
        tune_generator=TuneGeneratorConfig(
            num_epochs=2, images_per_epoch=16, num_steps=4, checkpoint_every=1,
            judging=JudgingConfig(num_prompts=8, num_seeds=1, num_grid_prompts=4),
        ),
        build_pairs=BuildPairsConfig(prompts=prompts, num_pairs=200),
        build_triplets=BuildTripletsConfig(
            prompts=prompts, panel=PanelConfig(num_prompts=(4, 4), num_kept=(3,)),
            random_cells=2, evolved_cells=(1,), evolved_seeds=(1,), calibration_cells=2,
            calibration_seeds=2, num_designed=8,
        ),
        train_sft=SFTConfig(prior_steps=6, best_steps=3, batch_size=32, num_samples=20),
        train_reward=RewardConfig(num_steps=20, checkpoint_every=10),
        train_grpo=GRPOConfig(
            num_steps=2, prompts_per_step=8, num_minibatches=2, num_proposals=8
        ),
        evaluate=EvaluateConfig(
            num_prompts=8, num_seeds=1, num_designs=2, num_unrendered=100, num_resamples=1000,
            num_grid_prompts=4,
        ),
        promote=GateConfig(min_prompts=8, min_designs=100),
        report=ReportConfig(num_examples=4),
    )  # fmt: skip


def bench() -> Recipe:
    """All seven kinds, 20,000 triplets before the rounds: what is claimed is measured with this.

    On 2 CPU cores about 5 minutes of data, and 12 per training seed of `benchmarks.rounds`.
    """
    small = demo()
    prompts = PromptsConfig(
        kinds=KINDS, num_train=1190, num_calibration=140, num_test=350, num_unrendered=4000
    )
    return dataclasses.replace(
        small,
        build_pairs=dataclasses.replace(small.build_pairs, prompts=prompts, num_pairs=20_000),
        build_triplets=dataclasses.replace(
            small.build_triplets, prompts=prompts, random_cells=5, wild_cells=2,
            evolved_cells=(3, 2, 1), evolved_seeds=(1, 1, 2), num_designed=2000,
        ),
        train_sft=dataclasses.replace(small.train_sft, prior_steps=400, best_steps=200),
        train_reward=dataclasses.replace(small.train_reward, num_steps=800),
        train_grpo=dataclasses.replace(
            small.train_grpo, num_steps=200, num_proposals=2000, checkpoint_every=25
        ),
        evaluate=dataclasses.replace(
            small.evaluate, num_prompts=350, num_seeds=4, num_unrendered=10_000
        ),
    )  # fmt: skip

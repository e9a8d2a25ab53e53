"""The smallest dataset of triplets that has everything: all origins, splits and rounds."""

import dataclasses

from flowloom.dataset.config import (
    BuildPairsConfig,
    BuildTripletsConfig,
    PanelConfig,
    PriorConfig,
    PromptsConfig,
)
from flowloom.dataset.pairs import build_pairs
from flowloom.dataset.triplets import build_triplets
from flowloom.runs import Run

FOUR_KINDS = ("single", "two", "counting", "colors")
CONFIG = BuildTripletsConfig(
    prompts=PromptsConfig(
        kinds=FOUR_KINDS, num_train=16, num_calibration=4, num_test=12, num_unrendered=8
    ),
    panel=PanelConfig(
        settings=("4/2.0",),
        lora_settings=("4/2.0",),
        num_prompts=(4, 4),
        num_kept=(2,),
        num_varied=1,
    ),
    random_cells=1,
    evolved_cells=(1, 1),
    evolved_seeds=(1, 4),
    num_parents=4,
    calibration_cells=2,
    calibration_seeds=2,
    num_processes=1,
    shard_size=16,
)
PLAIN = dataclasses.replace(CONFIG, mode="plain", random_seeds=2, shard_size=8)
"""A plan of one round."""


def build_small_pairs(world):
    """Write the pairs of `CONFIG` below a folder with a catalogue; returns that folder."""
    run = Run("build_pairs", world / "pairs")
    run.begin()
    prior = PriorConfig(steps_weights=(1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3))
    config = BuildPairsConfig(prompts=CONFIG.prompts, prior=prior, num_pairs=80)
    build_pairs(config, run, catalogue=world)
    return world


def build(world, folder, config=CONFIG, pairs=None, parts=(), **earlier):
    """Run `build_triplets` in a run folder; returns its artifact and metrics."""
    run = Run("build_triplets", folder)
    run.begin()
    pairs = pairs or world / "pairs" / "out.partial"
    metrics = build_triplets(config, run, catalogue=world, pairs=pairs, parts=parts, **earlier)
    return run.out, metrics

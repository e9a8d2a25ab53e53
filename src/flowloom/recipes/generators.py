"""Recipes that tune Stable Diffusion 3.5 medium by FDFO, on a GPU.

Run so far, on random weights and a CPU: the same code at a tiny size. Memory is what
`flowloom.generator.memory` counts (`python -m benchmarks.sd3_memory`); no score and no time has
been measured. Name a file of prompts: `--set prompts.file=prompts.txt`; without one they are those
of the embedded world. The weights are gated: accept their licence on the hub, or name a folder in
`sd3.name_or_path`. Stages beside `tune_generator` are the embedded world's.
"""

from __future__ import annotations

import dataclasses
import math

from flowloom.generator.config import FDFOConfig, TuneGeneratorConfig
from flowloom.generator.judging_config import JudgingConfig, Setting
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.sd3_config import SD3Config
from flowloom.recipes.recipe import Recipe
from flowloom.score.config import PickScoreConfig, RubricConfig, TermConfig, VLMConfig

ATTENTION = tuple(
    f"attn.{layer}"
    for layer in (
        "to_q", "to_k", "to_v", "to_out.0",
        "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )
)  # fmt: skip
"""The joint attention of pictures and prompts; the paper's choice is not known to us."""
PAPER_CLIP = 0.03
"""The paper's c."""
PAPER_ELEMENTS = 16 * 64 * 64
"""Numbers D in the latents of 512 x 512 pixels."""
PAIR_RMS = 0.1
"""rms(dx) at which our c is the paper's. Guessed from the embedded world, where it grows with the
root of churn * steps: 0.047 at 0.025, so 0.09 at the paper's 0.1. A run logs its own as
`train/pair_rms`; where that is another, set `method.trust` to 0.03 * 256 * it."""


def trust_of_clip(clip: float, rms: float, num_elements: int) -> float:
    """trust = c rms(dx) sqrt(D): what makes `pairs.trust_clip` give c for such a pair.

    At the paper's c and D it is 7.68 rms(dx).
    """
    return clip * rms * math.sqrt(num_elements)


def sd35_medium_fdfo() -> Recipe:
    """FDFO at its published size (arXiv 2603.12893) on Stable Diffusion 3.5 medium.

    The paper's: 432 pairs per epoch, 4 gradient steps, 40 solver steps, LoRA of rank 32 and alpha
    64, rate 3e-5, churn 0.0025, clip 0.03 (at pairs as far apart as `PAIR_RMS`; nearer ones get a
    wider one), PickScore plus 0.1 P(yes) of a vision-language model, no penalty. Ours: PickScore is
    divided by 26, as in Flow-GRPO's code, so that the two weigh alike; adapted layers; no guidance
    (set `guidance=4.5`: twice the time); epochs; judging.

    Hardware: GPUs of 80 GB under torchrun, each with all models (30 GB at the peak) and its share
    of 19 GB of states in the host's memory. Time: not measured; an epoch is 0.34 EFLOP: 34,560
    velocities to sample, as many to train on, 2.44 TFLOP each and three times that with what a
    backward pass repeats and computes; the reward models come on top.
    """
    reward = RubricConfig(
        name="pickscore-vlm",
        terms=(
            TermConfig(scorer=PickScoreConfig(), weight=1.0, high=26.0),
            TermConfig(scorer=VLMConfig(), weight=0.1),
        ),
    )
    return Recipe(
        tune_generator=TuneGeneratorConfig(
            sd3=SD3Config(),
            name="sd35-medium-fdfo.safetensors",
            card="Stable Diffusion 3.5 medium tuned by FDFO for PickScore and P(yes)",
            rubric=reward,
            method=FDFOConfig(
                churn=0.0025,
                # The paper's 1e-6 under the square.
                min_rms=1e-3,
                trust=trust_of_clip(PAPER_CLIP, PAIR_RMS, PAPER_ELEMENTS),
                kl_coef=0.0,
            ),
            lora=LoRAConfig(rank=32, alpha=64.0, target_modules=ATTENTION),
            num_epochs=200,
            images_per_epoch=864,
            num_steps=40,
            time_shift=3.0,
            num_minibatches=4,
            sample_rows=16,
            units_per_pass=4,
            lr=3e-5,
            lr_schedule="constant",
            warmup_steps=0,
            judging=JudgingConfig(
                num_prompts=64,
                num_seeds=2,
                serve=Setting(num_steps=28, guidance=4.5, time_shift=3.0),
                rows_per_pass=8,
            ),
            checkpoint_every=1,
        )
    )


def sd35_medium_80gb() -> Recipe:
    """`sd35_medium_fdfo` on one GPU of 80 GB: a ninth of the pairs per epoch, larger passes.

    Memory: 32 GB on the device at the peak, 2 GB of states in the host's. Time: not measured; an
    epoch is 0.037 EFLOP.
    """
    return _smaller(sd35_medium_fdfo(), images_per_epoch=96, units_per_pass=16)


def sd35_medium_24gb() -> Recipe:
    """On one GPU of 24 GB: smaller reward models, half the solver steps with twice the churn.

    The vision-language model is Qwen2.5-VL 3B, and PickScore is in bfloat16; both stay on the
    device. Pairs lie as far apart as with 40 steps, since churn * steps is the same.

    Memory: 16 GB on the device at the peak, 1 GB of states in the host's. Time: not measured; an
    epoch is 0.019 EFLOP.
    """
    large = sd35_medium_80gb().tune_generator
    assert large.sd3 is not None, "it tunes a pipeline"
    reward = RubricConfig(
        name="pickscore-vlm",
        terms=(
            TermConfig(scorer=PickScoreConfig(dtype="bfloat16"), weight=1.0, high=26.0),
            TermConfig(
                scorer=VLMConfig(model="Qwen/Qwen2.5-VL-3B-Instruct", batch_size=2), weight=0.1
            ),
        ),
    )
    return _smaller(
        sd35_medium_80gb(),
        sd3=dataclasses.replace(large.sd3, decode_batch_size=1),
        rubric=reward,
        method=dataclasses.replace(large.method, churn=0.005),
        num_steps=20,
        sample_rows=8,
        units_per_pass=2,
    )


def _smaller(recipe: Recipe, **changes: object) -> Recipe:
    config = dataclasses.replace(recipe.tune_generator, **changes)  # pyright: ignore
    return dataclasses.replace(recipe, tune_generator=config)

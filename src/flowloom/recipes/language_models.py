"""Recipes whose designer is a pretrained language model, for a GPU.

Run so far, on random weights and a CPU: a rollout and a backward pass at the size of Qwen3 0.6B; of
Llama 3.1 8B two of its layers were built with their LoRA. No score and no time has been measured,
and rates and steps are first guesses. The recipes draw the embedded world's prompts: name a file of
your own with `prompts_file` in both `build_pairs.prompts` and `build_triplets.prompts`.
"""

from __future__ import annotations

import dataclasses

from flowloom.dataset.config import BuildPairsConfig, BuildTripletsConfig, PromptsConfig
from flowloom.designer.config import GRPOConfig, LanguageModelConfig, LoRAConfig, SFTConfig
from flowloom.evaluation.config import EvaluateConfig
from flowloom.recipes.recipe import Recipe
from flowloom.reward.config import NetworkConfig, RewardConfig

ENCODER = NetworkConfig(
    width=768, num_layers=12, num_heads=12, mlp_ratio=4, num_prompt_tokens=128
)  # fmt: skip
"""A reward member of about 100 M weights."""


def qwen3_0_6b() -> Recipe:
    """Qwen3 0.6B with a LoRA of rank 16, on 50,000 pairs and 30,000 renders.

    Hardware: one GPU of 16 GB for the designer (1.2 GB of frozen bfloat16 weights), 8 CPU cores
    for pairs and renders. Time and metrics: not measured.
    """
    prompts = PromptsConfig(num_train=2000, num_calibration=200, num_test=500, num_unrendered=8000)
    return Recipe(
        build_pairs=BuildPairsConfig(prompts=prompts, num_pairs=50_000, num_processes=8),
        build_triplets=BuildTripletsConfig(
            prompts=prompts, mode="plain", random_cells=13, num_processes=8
        ),
        train_sft=SFTConfig(
            policy=LanguageModelConfig(),
            prior_steps=800, best_steps=100, batch_size=64, lr=3e-4, warmup_steps=40,
            num_processes=8, checkpoint_every=100,
        ),
        train_reward=RewardConfig(
            network=dataclasses.replace(ENCODER, width=384, num_layers=6, num_heads=6),
            num_steps=3000, lr=1e-3, warmup_steps=100, checkpoint_every=500,
        ),
        train_grpo=GRPOConfig(num_steps=200, lr=1e-4, warmup_steps=5, checkpoint_every=20),
        evaluate=EvaluateConfig(num_prompts=500, num_unrendered=10_000),
    )  # fmt: skip


def llama_3_1_8b() -> Recipe:
    """Llama 3.1 8B with a LoRA of rank 32; data, reward and evaluation as for `qwen3_0_6b`.

    Hardware: one GPU of 80 GB (16 GB of frozen bfloat16 weights, activations recomputed). Time and
    metrics: not measured; its forward pass has 13 times the weights. The hub asks to accept a
    licence for them; a folder in `train_sft.policy.name_or_path` does as well.
    """
    small = qwen3_0_6b()
    policy = LanguageModelConfig(
        name_or_path="meta-llama/Llama-3.1-8B",
        lora=LoRAConfig(rank=32, alpha=64.0),
        gradient_checkpointing=True,
    )
    return dataclasses.replace(
        small,
        train_sft=dataclasses.replace(small.train_sft, policy=policy, lr=2e-4, micro_batch_size=16),
        train_grpo=dataclasses.replace(small.train_grpo, lr=5e-5, accumulate=4),
    )


def paper() -> Recipe:
    """FlowRL at its published size (arXiv 2505.21478): 500,000 pairs, 100,000 renders.

    Its abstract gives these two numbers, SFT followed by GRPO, an ensemble of rewards (how many
    members is the pipeline's to say) and guidance. All else is ours: the language model, rates and
    steps, how prompts and workflows are drawn, the size of a reward member.

    Hardware: one GPU of 80 GB for the designer, many cores for the renders. Time and metrics: not
    measured.
    """
    large = llama_3_1_8b()
    prompts = PromptsConfig(
        num_train=2500, num_calibration=500, num_test=500, num_unrendered=40_000
    )
    return dataclasses.replace(
        large,
        build_pairs=dataclasses.replace(large.build_pairs, prompts=prompts, num_pairs=500_000),
        # Per train prompt 38 pairs and 2 senseless workflows, one render each.
        build_triplets=dataclasses.replace(large.build_triplets, prompts=prompts, random_cells=38),
        # One epoch of the pairs.
        train_sft=dataclasses.replace(
            large.train_sft, prior_steps=3900, best_steps=400, batch_size=128, warmup_steps=100
        ),
        train_reward=dataclasses.replace(
            large.train_reward, network=ENCODER, num_steps=10_000, lr=3e-4, warmup_steps=500
        ),
        train_grpo=dataclasses.replace(
            large.train_grpo, num_steps=500, prompts_per_step=64, kl_coef=0.02
        ),
    )

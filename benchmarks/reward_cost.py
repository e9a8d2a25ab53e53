"""What predicting a design's score costs beside rendering it.

    python -m benchmarks.reward_cost [--quick] [--json]

production  floating-point operations, counted by torch on meta tensors (a multiplication and an
            addition are two): 4 members, each ModernBERT-base (149 M parameters, arXiv 2412.13663)
            over 32 prompt tokens and 20 nodes, against SDXL (arXiv 2307.01952) at 1024 x 1024: 30
            steps, two calls of the UNet each for guidance, one VAE decoding; text encoders left out
embedded    CPU milliseconds of one thread: the reward of the shapes world's members, features
            included, nothing cached, against the engine at 8 steps with guidance. The members have
            fresh weights and a table of facts of the size that training leaves
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ModernBertConfig, ModernBertModel

from benchmarks.render import plain_jobs
from flowloom.dataset.prompts import draw_prompts
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.render.engine import Engine
from flowloom.render.models import ModelStore
from flowloom.reward.config import NetworkConfig
from flowloom.reward.ensemble import Ensemble
from flowloom.reward.features import FeatureTable
from flowloom.reward.network import Network
from flowloom.shapes.prompts import KINDS
from flowloom.workflow import Grammar, random_workflows

NUM_MEMBERS, NUM_STEPS, CALLS_PER_STEP = 4, 30, 2
PROMPT_TOKENS, NUM_NODES = 32, 20
EMBEDDED_STEPS, EMBEDDED_MEMBERS, NUM_FACTS = 8, 3, 20_000

# Published configuration of stabilityai/stable-diffusion-xl-base-1.0.
UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def count(function):
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def production():
    """Operations of a reward and of a render."""
    with torch.device("meta"):
        encoder, unet, vae = (
            ModernBertModel(ModernBertConfig()),
            UNet2DConditionModel(**UNET),
            AutoencoderKL(**VAE),
        )
        width = encoder.config.hidden_size
        vectors = torch.empty(1, PROMPT_TOKENS + NUM_NODES, width)
        latents, texts = torch.empty(1, 4, 128, 128), torch.empty(1, 77, 2048)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        member = count(lambda: encoder(inputs_embeds=vectors))
        call = count(lambda: unet(latents, torch.empty(1), texts, added_cond_kwargs=added))
        decoding = count(lambda: vae.decode(latents))
    reward, render = NUM_MEMBERS * member, NUM_STEPS * CALLS_PER_STEP * call + decoding
    return {
        "member_params": sum(weight.numel() for weight in encoder.parameters()),
        "unet_params": sum(weight.numel() for weight in unet.parameters()),
        "reward_gflop": reward / 1e9,
        "unet_call_gflop": call / 1e9,
        "render_gflop": render / 1e9,
        "render_per_reward": render / reward,
    }


def cpu_ms(function, num):
    """CPU milliseconds per item of a call."""
    began = time.process_time()
    function()
    return (time.process_time() - began) / num * 1e3


def embedded(num_rewards, num_renders, repeats):
    """CPU milliseconds of a reward and of a render in the shapes world, in turn."""
    engine = Engine(ModelStore.open())
    catalogue = engine.store.catalogue
    grammar = Grammar(catalogue)
    designs = [design.tokens for design in random_workflows(grammar, num_rewards, 0)]
    texts = [spec.text for spec in draw_prompts("train", 240, KINDS, 0)]
    prompts = [texts[k % len(texts)] for k in range(num_rewards)]
    table, words = FeatureTable(catalogue, grammar.vocabulary), WordTokenizer.fit(texts)
    networks = [
        Network(NetworkConfig(), len(words), table.num_rows, NUM_FACTS).eval()
        for _ in range(EMBEDDED_MEMBERS)
    ]
    jobs = plain_jobs(engine.store, EMBEDDED_STEPS, num_renders)
    rewards, renders = [], []
    for _ in range(repeats + 1):
        ensemble = Ensemble(networks, table, words, {"beta": 0.5})
        rewards.append(cpu_ms(lambda e=ensemble: e.reward(prompts, designs), num_rewards))
        with torch.inference_mode():
            renders.append(cpu_ms(lambda: engine.render(jobs), num_renders))
    reward, render = (float(np.median(values[1:])) for values in (rewards, renders))
    return {
        "embedded_reward_ms": reward,
        "embedded_render_ms": render,
        "embedded_render_per_reward": render / reward,
    }


def main():
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer designs and repeats")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = production() | embedded(*((512, 64, 1) if options.quick else (2048, 256, 5)))
    for name, value in result.items():
        print(f"{name:28} {value:12.5g}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

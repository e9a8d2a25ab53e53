"""Sizes of a Stable Diffusion 3 pipeline: read from its folder, or the published ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class SD3Layout:
    """What each part of a pipeline is built from, as its own `config.json` has it."""

    transformer: Mapping[str, Any]
    """Of SD3Transformer2DModel."""
    vae: Mapping[str, Any]
    """Of AutoencoderKL."""
    text_encoders: tuple[Mapping[str, Any], ...]
    """Of the two CLIPTextModelWithProjection and the T5EncoderModel."""


def read_layout(folder: Path) -> SD3Layout:
    """The layout of a pipeline's folder; parts that it lacks are left out.

    Raises:
        ValueError: It has no transformer or autoencoder.
    """
    read = {}
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        path = folder / part / "config.json"
        if path.is_file():
            read[part] = json.loads(path.read_text())
        elif not part.startswith("text"):
            raise ValueError(f"{folder}: got no {part}/config.json, expected an SD3 pipeline")
    encoders = tuple(value for part, value in read.items() if part.startswith("text"))
    return SD3Layout(read["transformer"], read["vae"], encoders)


CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "model_type": "clip_text_model",
}  # fmt: skip
"""The text half of CLIP ViT-L/14: width, layers and heads by arXiv 2103.00020, table 20; the
vocabulary is its tokenizer's."""

CLIP_BIG_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "max_position_embeddings": 77,
    "hidden_act": "gelu", "model_type": "clip_text_model",
}  # fmt: skip
"""The text half of OpenCLIP ViT-bigG/14: `ViT-bigG-14.json` of open_clip."""

T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu", "model_type": "t5",
}  # fmt: skip
"""The encoder of T5 v1.1 XXL: `t5.1.1.xxl` of google-research/text-to-text-transfer-transformer."""

VAE_16 = {
    # Those of the autoencoder of Stable Diffusion XL, from which diffusers'
    # scripts/convert_sd3_to_diffusers.py starts.
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024,
    # The same script changes these.
    "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    "scaling_factor": 1.5305, "shift_factor": 0.0609,
}  # fmt: skip
"""The autoencoder of all SD3 and SD3.5."""

SD35_MEDIUM = SD3Layout(
    transformer={
        # MMDiT of depth 24; heads of 64, as many as layers, so width 1536: arXiv 2403.03206,
        # section 5.3, and diffusers' scripts/convert_sd3_to_diffusers.py.
        "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
        # Defaults of SD3Transformer2DModel and of that script.
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "sample_size": 128,
        # T5's width, the width of the transformer, and 768 + 1280 of the two CLIPs.
        "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
        # Comments in that script and in diffusers' transformer_sd3.py on SD3.5 "2b".
        "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    },
    vae=VAE_16,
    text_encoders=(CLIP_L, CLIP_BIG_G, T5_XXL),
)  # fmt: skip
"""Stable Diffusion 3.5 medium: 2.24 G weights and 0.23 G of position table, published as 2.5 G."""

SD35_LARGE = SD3Layout(
    transformer={
        **SD35_MEDIUM.transformer,
        # Depth 38, so width 2432; the same script.
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
        "pos_embed_max_size": 192, "dual_attention_layers": (),
    },
    vae=VAE_16,
    text_encoders=SD35_MEDIUM.text_encoders,
)  # fmt: skip
"""Stable Diffusion 3.5 large, published as 8.1 G weights."""

REWARD_WEIGHTS = {
    # A CLIP ViT-H/14: OpenCLIP's table of models has 986.11 M.
    "yuvalkirstain/PickScore_v1": 986_000_000,
    # With their vision towers, as their pages on the hub round them.
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_750_000_000,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_290_000_000,
}
"""Weights of reward models on the hub."""

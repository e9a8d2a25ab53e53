"""A pipeline of the layout of Stable Diffusion 3.5 medium with tiny random weights."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TRANSFORMER = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
    "caption_projection_dim": 16, "pooled_projection_dim": 20, "out_channels": 4,
    "pos_embed_max_size": 8, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {
    "block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 4,
    "layers_per_block": 1, "use_quant_conv": False, "use_post_quant_conv": False,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 64,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SIZE, NUM_T5_TOKENS = 64, 24


def clip_tokenizer(pad):
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate(["!", *letters])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=16)


def clip_encoder(tokenizer, width, projection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def build(with_t5=True):
    """The pipeline; weights that a fresh model has at 0 are drawn too."""
    torch.manual_seed(0)
    tokenizers = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    config = T5Config(
        vocab_size=30, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**VAE),
        text_encoder=clip_encoder(tokenizers[0], width=12, projection=8),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_encoder(tokenizers[1], width=16, projection=12),
        tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel(config) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    # As they are when read: T5 has a dropout.
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

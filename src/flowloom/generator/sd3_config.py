"""How a Stable Diffusion 3 or 3.5 is read and run; kept apart so that recipes need no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from flowloom.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class SD3Config:
    """An SD3 or SD3.5, medium or large, in diffusers' folder layout, tuned by a LoRA."""

    name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    """Folder that a diffusers pipeline was saved to, or its name on the hub."""
    revision: str | None = None
    """Commit of a hub model; None takes its newest."""
    size: int = 512
    """Side of the pictures in pixels; 512 gives latents of 16 x 64 x 64, 65,536 numbers."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen transformer and text encoders; adapters and autoencoder are float32."""
    device: str = "auto"
    """Where it runs, as torch names it; `auto` is the process's own GPU, else the CPU."""
    use_t5: bool = True
    """Read prompts with the third text encoder too; it alone is 9.5 GB in bfloat16."""
    num_t5_tokens: int = 256
    """Prompt positions of the third text encoder; zeros where it is not used."""
    embeddings_dir: str | None = None
    """Where embeddings of prompts are kept; None takes `embeddings` in flowloom's own folder."""
    gradient_checkpointing: bool = True
    """Recompute a block's activations in the backward pass: slower, a fraction of the memory."""
    text_batch_size: int = 16
    """Prompts encoded at once."""
    decode_batch_size: int = 4
    """Pictures decoded at once."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(bool(self.name_or_path), "name_or_path", self.name_or_path, "a folder or a name")
        for name in ("num_t5_tokens", "text_batch_size", "decode_batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        fine = self.size > 0 and self.size % 16 == 0
        check(fine, "size", self.size, "a positive multiple of 16")

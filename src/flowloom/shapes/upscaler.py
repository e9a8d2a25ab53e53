"""A learned x2 upscaler of the shapes world: a small convolutional network on pixels.

It doubles the sides by repetition and adds what four convolutions say (sub-pixel convolution, arXiv
1609.05158). Trained on damaged drawings, it also removes noise and blur.

Shapes: N pictures, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCALE = 2
UPSCALER_FORMAT = "flowloom-upscaler-1"
_DEPTH = 3


class Upscaler(nn.Module):
    """Pictures in [-1, 1] to pictures of twice the sides."""

    scale = SCALE

    def __init__(self, width: int = 32):
        """Build it with `width` channels per hidden layer."""
        super().__init__()
        self.width = width
        sizes = [3, *[width] * _DEPTH]
        self.body = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate")
            for a, b in itertools.pairwise(sizes)
        )
        self.head = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1, padding_mode="replicate")
        # The upscaler starts as plain repetition.
        for param in self.head.parameters():
            nn.init.zeros_(param)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, 3, 2H, 2W]`, both in [-1, 1]."""
        hidden = x_NCHW
        for layer in self.body:
            hidden = F.silu(layer(hidden))
        repeated = F.interpolate(x_NCHW, scale_factor=SCALE, mode="nearest")
        return (repeated + F.pixel_shuffle(self.head(hidden), SCALE)).clamp(-1, 1)


def flops_per_picture(upscaler: Upscaler, height: int, width: int) -> int:
    """Multiply-adds times two for one picture of these sides."""
    weights = sum(p.numel() for p in upscaler.parameters() if p.ndim == 4)
    return 2 * weights * height * width


def save_upscaler(path: str | Path, upscaler: Upscaler) -> None:
    """Write float16 weights and the width, in one metadata entry so that bytes are stable."""
    tensors = {name: value.half().contiguous() for name, value in upscaler.state_dict().items()}
    record = json.dumps({"width": upscaler.width})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata={UPSCALER_FORMAT: record})


def load(path: str | Path) -> Upscaler:
    """Read what `save_upscaler` wrote; float32, evaluation mode, no gradients.

    Raises:
        ValueError: The file is no upscaler of this world.
    """
    with safe_open(str(path), "pt") as file:
        info = file.metadata() or {}
    if UPSCALER_FORMAT not in info:
        raise ValueError(
            f"{path}: got metadata {sorted(info)}, expected an entry {UPSCALER_FORMAT!r}"
        )
    upscaler = Upscaler(json.loads(info[UPSCALER_FORMAT])["width"])
    upscaler.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
    return upscaler.eval().requires_grad_(False)


def damage(x_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, blur and fading of random strength, by picture: what the upscaler learns to undo."""
    N = len(x_NCHW)

    def amount(largest: float) -> Tensor:
        return torch.rand(N, 1, 1, 1, generator=generator) * largest

    padded = F.pad(x_NCHW, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, stride=1)
    x_NCHW = torch.lerp(x_NCHW, blurred, amount(1.0).expand_as(x_NCHW))
    faded = x_NCHW.mean((2, 3), keepdim=True)
    x_NCHW = torch.lerp(x_NCHW, faded.expand_as(x_NCHW), amount(0.3).expand_as(x_NCHW))
    noise = torch.randn(x_NCHW.shape, generator=generator)
    return (x_NCHW + noise * amount(0.3)).clamp(-1, 1)

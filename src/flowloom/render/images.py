"""What image and latent nodes do to pixels: resize, blur, sharpen, blend. Values are in [-1, 1].

Shapes: N pictures, C channels, H x W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

BLEND_MODES = ("normal", "multiply", "screen", "overlay", "soft_light", "difference")
RESIZE_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")


def resize(x_NCHW: Tensor, height: int, width: int, method: str) -> Tensor:
    """Resample pictures to `height` x `width`, without antialiasing except for lanczos.

    Raises:
        ValueError: An unknown method.
    """
    if method not in RESIZE_METHODS:
        raise ValueError(f"upscale_method: got {method!r}, expected {', '.join(RESIZE_METHODS)}")
    if (height, width) == x_NCHW.shape[2:]:
        return x_NCHW
    if method == "lanczos":
        planes = [
            np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
            for plane in x_NCHW.flatten(0, 1).numpy()
        ]
        return torch.from_numpy(np.stack(planes)).unflatten(0, x_NCHW.shape[:2])
    align = {"align_corners": False} if method in ("bilinear", "bicubic") else {}
    return F.interpolate(x_NCHW, size=(height, width), mode=method, **align)


def gaussian_kernel(radius: int, sigma: float) -> Tensor:
    """Samples of exp(-d^2 / (2 sigma^2)) on a square of side 2 radius + 1, summing to 1."""
    d = torch.arange(-radius, radius + 1, dtype=torch.float32)
    line = torch.exp(-(d**2) / (2 * sigma**2))
    kernel = line[:, None] * line[None, :]
    return kernel / kernel.sum()


def blur(x_NCHW: Tensor, radius: int, sigma: float) -> Tensor:
    """Convolve with a Gaussian."""
    return _convolve(x_NCHW, gaussian_kernel(radius, sigma))


def sharpen(x_NCHW: Tensor, radius: int, sigma: float, alpha: float) -> Tensor:
    """Unsharp masking x + 10 alpha (x - blur(x)), clamped; the 10 is the node's convention."""
    sharp = x_NCHW + 10 * alpha * (x_NCHW - blur(x_NCHW, radius, sigma))
    return sharp.clamp(-1, 1)


def blend(first: Tensor, second: Tensor, factor: float, mode: str) -> Tensor:
    """(1 - factor) a + factor B(a, b) on colour values a, b in [0, 1], clamped.

    B is the separable mode of W3C Compositing and Blending (level 1, section 10.1) with the second
    picture on top; `overlay` is there hard-light the other way round, and `difference` is a - b
    without the absolute value, as in ComfyUI.

    Args:
        first: Picture in [-1, 1].
        second: Picture of the same shape.
        factor: Share of the blended picture.
        mode: One of `BLEND_MODES`.

    Raises:
        ValueError: An unknown mode.
    """
    a, b = (first + 1) / 2, (second + 1) / 2
    if mode == "normal":
        blended = b
    elif mode == "multiply":
        blended = a * b
    elif mode == "screen":
        blended = a + b - a * b
    elif mode == "overlay":
        blended = torch.where(a <= 0.5, 2 * a * b, 1 - 2 * (1 - a) * (1 - b))
    elif mode == "soft_light":
        curve = torch.where(a <= 0.25, ((16 * a - 12) * a + 4) * a, a.clamp(min=0).sqrt())
        dark, light = a - (1 - 2 * b) * a * (1 - a), a + (2 * b - 1) * (curve - a)
        blended = torch.where(b <= 0.5, dark, light)
    elif mode == "difference":
        blended = a - b
    else:
        raise ValueError(f"blend_mode: got {mode!r}, expected one of {', '.join(BLEND_MODES)}")
    return torch.lerp(a, blended, factor).clamp(0, 1) * 2 - 1


def _convolve(x_NCHW: Tensor, kernel: Tensor) -> Tensor:
    radius = kernel.shape[-1] // 2
    rows = _reflect(x_NCHW.shape[2], radius)
    columns = _reflect(x_NCHW.shape[3], radius)
    padded = x_NCHW[:, :, rows][:, :, :, columns]
    channels = x_NCHW.shape[1]
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def _reflect(size: int, radius: int) -> Tensor:
    """Indices -radius .. size - 1 + radius mirrored at the edge pixels, as often as needed."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(-radius, size + radius) % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)

"""What image and latent nodes do to pixels: resize, blur, sharpen. Values are in [-1, 1].

Shapes: N pictures, C channels, H x W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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

"""The detector written plainly: every quantity at every place, one suppression after the other.

An oracle for `flowloom.shapes.detector.detect`, and what it was before it was made fast.

Shapes: B pictures, S shapes, Z sizes, K colours, M = S * Z masks, P = 1024 places, O detections.
"""

import numpy as np
import torch
import torch.nn.functional as F

from flowloom.shapes.detector import NUM_DETECTIONS, TEMPERATURE, Detections
from flowloom.shapes.drawing import BACKGROUND, MASKS, PALETTE, PIXELS, SIZE
from flowloom.shapes.prompts import COLORS, SHAPES, SIZES

KEYS = [(shape, size) for shape in SHAPES for size in SIZES]


@torch.no_grad()
def detect(images_BCYX: torch.Tensor) -> Detections:
    """Find objects on 32 x 32 pictures."""
    masks = torch.zeros(len(KEYS), 1, 13, 13)
    for index, key in enumerate(KEYS):
        half = PIXELS[key[1]] // 2
        masks[index, 0, 6 - half : 7 + half, 6 - half : 7 + half] = torch.from_numpy(MASKS[key])
    tints_K3 = torch.tensor([PALETTE[color] for color in COLORS]) - BACKGROUND
    p = images_BCYX - BACKGROUND
    B, M, K = len(p), len(KEYS), len(COLORS)
    sums = F.conv2d(p.reshape(B * 3, 1, SIZE, SIZE), masks, padding=6).reshape(B, 3, -1)
    grown = F.max_pool2d(masks, 3, stride=1, padding=1)
    energy_BMP = F.conv2d(p.square().sum(1, keepdim=True), grown, padding=6).flatten(2)
    inner_BKMP = (tints_K3 @ sums).reshape(B, K, M, SIZE * SIZE)
    norm_KM1 = (tints_K3.square().sum(1)[:, None] * masks.sum((1, 2, 3)))[..., None]
    gain_BKMP = 2 * inner_BKMP - norm_KM1
    fit_BKMP = (2 * inner_BKMP - energy_BMP[:, None]) / norm_KM1
    strength_BMP, color_BMP = (gain_BKMP.clamp(min=0) * fit_BKMP.clamp(min=0).square()).max(1)
    exists = np.zeros((B, NUM_DETECTIONS), np.float32)
    odds = np.zeros((B, NUM_DETECTIONS, len(SHAPES), len(SIZES), K), np.float32)
    centers = np.zeros((B, NUM_DETECTIONS, 2), int)
    rows_P, columns_P = torch.arange(SIZE).repeat_interleave(SIZE), torch.arange(SIZE).repeat(SIZE)
    for b in range(B):
        for o in range(NUM_DETECTIONS):
            mask, place = divmod(int(strength_BMP[b].argmax()), SIZE * SIZE)
            if strength_BMP[b, mask, place] <= 0:
                break
            fit = fit_BKMP[b, color_BMP[b, mask, place], mask, place]
            exists[b, o] = ((fit - 0.35) / 0.4).clamp(0, 1)
            centers[b, o] = place // SIZE, place % SIZE
            far_P = torch.maximum(
                (rows_P - centers[b, o, 0]).abs(), (columns_P - centers[b, o, 1]).abs()
            )
            left_KMP = ((fit - fit_BKMP[b]) * norm_KM1).clamp(min=0)
            near_KM = (gain_BKMP[b] - left_KMP / 2)[:, :, far_P <= 1].amax(2)
            near = (near_KM.T.reshape(-1) / TEMPERATURE).softmax(0)
            odds[b, o] = near.reshape(odds.shape[2:]).numpy()
            for other, (_, size) in enumerate(KEYS):
                reach = (PIXELS[KEYS[mask][1]] + PIXELS[size]) // 2
                strength_BMP[b, other, far_P < reach] = 0
    return Detections(*(torch.from_numpy(array) for array in (exists, odds, centers)))

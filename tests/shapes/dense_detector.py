"""The detector written plainly: every quantity at every place.

An oracle for `flowloom.shapes.detector.detect`, and the measure of its speed.

Shapes: B pictures, S shapes, Z sizes, K colours, M = S * Z masks, P = 1024 places, O detections.
"""

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
    rows_P, columns_P = torch.arange(SIZE).repeat_interleave(SIZE), torch.arange(SIZE).repeat(SIZE)
    sizes_M = torch.tensor([PIXELS[size] for _, size in KEYS])
    reach_MM = (sizes_M[:, None] + sizes_M) // 2
    every = torch.arange(B)
    exists, odds, centers = [], [], []
    for _ in range(NUM_DETECTIONS):
        best_B = strength_BMP.flatten(1).argmax(1)
        mask_B, place_B = best_B // (SIZE * SIZE), best_B % (SIZE * SIZE)
        row_B, column_B = rows_P[place_B], columns_P[place_B]
        found_B = strength_BMP[every, mask_B, place_B] > 0
        fit_B = fit_BKMP[every, color_BMP[every, mask_B, place_B], mask_B, place_B]
        exists.append(((fit_B - 0.35) / 0.4).clamp(0, 1) * found_B)
        centers.append(torch.stack([row_B, column_B], 1))
        far_BP = torch.maximum(
            (rows_P - row_B[:, None]).abs(), (columns_P - column_B[:, None]).abs()
        )
        places_BR = (far_BP <= 1).float().topk(9, 1).indices
        outside = far_BP.gather(1, places_BR) > 1
        places = places_BR[:, None, None].expand(-1, K, M, -1)
        left = ((fit_B[:, None, None, None] - fit_BKMP.gather(3, places)) * norm_KM1).clamp(min=0)
        near = gain_BKMP.gather(3, places) - left / 2
        near_BKM = near.masked_fill(outside[:, None, None], -1e9).amax(3)
        odds_BMK = (near_BKM.flatten(1) / TEMPERATURE).softmax(1).reshape(B, K, M).mT
        odds.append(odds_BMK.reshape(B, len(SHAPES), len(SIZES), K))
        hidden_BMP = far_BP[:, None] < reach_MM[mask_B][:, :, None]
        strength_BMP = strength_BMP.masked_fill(hidden_BMP, 0.0)
    return Detections(*(torch.stack(columns, 1) for columns in (exists, odds, centers)))

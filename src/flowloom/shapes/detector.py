"""What is on a picture, and how well it answers a prompt: templates, graded score, crispness.

Every shape, size and colour of the world is a template T (mask times colour minus background). With
p the picture minus the background, at one place:

    explained energy  G = 2 <p, T> - |T|^2
    fit               q = (2 <p, T> - E) / |T|^2,   E = energy of p in the mask grown by 1 px

The best place is where G * q^2 is largest (G alone sees one large square in four small ones); its
neighbourhood is suppressed and the next is taken, `NUM_DETECTIONS` times. No gradients; a picture's
result does not depend on its batch.

Shapes: B pictures, M = 8 masks (shape x size), K = 8 colours, P = 1024 places, O detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.shapes.drawing import BACKGROUND, MASKS, PALETTE, PIXELS, SIZE
from flowloom.shapes.prompts import COLORS, SHAPES, SIZES, PromptSpec, ShapeObject

NUM_DETECTIONS = 8
TEMPERATURE = 3.0
_KEYS = [(shape, size) for shape in SHAPES for size in SIZES]


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found on a batch of pictures, strongest first."""

    exists_BO: Tensor
    """Degree of existence in [0, 1]: clamp((q - .35) / .4)."""
    attributes_BOSZK: Tensor
    """Probabilities over shape, size and colour of each detection; sum to 1."""
    centers_BO2: Tensor
    """Row and column of the centre, pixels."""


@cache
def _templates() -> tuple[Tensor, ...]:
    """Masks `[M, 1, 13, 13]`, grown masks, pixels `[M]`, colours minus background `[K, 3]`."""
    masks = np.zeros((len(_KEYS), 1, 13, 13), np.float32)
    for index, key in enumerate(_KEYS):
        half = PIXELS[key[1]] // 2
        masks[index, 0, 6 - half : 7 + half, 6 - half : 7 + half] = MASKS[key]
    masks = torch.from_numpy(masks)
    grown = F.max_pool2d(masks, 3, stride=1, padding=1)
    tints = torch.tensor([PALETTE[color] for color in COLORS]) - BACKGROUND
    return masks, grown, masks.sum((1, 2, 3)), tints


@cache
def _reach() -> Tensor:
    """`[M, M]` centre distance in pixels below which one mask hides another."""
    sizes = torch.tensor([PIXELS[size] for _, size in _KEYS])
    return (sizes[:, None] + sizes[None, :]) // 2


def to_native(images_BCHW: Tensor) -> Tensor:
    """Pictures at 32 x 32: averaged over areas when larger in both sides, else bilinear."""
    height, width = images_BCHW.shape[-2:]
    if (height, width) == (SIZE, SIZE):
        return images_BCHW
    if height >= SIZE and width >= SIZE:
        return F.interpolate(images_BCHW, size=(SIZE, SIZE), mode="area")
    return F.interpolate(images_BCHW, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


@torch.no_grad()
def detect(images_BCHW: Tensor) -> Detections:
    """Find up to `NUM_DETECTIONS` objects on pictures in [-1, 1]."""
    masks, grown, pixels_M, tints_K3 = _templates()
    p = to_native(images_BCHW.float()) - BACKGROUND
    B, M, K = len(p), len(_KEYS), len(COLORS)
    channels = F.conv2d(p.reshape(B * 3, 1, SIZE, SIZE), masks, padding=6)
    channels = channels.reshape(B, 3, M * SIZE * SIZE)
    energy_BMP = F.conv2d(p.square().sum(1, keepdim=True), grown, padding=6).flatten(2)
    inner_BKMP = (tints_K3 @ channels).reshape(B, K, M, SIZE * SIZE)
    norm_KM1 = (tints_K3.square().sum(1)[:, None] * pixels_M)[..., None]
    gain_BKMP = 2 * inner_BKMP - norm_KM1
    fit_BKMP = (2 * inner_BKMP - energy_BMP[:, None]) / norm_KM1
    # Where either is negative the product would be meaningless or turn positive.
    strength_BMP, color_BMP = (gain_BKMP.clamp(min=0) * fit_BKMP.clamp(min=0).square()).max(1)

    rows_P = torch.arange(SIZE).repeat_interleave(SIZE)
    columns_P = torch.arange(SIZE).repeat(SIZE)
    reach_MM = _reach()
    picture_B = torch.arange(B)
    gain_BKMYX = F.pad(gain_BKMP.reshape(B, K, M, SIZE, SIZE), (1, 1, 1, 1), value=-1e9)
    near = torch.tensor([-1, 0, 1])
    exists, attributes, centers = [], [], []
    for _ in range(NUM_DETECTIONS):
        best_B = strength_BMP.flatten(1).argmax(1)
        mask_B, place_B = best_B // (SIZE * SIZE), best_B % (SIZE * SIZE)
        row_B, column_B = rows_P[place_B], columns_P[place_B]
        found_B = strength_BMP[picture_B, mask_B, place_B] > 0
        fit_B = fit_BKMP[picture_B, color_BMP[picture_B, mask_B, place_B], mask_B, place_B]
        exists.append(((fit_B - 0.35) / 0.4).clamp(0, 1) * found_B)
        window = gain_BKMYX[
            picture_B[:, None, None],
            :,
            :,
            (row_B[:, None] + 1 + near)[:, :, None],
            (column_B[:, None] + 1 + near)[:, None, :],
        ]
        logits_BKM = window.amax((1, 2)) / TEMPERATURE
        odds_BMK = logits_BKM.flatten(1).softmax(1).reshape(B, K, M).mT
        attributes.append(odds_BMK.reshape(B, len(SHAPES), len(SIZES), K))
        centers.append(torch.stack([row_B, column_B], 1))
        distance_BP = torch.maximum(
            (rows_P - row_B[:, None]).abs(), (columns_P - column_B[:, None]).abs()
        )
        strength_BMP = strength_BMP.masked_fill(
            distance_BP[:, None] < reach_MM[mask_B][:, :, None], 0.0
        )
    return Detections(torch.stack(exists, 1), torch.stack(attributes, 1), torch.stack(centers, 1))


def _match(found: Detections, row: int, item: ShapeObject) -> np.ndarray:
    """`[O]` probability that each detection of one picture is what a noun phrase names."""
    odds_OSZK = found.attributes_BOSZK[row, :, SHAPES.index(item.shape)]
    if item.size:
        odds_OSZK = odds_OSZK[:, SIZES.index(item.size), None]
    if item.color:
        odds_OSZK = odds_OSZK[..., COLORS.index(item.color), None]
    return odds_OSZK.sum((1, 2)).numpy()


def _relation(relation: str | None, centers_O2: np.ndarray) -> np.ndarray:
    """`[O, O]` degree to which i lies on the named side of j: clamp((along - across) / 4)."""
    if relation is None:
        return np.ones((len(centers_O2),) * 2)
    down, right = (centers_O2[None, :, axis] - centers_O2[:, None, axis] for axis in (0, 1))
    along = {"left": right, "right": -right, "above": down, "below": -down}[relation]
    across = np.abs(down if relation in ("left", "right") else right)
    return np.clip((along - across) / 4, 0, 1)


def _grade(found: Detections, row: int, spec: PromptSpec) -> float:
    exists_O = found.exists_BO[row].numpy().astype(float)
    matches = [exists_O * _match(found, row, item) for item in spec.objects]
    wanted = sum(item.count for item in spec.objects)
    if spec.kind == "counting":
        count = matches[0].sum()
        extra = exists_O.sum() - count
        return float(np.exp(-((count - wanted) ** 2) / 0.4) / (1 + extra))
    extra = max(0.0, exists_O.sum() - wanted)
    if len(matches) == 1:
        return float(matches[0].max() / (1 + extra))
    first, second = matches[0][:, None], matches[1][None, :]
    pairs = 0.2 * (first + second) / 2 + 0.8 * first * second
    pairs = pairs * (0.2 + 0.8 * _relation(spec.relation, found.centers_BO2[row].numpy()))
    np.fill_diagonal(pairs, 0.0)
    return float(pairs.max() / (1 + extra))


def score(images_BCHW: Tensor, specs: Sequence[PromptSpec]) -> Tensor:
    """Faithfulness in [0, 1] of each picture to its prompt, `[B]` float32.

    One object: its existence times the probability of what is named. Two: .2 mean + .8 product of
    both, the best assignment, times .2 + .8 * relation. Counting: exp(-(soft count - n)^2 / .4).
    Extra objects divide by 1 + their sum.

    Raises:
        ValueError: Numbers of pictures and prompts differ.
    """
    if len(images_BCHW) != len(specs):
        raise ValueError(f"specs: got {len(specs)}, expected one per picture ({len(images_BCHW)})")
    found = detect(images_BCHW)
    return torch.tensor([_grade(found, row, spec) for row, spec in enumerate(specs)])


@torch.no_grad()
def crispness(images_BCHW: Tensor) -> Tensor:
    """How pure the colours are, in [0, 1], `[B]`: energy-weighted mean of exp(-d^2 / .15).

    d is a pixel's distance to the nearest of background and palette; the energy is its squared
    distance from the background. An empty picture has no energy and scores 0.
    """
    p = to_native(images_BCHW.float()).flatten(2) - BACKGROUND
    tints_K3 = torch.cat([torch.zeros(1, 3), _templates()[3]])
    energy_BP = p.square().sum(1)
    inner_BKP = tints_K3 @ p
    distances_BKP = energy_BP[:, None] - 2 * inner_BKP + tints_K3.square().sum(1)[:, None]
    purity_BP = torch.exp(-distances_BKP.amin(1).clamp(min=0) / 0.15)
    total_B = energy_BP.sum(1)
    return (energy_BP * purity_BP).sum(1) / total_B.clamp(min=1e-6)

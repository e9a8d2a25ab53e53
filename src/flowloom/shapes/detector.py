"""What is on a picture, and how well it answers a prompt: templates, graded score, crispness.

Every shape, size and colour of the world is a template T (mask times colour minus background). With
p the picture minus the background, at one place:

    explained energy  G = 2 <p, T> - |T|^2
    fit               q = (2 <p, T> - E) / |T|^2,   E = energy of p in the mask grown by 1 px

The best place is where G * q^2 is largest (G alone sees one large square in four small ones); its
neighbourhood is suppressed and the next is taken, `NUM_DETECTIONS` times. Objects may stand
anywhere, but G > 0 and q > 0 hold at about a twentieth of the places and masks, and only a bound
that needs no colour is computed at all of them. No gradients. Every sum over pixels is made alike
for one picture and for many, so a picture's result does not depend on its batch.

Shapes: B pictures, S shapes, Z sizes, K colours, M = Z * S masks, A = S * Z * K; C channels,
P = 1024 places, Q = Z * P; O detections; N masks at places of a batch within the bounds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowloom.shapes.drawing import BACKGROUND, MASKS, PALETTE, PIXELS, SIZE, Placed
from flowloom.shapes.prompts import COLORS, SHAPES, SIZES, PromptSpec, ShapeObject

NUM_DETECTIONS = 8
TEMPERATURE = 3.0
"""Of the probabilities, in units of G; noise of sd s on every value has one of 2 s^2."""
MIN_EXISTENCE = 0.5
BATCH_SIZE = 32
"""Pictures whose tensors are held at once; changes no result."""
SLACK = 0.01
"""Of the bounds, for rounding."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found on a batch of pictures, strongest first."""

    exists_BO: Tensor
    """Degree of existence in [0, 1]: clamp((q - .35) / .4); 0 where nothing is left to find."""
    attributes_BOSZK: Tensor
    """Probabilities over shape, size and colour of each detection; sum to 1."""
    centers_BO2: Tensor
    """Row and column of the centre, pixels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """One object seen on a picture."""

    placed: Placed
    """The most probable shape, colour and size, its place and its box."""
    existence: float
    """Degree of existence in [0, 1]: how much of the picture around it the object explains."""
    probability: float
    """Of just this shape, colour and size together."""
    probabilities_SZK: np.ndarray
    """Over shape, size and colour, in the order of `SHAPES`, `SIZES`, `COLORS`; sum to 1."""


@dataclasses.dataclass(frozen=True)
class _Templates:
    """The world's masks and colours as tensors."""

    masks_M1YX: Tensor
    """Binary masks in float32, each in the middle of 11 x 11 pixels."""
    grown_M1YX: Tensor
    """The same, grown by 1 px, in 13 x 13."""
    pixels_M: Tensor
    """Pixels of each mask."""
    tints_K3: Tensor
    """Colours minus background."""
    norms_KM: Tensor
    """|T|^2."""


@cache
def _templates() -> _Templates:
    side = max(PIXELS.values())
    masks_M1YX = torch.zeros(len(SIZES) * len(SHAPES), 1, side, side)
    for index, (size, shape) in enumerate(itertools.product(SIZES, SHAPES)):
        edge = (side - PIXELS[size]) // 2
        inside = slice(edge, side - edge)
        masks_M1YX[index, 0, inside, inside] = torch.from_numpy(MASKS[shape, size]).float()
    pixels_M = masks_M1YX.sum((1, 2, 3))
    tints_K3 = torch.tensor([PALETTE[color] for color in COLORS]) - BACKGROUND
    return _Templates(
        masks_M1YX=masks_M1YX,
        grown_M1YX=F.max_pool2d(F.pad(masks_M1YX, (1, 1, 1, 1)), 3, stride=1, padding=1),
        pixels_M=pixels_M,
        tints_K3=tints_K3,
        norms_KM=tints_K3.square().sum(1)[:, None] * pixels_M,
    )


@cache
def _hides() -> Tensor:
    """`[Q, Q]` whether an object at one size and place leaves no room for one at another."""
    axis = torch.arange(SIZE)
    rows_P, columns_P = axis.repeat_interleave(SIZE), axis.repeat(SIZE)
    apart_PP = torch.maximum(
        (rows_P[:, None] - rows_P).abs(), (columns_P[:, None] - columns_P).abs()
    )
    blocks = [[apart_PP < (PIXELS[a] + PIXELS[b]) // 2 for b in SIZES] for a in SIZES]
    return torch.cat([torch.cat(line, 1) for line in blocks])


def to_native(images_BCHW: Tensor) -> Tensor:
    """Pictures at 32 x 32: averaged over areas when larger in both sides, else bilinear."""
    height, width = images_BCHW.shape[-2:]
    if (height, width) == (SIZE, SIZE):
        return images_BCHW
    if height >= SIZE and width >= SIZE:
        return F.interpolate(images_BCHW, size=(SIZE, SIZE), mode="area")
    return F.interpolate(images_BCHW, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def find(images_BCHW: Tensor, min_existence: float = MIN_EXISTENCE) -> list[list[Found]]:
    """The objects on each picture, strongest first.

    Args:
        images_BCHW: Pictures in [-1, 1].
        min_existence: Detections that exist to a lesser degree are left out.

    Raises:
        FloatingPointError: A picture is not finite.
    """
    seen = detect(images_BCHW)
    exists_BO = seen.exists_BO.tolist()
    kept_BO = ((seen.exists_BO > 0) & (seen.exists_BO >= min_existence)).tolist()
    odds_BOA = seen.attributes_BOSZK.flatten(2)
    best_BO = odds_BOA.argmax(2).tolist()
    centers_BO2 = seen.centers_BO2.tolist()
    sizes = (len(SHAPES), len(SIZES), len(COLORS))

    def one(b: int, o: int) -> Found:
        shape, size, color = np.unravel_index(best_BO[b][o], sizes)
        row, column = centers_BO2[b][o]
        return Found(
            placed=Placed(SHAPES[shape], COLORS[color], SIZES[size], row, column),
            existence=exists_BO[b][o],
            probability=float(odds_BOA[b, o, best_BO[b][o]]),
            probabilities_SZK=seen.attributes_BOSZK[b, o].numpy(),
        )

    return [[one(b, o) for o, keep in enumerate(kept) if keep] for b, kept in enumerate(kept_BO)]


@torch.no_grad()
def detect(images_BCHW: Tensor) -> Detections:
    """Find up to `NUM_DETECTIONS` objects on pictures in [-1, 1].

    Raises:
        FloatingPointError: A picture is not finite.
    """
    p_BCYX = to_native(images_BCHW.float()) - BACKGROUND
    energy_BYX = p_BCYX.square().sum(1)
    if not energy_BYX.isfinite().all():
        bad = int((~energy_BYX.isfinite()).flatten(1).any(1).nonzero()[0])
        raise FloatingPointError(f"detector: picture {bad} of the batch is not finite")
    parts = [_detect(p_BCYX[i : i + BATCH_SIZE]) for i in range(0, max(len(p_BCYX), 1), BATCH_SIZE)]
    return Detections(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _detect(p_BCYX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Detections` for one batch."""
    known = _templates()
    half = known.masks_M1YX.shape[-1] // 2
    pixels = p_BCYX.reshape(-1, 1, SIZE, SIZE)
    # Beyond the edge p is 0, the background.
    sums_BCMP = F.conv2d(pixels, known.masks_M1YX, padding=half).flatten(2)
    sums_BCMP = sums_BCMP.reshape(len(p_BCYX), 3, *sums_BCMP.shape[1:])
    energy_B1YX = p_BCYX.square().sum(1, keepdim=True)
    energy_BMP = F.conv2d(energy_B1YX, known.grown_M1YX, padding=half + 1).flatten(2)
    strength_BQ, fit_BQ = _strongest(sums_BCMP, energy_BMP)
    fit_OB, exists_OB, places_OB = [], [], []
    for _ in range(NUM_DETECTIONS):
        value_B, best_B = strength_BQ.max(1)
        fit_B = fit_BQ.gather(1, best_B[:, None])[:, 0]
        fit_OB.append(fit_B)
        exists_OB.append(((fit_B - 0.35) / 0.4).clamp(0, 1) * (value_B > 0))
        places_OB.append(best_B % (SIZE * SIZE))
        strength_BQ.masked_fill_(_hides()[best_B], 0.0)
    places_BO = torch.stack(places_OB, 1)
    centers_BO2 = torch.stack([places_BO // SIZE, places_BO % SIZE], 2)
    odds = _attributes(sums_BCMP, energy_BMP, centers_BO2, torch.stack(fit_OB, 1))
    return torch.stack(exists_OB, 1), odds, centers_BO2


def _strongest(sums_BCMP: Tensor, energy_BMP: Tensor) -> tuple[Tensor, Tensor]:
    """G * q^2 and q of the best shape and colour at each size and place, `[B, Q]`; 0 where none is.

    With c the sums of p under a mask of n pixels, <p, T> = <c, tint> <= |c| |tint|. So G > 0 needs
    2 |c| > |tint| n and q > 0 needs 2 |c| |tint| > E: bounds that spare most places the colours.
    """
    known = _templates()
    lengths_K = known.tints_K3.square().sum(1)
    needed_M1 = lengths_K.min() * known.pixels_M.square()[:, None] / 4 * (1 - SLACK)
    squares_BMP = sums_BCMP.square().sum(1)
    at_N = (squares_BMP > needed_M1).flatten().nonzero()[:, 0]
    energy_N = energy_BMP.flatten()[at_N]
    bound_N = squares_BMP.flatten()[at_N] * (4 * lengths_K.max() * (1 + SLACK))
    kept = bound_N > energy_N.square()
    at_N, energy_N = at_N[kept], energy_N[kept]

    _, num_masks, num_places = energy_BMP.shape
    picture_N, rest_N = at_N // (num_masks * num_places), at_N % (num_masks * num_places)
    red_N, green_N, blue_N = sums_BCMP.flatten(2)[picture_N, :, rest_N].unbind(1)
    r_K1, g_K1, b_K1 = 2 * known.tints_K3.T[:, :, None]
    twice_KN = r_K1 * red_N + g_K1 * green_N + b_K1 * blue_N
    norm_KN = known.norms_KM[:, rest_N // num_places]
    fit_KN = (twice_KN - energy_N) / norm_KN
    # Where either is negative the product would be meaningless or turn positive.
    gain_KN = (twice_KN - norm_KN).clamp(min=0)
    strength_N, color_N = (gain_KN * fit_KN.clamp(min=0).square()).max(0)

    strength_BMP, fit_BMP = torch.zeros_like(energy_BMP), torch.zeros_like(energy_BMP)
    strength_BMP.view(-1)[at_N] = strength_N
    fit_BMP.view(-1)[at_N] = fit_KN.gather(0, color_N[None])[0]
    by_size = (len(energy_BMP), len(SIZES), len(SHAPES), num_places)
    strength_BZP, shape_BZP = strength_BMP.reshape(by_size).max(2)
    fit_BZP = fit_BMP.reshape(by_size).gather(2, shape_BZP[:, :, None])[:, :, 0]
    return strength_BZP.flatten(1), fit_BZP.flatten(1)


def _attributes(
    sums_BCMP: Tensor, energy_BMP: Tensor, centers_BO2: Tensor, fit_BO: Tensor
) -> Tensor:
    """`[B, O, S, Z, K]` softmax of (G - L / 2) / `TEMPERATURE`, the best within 1 px.

    L = max(0, q_found - q) |T|^2 is what T leaves over beyond the object that was found there: by G
    alone a large shape profits from the neighbours of a small one.
    """
    known = _templates()
    num_pictures, _, num_masks, _ = sums_BCMP.shape
    num_found = centers_BO2.shape[1]
    near = torch.tensor([-1, 0, 1])
    # Beyond the edge the edge itself is looked at once more, which changes no maximum.
    rows_BO31 = (centers_BO2[..., 0, None] + near).clamp(0, SIZE - 1)[..., :, None]
    columns_BO13 = (centers_BO2[..., 1, None] + near).clamp(0, SIZE - 1)[..., None, :]
    places_B1R = (rows_BO31 * SIZE + columns_BO13).flatten(1)[:, None]
    sums = sums_BCMP.flatten(1, 2).gather(2, places_B1R.expand(-1, 3 * num_masks, -1))
    shape = (num_pictures, 1, num_masks, num_found, 9)
    red, green, blue = (part.reshape(shape) for part in sums.chunk(3, 1))
    energy_B1MO9 = energy_BMP.gather(2, places_B1R.expand(-1, num_masks, -1)).reshape(shape)
    r, g, b = 2 * known.tints_K3.T[:, :, None, None, None]
    twice_BKMO9 = r * red + g * green + b * blue
    norms_KM11 = known.norms_KM[..., None, None]
    found_B11O1 = fit_BO[:, None, None, :, None]
    left_BKMO9 = (found_B11O1 * norms_KM11 + energy_B1MO9 - twice_BKMO9).clamp(min=0)
    gain_BKMO = (twice_BKMO9 - left_BKMO9 / 2).amax(-1) - norms_KM11[..., 0]
    gain_BKZSO = gain_BKMO.unflatten(2, (len(SIZES), len(SHAPES)))
    gain_BOSZK = gain_BKZSO.permute(0, 4, 3, 2, 1)
    return (gain_BOSZK.flatten(2) / TEMPERATURE).softmax(2).reshape(gain_BOSZK.shape)


@cache
def _named(item: ShapeObject) -> np.ndarray:
    """`[A]` 1 where a combination of shape, size and colour is what a noun phrase names."""
    holds = np.ones((len(SHAPES), len(SIZES), len(COLORS)))
    holds *= np.array([item.shape == shape for shape in SHAPES])[:, None, None]
    holds *= np.array([item.size in (None, size) for size in SIZES])[:, None]
    holds *= np.array([item.color in (None, color) for color in COLORS])
    return holds.ravel()


@cache
def _assignments(num_phrases: int) -> np.ndarray:
    """`[number, num_phrases]` every way to give each noun phrase a detection of its own."""
    return np.array(list(itertools.permutations(range(NUM_DETECTIONS), num_phrases)))


_SIDES = {"left": (1, 1.0), "right": (1, -1.0), "above": (0, 1.0), "below": (0, -1.0)}
"""Relation to axis and sign: the first object's coordinate is smaller, times the sign."""


def _relation(relations: Sequence[str], exists_BO: np.ndarray, centers_BO2: np.ndarray):
    """`[B, O, O]` degree to which i lies on the named side of j: clamp((along - across) / 4)."""
    axes = np.array([_SIDES[name][0] for name in relations])
    signs = np.array([_SIDES[name][1] for name in relations])
    apart_BOO2 = centers_BO2[:, None, :] - centers_BO2[:, :, None]
    rows = np.arange(len(axes))
    along_BOO = apart_BOO2[rows, :, :, axes] * signs[:, None, None]
    across_BOO = np.abs(apart_BOO2[rows, :, :, 1 - axes])
    degree_BOO = np.clip((along_BOO - across_BOO) / 4, 0, 1)
    seen_BO = exists_BO > 0
    return degree_BOO * seen_BO[:, :, None] * seen_BO[:, None, :]


def grade(found: Detections, specs: Sequence[PromptSpec]) -> Tensor:
    """Faithfulness in [0, 1] of what was found on each picture to its prompt; see `score`."""
    exists_BO = found.exists_BO.double().numpy()
    odds_BOA = found.attributes_BOSZK.flatten(2).double().numpy()
    centers_BO2 = found.centers_BO2.numpy()
    wanted_B = np.array([sum(item.count for item in spec.objects) for spec in specs], float)
    total_B = exists_BO.sum(1)
    score_B = np.zeros(len(specs))
    groups: dict[tuple[bool, int, bool], list[int]] = {}
    for row, spec in enumerate(specs):
        group = (spec.kind == "counting", len(spec.objects), spec.relation is not None)
        groups.setdefault(group, []).append(row)
    for (counting, num_phrases, related), rows in groups.items():
        named = np.array([[_named(item) for item in specs[row].objects] for row in rows])
        match_BJO = (named[:, :, None] * odds_BOA[rows][:, None]).sum(3) * exists_BO[rows][:, None]
        if counting:
            count_B = match_BJO[:, 0].sum(1)
            extra_B = (total_B[rows] - count_B).clip(min=0)
            score_B[rows] = np.exp(-((count_B - wanted_B[rows]) ** 2) / 0.4) / (1 + extra_B)
            continue
        ways = _assignments(num_phrases)
        match_BNJ = match_BJO[:, np.arange(num_phrases), ways]
        value_BN = 0.2 * match_BNJ.mean(2) + 0.8 * match_BNJ.prod(2)
        if related:
            names = [specs[row].relation or "" for row in rows]
            degree_BOO = _relation(names, exists_BO[rows], centers_BO2[rows])
            value_BN = value_BN * (0.2 + 0.8 * degree_BOO[:, ways[:, 0], ways[:, 1]])
        extra_B = (total_B[rows] - wanted_B[rows]).clip(min=0)
        score_B[rows] = value_BN.max(1) / (1 + extra_B)
    return torch.from_numpy(score_B).float()


def score(images_BCHW: Tensor, specs: Sequence[PromptSpec]) -> Tensor:
    """Faithfulness in [0, 1] of each picture to its prompt, `[B]` float32.

    One, two or three noun phrases: the best assignment of detections to phrases, .2 mean + .8
    product of existence times the probability of what is named; times .2 + .8 * relation where
    there is one. Counting: exp(-(soft count - n)^2 / .4). Extra objects divide by 1 + their sum.

    Raises:
        ValueError: Numbers of pictures and prompts differ.
        FloatingPointError: A picture is not finite.
    """
    if len(images_BCHW) != len(specs):
        raise ValueError(f"specs: got {len(specs)}, expected one per picture ({len(images_BCHW)})")
    return grade(detect(images_BCHW), specs)


@torch.no_grad()
def crispness(images_BCHW: Tensor) -> Tensor:
    """How pure the colours are, in [0, 1], `[B]`: energy-weighted mean of exp(-d^2 / .15).

    d is a pixel's distance to the nearest of background and palette; the energy is its squared
    distance from the background. An empty picture has no energy and scores 0.
    """
    p = to_native(images_BCHW.float()).flatten(2) - BACKGROUND
    tints_K3 = torch.cat([torch.zeros(1, 3), _templates().tints_K3])
    energy_BP = p.square().sum(1)
    inner_BKP = tints_K3 @ p
    distances_BKP = energy_BP[:, None] - 2 * inner_BKP + tints_K3.square().sum(1)[:, None]
    purity_BP = torch.exp(-distances_BKP.amin(1).clamp(min=0) / 0.15)
    total_B = energy_BP.sum(1)
    return (energy_BP * purity_BP).sum(1) / total_B.clamp(min=1e-6)

"""How different pictures of a prompt are, and the intervals of that.

Facts pinned here:
- Distances of hand-made features: over all pairs, over pairs that satisfy, and the wrong part.
- Equal pictures have diversity 0; the expected value is the same for any number of seeds; a base
  against itself has the ratio 1.
- A prompt with fewer than two satisfying pictures on either side counts on neither.
- Bootstrap intervals have the width that normal theory gives, and a ratio's are paired.
- Features of the shapes world: 1 for an object moved far, .6 for one moved by a cell, .58 for one
  of another colour, 0 for noise, and the order of objects does not matter.
- A pyramid's distances are root mean squares of cells of 4 and of 8 pixels, by hand.
- Errors to clean drawings: 0 on what was drawn, by hand elsewhere.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from flowloom.generator.diversity import diversity
from flowloom.generator.intervals import mean_interval, ratio_interval, standard_error
from flowloom.generator.picture_facts import look_at_shapes, object_maps, pyramid
from flowloom.score.rubric import get_rubric
from flowloom.shapes import detector
from flowloom.shapes.drawing import MASKS, PALETTE, Placed, draw
from flowloom.shapes.prompts import SHAPES, SIZES

REL_BOOTSTRAP = 0.1
ATOL_BLUR = 0.02
RED_CIRCLE = Placed("circle", "red", "large", 10, 10)


def features(*prompts):
    return np.array(prompts, float)


def picture(*objects):
    return torch.from_numpy(draw(objects))[None]


def test_distances_by_hand():
    points = features([[0, 0], [3, 4], [0, 8]], [[1, 1], [1, 1], [1, 2]])
    ok = np.array([[True, True, False], [True, True, True]])
    found = diversity(points, ok)
    # Distances 5, 8, 5 and 0, 1, 1.
    np.testing.assert_allclose(found.all_P, [6, 2 / 3])
    np.testing.assert_allclose(found.satisfied_P, [5, 2 / 3])
    np.testing.assert_allclose(found.wrong_P, [13 / 3, 0])


def test_fewer_than_two_have_no_diversity():
    points = features([[0.0], [1.0]], [[0.0], [1.0]])
    found = diversity(points, np.array([[True, False], [False, False]]))
    assert np.isnan(found.satisfied_P).all()
    np.testing.assert_allclose(found.wrong_P, found.all_P)
    assert np.isnan(diversity(points[:, :1], np.ones((2, 1), bool)).all_P).all()


def test_all_is_the_satisfied_and_the_wrong_part():
    rng = np.random.default_rng(0)
    points, ok = rng.normal(size=(20, 6, 3)), rng.random((20, 6)) < 0.6
    found = diversity(points, ok)
    share_P = np.array([sum(ok_S) * (sum(ok_S) - 1) / 30 for ok_S in ok.astype(int)])
    right_P = np.where(share_P > 0, share_P * np.nan_to_num(found.satisfied_P), 0)
    np.testing.assert_allclose(found.all_P, found.wrong_P + right_P)


def test_number_of_seeds_does_not_matter():
    points = np.random.default_rng(1).normal(size=(1, 6, 4))
    whole = diversity(points, np.ones((1, 6), bool)).all_P
    for size in (2, 3, 5):
        parts = [
            diversity(points[:, list(chosen)], np.ones((1, size), bool)).all_P
            for chosen in itertools.combinations(range(6), size)
        ]
        np.testing.assert_allclose(np.mean(parts), whole)


def test_equal_pictures_have_none():
    same = picture(RED_CIRCLE).expand(4, -1, -1, -1)
    maps_PSF = look_at_shapes(["a red circle"] * 4, same).features_BF[None]
    found = diversity(maps_PSF, np.ones((1, 4), bool))
    assert found.all_P == found.satisfied_P == 0


def test_ratio_by_hand():
    ours, theirs = np.array([1.0, 3.0, np.nan, 7.0]), np.array([2.0, 2.0, 9.0, np.nan])
    found = ratio_interval(ours, theirs)
    assert (found.mean, found.n) == (1.0, 2)
    assert (found.low, found.high) == (0.5, 1.5)


def test_ratio_is_paired():
    theirs = np.random.default_rng(2).uniform(0.1, 5, 50)
    same = ratio_interval(theirs, theirs)
    assert (same.mean, same.low, same.high, same.n) == (1, 1, 1, 50)
    half = ratio_interval(theirs / 2, theirs)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))


def test_ratio_without_a_base():
    nothing = ratio_interval(np.array([np.nan]), np.array([1.0]))
    assert nothing.n == 0
    assert np.isnan([nothing.mean, nothing.low, nothing.high]).all()
    zero = np.zeros(3)
    assert ratio_interval(zero, zero).mean == 1
    assert ratio_interval(zero + 1, zero).mean == np.inf
    # A quarter of the resamples have nothing to divide by.
    half = ratio_interval(np.ones(2), np.array([0.0, 1.0]))
    assert (half.mean, half.low, half.high) == (2, 1, np.inf)


def test_interval_of_a_mean_has_the_width_of_normal_theory():
    values = np.random.default_rng(3).normal(2, 3, 400)
    found = mean_interval(values)
    error = values.std(ddof=1) / 20
    assert standard_error(values) == pytest.approx(error)
    assert standard_error(np.append(values, np.nan)) == pytest.approx(error)
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1)
    assert standard_error(np.array([1.0])) == 0
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(1.96 * error, rel=REL_BOOTSTRAP)
    assert found.mean - found.low == pytest.approx(1.96 * error, rel=REL_BOOTSTRAP)


def maps_apart(first, second):
    seen = detector.detect(torch.cat([first, second]))
    return np.linalg.norm(np.subtract(*object_maps(seen)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 0),
        ({"row": 22, "column": 22}, 1),
        ({"color": "blue"}, 3**-0.5),
        ({"shape": "star"}, 3**-0.5),
        ({"size": "small"}, 3**-0.5),
        ({"shape": "star", "color": "blue"}, (2 / 3) ** 0.5),
    ],
)
def test_distance_of_one_change(change, expected):
    other = dataclasses.replace(RED_CIRCLE, **change)
    apart = maps_apart(picture(RED_CIRCLE), picture(other))
    assert apart == pytest.approx(expected, abs=ATOL_BLUR)


def test_an_object_more_is_half_a_move():
    second = Placed("star", "green", "small", 22, 22)
    apart = maps_apart(picture(RED_CIRCLE), picture(RED_CIRCLE, second))
    assert apart == pytest.approx(0.5**0.5, abs=ATOL_BLUR)


def test_noise_is_ignored_and_a_step_of_the_grid_is_not():
    clean = picture(RED_CIRCLE)
    generator = torch.Generator().manual_seed(0)
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
    moved = picture(dataclasses.replace(RED_CIRCLE, row=14))
    assert maps_apart(clean, noisy) < ATOL_BLUR
    # Two unit bumps of deviation 3 that are 4 pixels apart overlap by exp(-(4 / 3)^2 / 4).
    by_hand = (1 - np.exp(-((4 / 3) ** 2) / 4)) ** 0.5
    assert maps_apart(clean, moved) == pytest.approx(by_hand, abs=ATOL_BLUR)
    # A pyramid of means tells them less well apart.
    rows = pyramid([""] * 3, torch.cat([clean, noisy, moved])).features_BF
    near, far = (np.linalg.norm(rows[0] - rows[k]) for k in (1, 2))
    assert near > 0.1 * far


@pytest.mark.parametrize(("pixels", "expected"), [(2, 0), (4, 1), (8, 2**0.5), (32, 2**0.5)])
def test_pyramid_by_hand(pixels, expected):
    # A checkerboard of these squares, 1 and -1, against nothing: 4 and 8 pixels make a cell.
    places = torch.arange(32) // pixels
    board = 1.0 - 2 * ((places[:, None] + places) % 2)
    pair = torch.stack([board, torch.zeros(32, 32)])[:, None].expand(-1, 3, -1, -1)
    rows = pyramid(["", ""], pair).features_BF
    assert np.linalg.norm(rows[0] - rows[1]) == pytest.approx(expected, abs=1e-6)


def test_maps_of_a_mirrored_picture_are_mirrored():
    square = Placed("square", "red", "large", 10, 14)
    pair = torch.cat([picture(square), picture(dataclasses.replace(square, row=21))])
    maps_BKGG = object_maps(detector.detect(pair)).reshape(2, -1, 8, 8)
    np.testing.assert_allclose(maps_BKGG[1], maps_BKGG[0, :, ::-1], atol=1e-6)


def test_order_of_objects_does_not_matter():
    second = Placed("star", "green", "small", 22, 22)
    assert maps_apart(picture(RED_CIRCLE, second), picture(second, RED_CIRCLE)) < 1e-6


def tint_gap(first, second):
    return float(np.square(np.subtract(PALETTE[first], PALETTE[second])).sum())


def test_clean_drawings_have_no_error():
    for shape, size in itertools.product(SHAPES, SIZES):
        item = Placed(shape, "orange", size, 14, 18)
        facts = look_at_shapes([f"a {size} orange {shape}"], picture(item))
        assert facts.errors == {"shown": 0, "asked": 0}


def test_errors_by_hand():
    pixels = int(MASKS["circle", "large"].sum())
    pair = picture(RED_CIRCLE, Placed("star", "green", "small", 22, 22))
    # A blue one was asked for: every pixel of the disc has another colour.
    facts = look_at_shapes(["a large blue circle"], picture(RED_CIRCLE))
    assert facts.errors["shown"] == 0
    assert facts.errors["asked"] == pytest.approx(pixels * tint_gap("red", "blue") / 3072)
    # Nobody asked for the star: it should be background.
    star = int(MASKS["star", "small"].sum())
    too_much = look_at_shapes(["a red circle"], pair).errors["asked"]
    gone = float(np.square(np.subtract(PALETTE["green"], -0.7)).sum())
    assert too_much == pytest.approx(star * gone / 3072, rel=1e-5)
    # Colours it leaves open are as seen, in any order of the words.
    for text in ("a circle and a star", "a green star and a red circle"):
        assert look_at_shapes([text], pair).errors["asked"] == 0


def test_error_of_noise_is_its_variance():
    clean = picture(RED_CIRCLE)
    generator = torch.Generator().manual_seed(1)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    facts = look_at_shapes(["a red circle"], noisy)
    expected = float((noisy - clean).square().mean())
    for name in ("shown", "asked"):
        assert facts.errors[name] == pytest.approx(expected, rel=1e-5)


def test_likeness_by_hand():
    rubric = get_rubric("shapes-likeness")
    # A small red circle is missing, and then there.
    small = Placed("circle", "red", "small", 10, 10)
    pictures = [np.full((3, 32, 32), -0.7, np.float32), draw([small])]
    missing, there = rubric.score(["a small red circle"] * 2, pictures)
    gap = float(np.square(np.subtract(PALETTE["red"], -0.7)).sum()) * MASKS["circle", "small"].sum()
    assert there["score"] == 1
    assert missing["likeness"] == missing["score"] == pytest.approx(np.exp(-gap / 3072 / 0.03))


def test_an_empty_picture_lacks_what_was_asked_for():
    blank = torch.full((1, 3, 32, 32), -0.7)
    facts = look_at_shapes(["a small white square"], blank)
    assert facts.errors["shown"] == 0
    assert facts.errors["asked"] == pytest.approx(49 * 3 * 1.7**2 / 3072)
    # One of three is there; a small one, where the prompt says no size.
    one = picture(Placed("square", "white", "small", 14, 14))
    facts = look_at_shapes(["three white squares"], one)
    assert facts.errors["asked"] == pytest.approx(2 * 49 * 3 * 1.7**2 / 3072)


def test_objects_at_the_edge_are_redrawn_inside():
    cut = picture(dataclasses.replace(RED_CIRCLE, row=6)).roll(-4, 2)
    facts = look_at_shapes(["a red circle"], cut)
    assert np.isfinite(list(facts.errors.values())).all()

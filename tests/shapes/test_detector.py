"""The detector against pictures whose content is known.

Pinned: every object of drawn and of packed scenes is found exactly, none else; detections equal
those of the plain detector, also on noise; a picture's result is the same bits in any batch; clean
pictures of every kind score at least .99, noise and other prompts do not; scores by hand; the score
falls smoothly with damage; a picture that is not finite stops the run.
"""

import itertools

import numpy as np
import pytest
import torch

from flowloom.shapes import detector, drawing
from flowloom.shapes.drawing import PIXELS, Placed
from flowloom.shapes.prompts import COLORS, KINDS, SHAPES, SIZES, parse, sample_prompt
from tests.shapes import dense_detector

TOLERANCE = 1e-5


def compose(count, seed=0, **choices):
    rng = np.random.default_rng(seed)
    specs = [sample_prompt(rng, **choices) for _ in range(count)]
    return [drawing.compose(spec, rng) for spec in specs], specs


def paint(scenes):
    return torch.from_numpy(np.stack([drawing.draw(scene) for scene in scenes]))


def picture(*objects):
    """A picture from (shape, size, colour, row, column)."""
    return paint([[Placed(shape, color, size, y, x) for shape, size, color, y, x in objects]])


def packed(seed):
    """Up to 8 objects on any pixels, 1 px apart at least."""
    rng = np.random.default_rng(seed)
    scene = []
    for row, column in rng.integers(5, 27, (300, 2)).tolist():
        item = Placed(
            *(pool[int(rng.integers(len(pool)))] for pool in (SHAPES, COLORS, SIZES)), row, column
        )
        half = PIXELS[item.size] // 2
        free = all(
            max(abs(row - other.row), abs(column - other.column))
            > half + PIXELS[other.size] // 2 + 1
            for other in scene
        )
        if free and len(scene) < detector.NUM_DETECTIONS:
            scene.append(item)
    return scene


def graded(image, text):
    return detector.score(image, [parse(text)]).item()


def assert_exact(scenes):
    for scene, seen in zip(scenes, detector.find(paint(scenes)), strict=True):
        assert {item.placed for item in seen} == set(scene)
        assert len(seen) == len(scene)


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_of_a_drawing_is_found(kind):
    scenes, specs = compose(40, kinds=(kind,), size_frac=0.5)
    assert_exact(scenes)
    scores = detector.score(paint(scenes), specs)
    assert scores.min() > 0.99


def test_every_object_of_a_packed_scene_is_found():
    scenes = [packed(seed) for seed in range(50)]
    assert max(len(scene) for scene in scenes) >= 6
    assert_exact(scenes)
    rows = itertools.product((4, 12, 20), (5, 13, 21))
    places = list(rows)[:8]
    blocks = [
        [Placed(shape, color, "small", y, x) for y, x in places]
        for shape in SHAPES
        for color in COLORS
    ]
    assert_exact(blocks)


def test_a_neighbour_does_not_make_a_shape_large():
    # A large triangle at the orange square would explain the white one's edge as well.
    beside = [("square", "large", "white", 24, 24), ("square", "small", "orange", 14, 24)]
    small = [item for item in detector.find(picture(*beside))[0] if item.placed.color == "orange"]
    assert [item.placed for item in small] == [Placed("square", "orange", "small", 14, 24)]
    assert small[0].probability > 0.99


def test_detections_equal_those_of_the_plain_detector():
    scenes, _ = compose(16, seed=1)
    clean = paint(scenes)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(clean, 3, 1, 1)
    white = torch.ones(2, 3, 32, 32)
    for images in (clean, clean + 0.3 * noise, clean + 0.8 * noise, blurred, noise, white):
        plain, fast = dense_detector.detect(images), detector.detect(images)
        seen_BO = plain.exists_BO > 0
        assert torch.equal(plain.centers_BO2[seen_BO], fast.centers_BO2[seen_BO])
        torch.testing.assert_close(fast.exists_BO, plain.exists_BO, rtol=0, atol=TOLERANCE)
        odds, expected = (d.attributes_BOSZK[seen_BO] for d in (fast, plain))
        torch.testing.assert_close(odds, expected, rtol=0, atol=TOLERANCE)


def test_result_does_not_depend_on_the_batch():
    scenes, specs = compose(70, seed=6)
    images = paint(scenes)
    images = images + 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    together = detector.score(images, specs)
    alone = [detector.score(images[i : i + 1], specs[i : i + 1]) for i in range(len(specs))]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(len(specs), generator=torch.Generator().manual_seed(2))
    shuffled = detector.score(images[order], [specs[i] for i in order])
    assert torch.equal(shuffled, together[order])


def test_an_object_has_box_existence_and_probabilities():
    (star,) = detector.find(picture(("star", "large", "cyan", 6, 26)))[0]
    assert star.placed.box == (1, 21, 12, 32)
    assert star.existence == 1
    assert star.probability == pytest.approx(1, abs=1e-2)
    assert star.probabilities_SZK.shape == (len(SHAPES), len(SIZES), len(COLORS))
    assert star.probabilities_SZK.sum() == pytest.approx(1, abs=TOLERANCE)
    assert star.probabilities_SZK[3, 1, 5] == pytest.approx(star.probability)
    half = (0.5 * picture(("star", "large", "cyan", 6, 26)) + 0.5 * drawing.BACKGROUND).float()
    assert detector.find(half, min_existence=0.99) == [[]]
    assert detector.find(torch.zeros(0, 3, 32, 32)) == []


def test_scores_by_hand():
    one = picture(("circle", "small", "red", 10, 10))
    two = picture(("circle", "small", "red", 10, 10), ("star", "large", "blue", 22, 22))
    assert graded(one, "a circle") == pytest.approx(1, abs=1e-3)
    assert graded(one, "a red circle") == pytest.approx(1, abs=1e-3)
    assert graded(one, "a blue circle") == pytest.approx(0, abs=1e-3)
    assert graded(one, "a large circle") == pytest.approx(0, abs=1e-3)
    # One object too many halves the score.
    assert graded(two, "a circle") == pytest.approx(0.5, abs=1e-3)
    # Half of a pair is worth a tenth: .2 of the mean.
    assert graded(one, "a circle and a star") == pytest.approx(0.1, abs=1e-3)
    assert graded(two, "a circle and a square") == pytest.approx(0.1, abs=1e-2)
    assert graded(two, "a star and a circle") == pytest.approx(1, abs=1e-3)
    assert graded(two, "a blue star and a red circle") == pytest.approx(1, abs=1e-2)
    assert graded(two, "a blue circle and a red star") == pytest.approx(0, abs=1e-2)
    # One too few: exp(-1 / .4); a second object of another kind halves it.
    assert graded(one, "two circles") == pytest.approx(0.082, abs=1e-3)
    assert graded(two, "two circles") == pytest.approx(0.041, abs=1e-3)


def test_three_objects_by_hand():
    objects = [
        ("circle", "small", "red", 10, 10),
        ("star", "large", "blue", 22, 22),
        ("square", "small", "white", 10, 22),
    ]
    whole, pair = picture(*objects), picture(*objects[:2])
    # The order of the phrases is free.
    for names in itertools.permutations(("a circle", "a star", "a square")):
        assert graded(whole, f"{names[0]}, {names[1]} and {names[2]}") == pytest.approx(1, abs=1e-2)
    text = "a red circle and a blue star and a white square"
    assert graded(whole, text) == pytest.approx(1, abs=1e-2)
    # Two of three: .2 of their mean. Two colours exchanged: the mean of one.
    assert graded(pair, text) == pytest.approx(0.2 * 2 / 3, abs=1e-3)
    assert graded(whole, "a blue circle and a red star and a white square") == pytest.approx(
        0.2 / 3, abs=1e-3
    )
    # One too many halves it.
    more = picture(*objects, ("triangle", "small", "green", 27, 5))
    assert graded(more, text) == pytest.approx(0.5, abs=1e-2)


def test_relations_by_hand():
    # Diagonal pictures lie on no side: .2 of the relation remains.
    two = picture(("circle", "small", "red", 10, 10), ("star", "large", "blue", 22, 22))
    assert graded(two, "a circle left of a star") == pytest.approx(0.2, abs=1e-2)
    row = picture(("circle", "small", "red", 10, 6), ("star", "large", "blue", 10, 22))
    assert graded(row, "a circle left of a star") == pytest.approx(1, abs=1e-3)
    assert graded(row, "a star to the right of a disc") == pytest.approx(1, abs=1e-3)
    assert graded(row, "a circle above a star") == pytest.approx(0.2, abs=1e-3)
    column = picture(("circle", "small", "red", 6, 10), ("star", "large", "blue", 22, 10))
    assert graded(column, "a circle above a star") == pytest.approx(1, abs=1e-3)
    assert graded(column, "a circle below a star") == pytest.approx(0.2, abs=1e-3)
    # What is not there lies nowhere: .2 of the mean, .2 of the relation, wherever the other stands.
    for y, x in ((6, 22), (22, 6)):
        lonely = picture(("circle", "small", "red", y, x))
        for side in ("left of", "right of", "above", "below"):
            assert graded(lonely, f"a circle {side} a star") == pytest.approx(0.02, abs=1e-3)


def test_noise_and_other_prompts_score_nothing():
    scenes, specs = compose(100)
    images = paint(scenes)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert detector.score(noise, specs).mean() < 0.01
    order = np.random.default_rng(1).permutation(100)
    assert detector.score(images, [specs[i] for i in order]).mean() < 0.12


def test_four_squares_side_by_side_are_four():
    places = [(10, 10), (10, 18), (18, 10), (18, 18)]
    block = picture(*[("square", "small", "white", y, x) for y, x in places])
    assert graded(block, "four white squares") > 0.99
    assert graded(block, "a large white square") < 0.1


def test_score_falls_with_noise_and_blur():
    scenes, specs = compose(80, seed=5)
    images = paint(scenes)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    means = [detector.score(images + sd * noise, specs).mean().item() for sd in (0, 0.3, 0.5, 0.8)]
    assert means == sorted(means, reverse=True)
    assert means[1] > 0.9
    assert means[3] < 0.2
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    crisp = [detector.crispness(torch.lerp(images, blurred, w)).mean().item() for w in (0, 0.5, 1)]
    assert crisp == sorted(crisp, reverse=True)
    assert crisp[0] > 0.999
    assert crisp[2] < 0.7


def test_other_sizes_are_brought_to_native():
    rng = np.random.default_rng(7)
    spec = parse("a red circle and a blue square")
    images = torch.from_numpy(drawing.render(spec, rng, size=64))[None]
    assert detector.score(images, [spec]).item() > 0.99
    assert detector.to_native(torch.zeros(1, 3, 24, 40)).shape == (1, 3, 32, 32)


def test_empty_picture_is_neither_faithful_nor_crisp():
    empty = torch.full((1, 3, 32, 32), drawing.BACKGROUND)
    assert graded(empty, "a star") == 0
    assert detector.crispness(empty).item() == 0


def test_what_cannot_be_judged_is_named():
    with pytest.raises(ValueError, match="got 1, expected one per picture"):
        detector.score(torch.zeros(2, 3, 32, 32), [parse("a star")])
    images = torch.zeros(3, 3, 32, 32)
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="picture 1 of the batch is not finite"):
        detector.detect(images)

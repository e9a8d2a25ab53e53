"""The detector against pictures whose content is known.

Pinned: clean pictures score at least .9 each and .99 in the mean, noise and other prompts do not,
the score falls smoothly with damage, and a picture's result does not depend on its batch.
"""

import numpy as np
import pytest
import torch

from flowloom.shapes import detector, drawing
from flowloom.shapes.prompts import COLORS, SHAPES, SIZES, parse, sample_prompt


def draw(count, seed=0, **choices):
    rng = np.random.default_rng(seed)
    specs = [sample_prompt(rng, **choices) for _ in range(count)]
    return torch.from_numpy(np.stack([drawing.render(s, rng) for s in specs])), specs


def scene(*objects):
    """A picture from (shape, size, colour, row, column)."""
    picture = np.full((3, 32, 32), drawing.BACKGROUND, np.float32)
    for shape, size, color, y, x in objects:
        half = drawing.PIXELS[size] // 2
        window = picture[:, y - half : y + half + 1, x - half : x + half + 1]
        window[:, drawing.MASKS[shape, size]] = np.array(drawing.PALETTE[color])[:, None]
    return torch.from_numpy(picture)[None]


def graded(picture, text):
    return detector.score(picture, [parse(text)]).item()


def test_clean_pictures_score_one():
    images, specs = draw(400)
    scores = detector.score(images, specs)
    assert scores.mean() > 0.99
    assert scores.min() > 0.9
    assert detector.crispness(images).min() > 0.999


def test_noise_and_other_prompts_do_not():
    images, specs = draw(200)
    assert detector.score(torch.randn(images.shape), specs).mean() < 0.01
    order = np.random.default_rng(1).permutation(200)
    assert detector.score(images, [specs[i] for i in order]).mean() < 0.12


def test_detections_name_shape_size_color_and_place():
    placed = [
        ("star", "large", "cyan", 6, 26),
        ("square", "small", "orange", 22, 6),
        ("triangle", "large", "purple", 22, 22),
    ]
    found = detector.detect(scene(*placed))
    exists = found.exists_BO[0]
    assert (exists[:3] == 1).all()
    assert (exists[3:] < 0.01).all()
    seen = set()
    for rank in range(3):
        best = int(found.attributes_BOSZK[0, rank].argmax())
        shape, size, color = np.unravel_index(best, (len(SHAPES), len(SIZES), len(COLORS)))
        names = (SHAPES[shape], SIZES[size], COLORS[color])
        seen.add((*names, *found.centers_BO2[0, rank].tolist()))
    assert seen == set(placed)
    assert torch.allclose(found.attributes_BOSZK.sum((2, 3, 4)), torch.ones(1, 8))


def test_scores_by_hand():
    one = scene(("circle", "small", "red", 10, 10))
    two = scene(("circle", "small", "red", 10, 10), ("star", "large", "blue", 22, 22))
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
    # Diagonal pictures lie on no side: .2 of the relation remains.
    assert graded(two, "a circle left of a star") == pytest.approx(0.2, abs=1e-2)
    row = scene(("circle", "small", "red", 10, 6), ("star", "large", "blue", 10, 22))
    assert graded(row, "a circle left of a star") == pytest.approx(1, abs=1e-3)
    assert graded(row, "a star to the right of a disc") == pytest.approx(1, abs=1e-3)
    assert graded(row, "a circle above a star") == pytest.approx(0.2, abs=1e-3)


def test_four_squares_side_by_side_are_four():
    places = [(10, 10), (10, 18), (18, 10), (18, 18)]
    block = scene(*[("square", "small", "white", y, x) for y, x in places])
    assert graded(block, "four white squares") > 0.9
    assert graded(block, "a large white square") < 0.1


def test_score_falls_with_noise_and_blur():
    images, specs = draw(150, seed=5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    means = [detector.score(images + sd * noise, specs).mean().item() for sd in (0, 0.3, 0.5, 0.8)]
    assert means == sorted(means, reverse=True)
    assert means[1] > 0.9
    assert means[3] < 0.2
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    crisp = [detector.crispness(torch.lerp(images, blurred, w)).mean().item() for w in (0, 0.5, 1)]
    assert crisp == sorted(crisp, reverse=True)
    assert crisp[2] < 0.7


def test_result_does_not_depend_on_the_batch():
    images, specs = draw(40, seed=6)
    images = images + 0.4 * torch.randn(images.shape)
    together = detector.score(images, specs)
    alone = torch.cat([detector.score(images[i : i + 1], specs[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


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


def test_numbers_of_pictures_and_prompts_must_agree():
    with pytest.raises(ValueError, match="got 1, expected one per picture"):
        detector.score(torch.zeros(2, 3, 32, 32), [parse("a star")])

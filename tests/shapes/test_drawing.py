"""Clean pictures: pixels by hand, boxes apart, relations kept.

Pinned: pixel counts of the eight masks, centres 2 px off the patch borders, at least 1 px between
boxes.
"""

import numpy as np
import pytest

from flowloom.shapes import drawing
from flowloom.shapes.prompts import parse, sample_prompt


def test_masks_by_hand():
    rows = ["...#...", "...#...", "..###..", "#######", "..###..", "...#...", "...#..."]
    star = np.array([[c == "#" for c in row] for row in rows])
    assert (drawing.mask("star", 7) == star).all()
    counts = {key: int(m.sum()) for key, m in drawing.MASKS.items()}
    assert counts == {
        ("circle", "small"): 37,
        ("circle", "large"): 89,
        ("square", "small"): 49,
        ("square", "large"): 121,
        ("triangle", "small"): 31,
        ("triangle", "large"): 71,
        ("star", "small"): 17,
        ("star", "large"): 41,
    }
    with pytest.raises(ValueError, match="'hat'"):
        drawing.mask("hat", 7)


def test_one_square_pixel_by_pixel():
    picture = drawing.render(parse("a small red square"), np.random.default_rng(0))
    inside = (picture == np.float32(drawing.PALETTE["red"])[:, None, None]).all(0)
    outside = (picture == np.float32(drawing.BACKGROUND)).all(0)
    assert inside.sum() == 49
    assert (inside ^ outside).all()
    rows, columns = np.nonzero(inside)
    assert np.ptp(rows) == np.ptp(columns) == 6
    assert rows.mean() % 4 == columns.mean() % 4 == 2


def test_boxes_keep_apart_and_relations_hold():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        spec = sample_prompt(rng)
        placed = drawing.compose(spec, rng)
        boxes = np.array([item.box for item in placed])
        assert boxes.min() >= 0
        assert boxes.max() <= drawing.SIZE
        for i, (top, left, bottom, right) in enumerate(boxes):
            for other in boxes[:i]:
                gaps = (top - other[2], other[0] - bottom, left - other[3], other[1] - right)
                assert max(gaps) >= 1
        if spec.relation:
            first, second = placed
            down, right = second.row - first.row, second.column - first.column
            along = {"left": right, "right": -right, "above": down, "below": -down}
            assert along[spec.relation] >= 4


def test_open_colors_come_from_the_choice_and_counts_share_one():
    rng = np.random.default_rng(2)
    for _ in range(50):
        picture = drawing.render(parse("five stars"), rng, colors=("red", "blue"))
        tints = {tuple(p) for p in picture.reshape(3, -1).T.tolist()}
        assert len(tints) == 2


def test_what_the_prompt_names_is_what_stands_there():
    rng = np.random.default_rng(3)
    for spec in (sample_prompt(rng) for _ in range(300)):
        placed = drawing.compose(spec, rng)
        assert len(placed) == sum(item.count for item in spec.objects)
        if len(spec.objects) > 1:
            for item, found in zip(spec.objects, placed, strict=True):
                assert found.shape == item.shape
                assert item.color in (None, found.color)
                assert item.size in (None, found.size)
        picture = drawing.draw(placed)
        for item in placed:
            tint = picture[:, item.row, item.column]
            assert (tint == np.float32(drawing.PALETTE[item.color])).all()
    corner = drawing.Placed("square", "red", "small", 3, 28)
    assert corner.box == (0, 25, 7, 32)


def test_larger_pictures_repeat_pixels():
    small = drawing.render(parse("a red disc and a blue box"), np.random.default_rng(4))
    large = drawing.render(parse("a red disc and a blue box"), np.random.default_rng(4), size=64)
    assert large.shape == (3, 64, 64)
    assert (large[:, ::2, 1::2] == small).all()
    with pytest.raises(ValueError, match="multiple of 32"):
        drawing.render(parse("a star"), np.random.default_rng(0), size=48)

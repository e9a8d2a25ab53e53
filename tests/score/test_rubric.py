"""Pins: the total by hand from its terms; the shapes score on drawn pictures; sizes other than the
native one; errors for prompts outside the grammar and for terms that are not finite."""

import numpy as np
import pytest

from flowloom import score
from flowloom.score.rubric import Rubric, Term, get_rubric
from flowloom.shapes import drawing, prompts

TOLERANCE = 1e-9
PICTURE = np.zeros((3, 32, 32), np.float32)


def constant(value):
    return lambda prompts, images, flops: np.full(len(prompts), value)


def test_total_by_hand():
    terms = (
        Term("a", constant(0.5)),
        Term("b", constant(0.4), 0.2),
        Term("c", constant(1.0), 0.3),
    )
    (row,) = Rubric("test", terms).score(["x"], [PICTURE], [7])
    assert row["score"] == pytest.approx(0.5 * (1 - 0.2 * 0.6), abs=TOLERANCE)
    assert (row["a"], row["b"], row["c"], row["flops"]) == (0.5, 0.4, 1.0, 7)


def test_weights_that_sum_to_one_give_a_mean():
    terms = (Term("a", constant(0.2), 0.25), Term("b", constant(0.6), 0.75))
    (row,) = Rubric("test", terms).score(["x"], [PICTURE])
    assert row["score"] == pytest.approx(0.5, abs=TOLERANCE)


def test_weights_are_bounded():
    with pytest.raises(ValueError, match=r"terms.weight: got \[0.7, 0.7\]"):
        Rubric("test", (Term("a", constant(1), 0.7), Term("b", constant(1), 0.7)))


def test_shapes_score_is_faithfulness_times_crispness_share():
    rng = np.random.default_rng(0)
    specs = [prompts.sample_prompt(rng, kinds=("single", "two", "counting")) for _ in range(40)]
    images = [drawing.render(spec, rng) for spec in specs]
    texts = [spec.text for spec in specs]
    noisy = [image + rng.normal(0, 0.25, image.shape).astype(np.float32) for image in images]
    for row in score.score_images("shapes", texts, images + noisy[:0]):
        assert row["score"] > 0.7
    for row in score.score_images("shapes", texts, noisy):
        expected = row["faithfulness"] * (0.8 + 0.2 * row["crispness"])
        assert row["score"] == pytest.approx(expected, abs=TOLERANCE)
        assert 0 < row["crispness"] < 0.8
    wrong = score.score_images("shapes", texts[1:] + texts[:1], images)
    assert np.mean([row["score"] for row in wrong]) < 0.3


def test_pictures_of_any_size_are_judged_at_the_native_one():
    rng = np.random.default_rng(0)
    spec = prompts.parse("a large red square")
    image = drawing.render(spec, rng)
    large = image.repeat(2, 1).repeat(2, 2)
    small, big = score.score_images("shapes", [spec.text] * 2, [image, large])
    assert big["score"] == pytest.approx(small["score"], abs=1e-5)


def test_cost_can_enter():
    spec = prompts.parse("a red circle")
    image = drawing.render(spec, np.random.default_rng(0))
    free, dear = score.shapes_rubric(cost_weight=0.5).score(
        [spec.text] * 2, [image] * 2, [0, 10**9]
    )
    assert free["thrift"] == 1.0
    assert dear["thrift"] == 0.5
    assert dear["score"] == pytest.approx(
        free["score"] - 0.25 * free["faithfulness"], abs=TOLERANCE
    )


def test_errors_name_the_trouble():
    with pytest.raises(ValueError, match="prompt 'a red elephant': unknown word 'elephant'"):
        score.score_images("shapes", ["a red elephant"], [PICTURE])
    with pytest.raises(ValueError, match="rubric: got 'beauty', expected one of shapes"):
        get_rubric("beauty")
    with pytest.raises(ValueError, match="got 2 prompts, 1 images"):
        score.score_images("shapes", ["a star", "a star"], [PICTURE])
    with pytest.raises(FloatingPointError, match="a is not finite for 'x'"):
        Rubric("test", (Term("a", constant(np.nan)),)).score(["x"], [PICTURE])

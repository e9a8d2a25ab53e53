"""Pins: the total by hand from its terms; names, weights and values that are refused; the shapes
score on drawn pictures, the same in any batch; sizes other than the native one; cost; errors for
prompts that are too long or outside the grammar, and for terms that are not finite."""

import numpy as np
import pytest

from flowloom import score
from flowloom.score.rubric import RUBRICS, Rubric, Term, get_rubric
from flowloom.score.scorers import MAX_CHARACTERS, MAX_WORDS, read_prompt
from flowloom.shapes import drawing, prompts

TOLERANCE = 1e-9
PICTURE = np.zeros((3, 32, 32), np.float32)


def constant(value):
    return lambda prompts, images, flops: np.full(len(prompts), value)


def score_one(*terms):
    (row,) = Rubric("test", terms).score(["x"], [PICTURE], [7])
    return row


def drawn(count, **choices):
    rng = np.random.default_rng(0)
    specs = [prompts.sample_prompt(rng, **choices) for _ in range(count)]
    return [spec.text for spec in specs], [drawing.render(spec, rng) for spec in specs]


def test_total_by_hand():
    row = score_one(
        Term("a", constant(0.5)), Term("b", constant(0.4), 0.2), Term("c", constant(1.0), 0.3)
    )
    assert row["score"] == pytest.approx(0.5 * (1 - 0.2 * 0.6), abs=TOLERANCE)
    assert (row["a"], row["b"], row["c"], row["flops"]) == (0.5, 0.4, 1.0, 7)
    assert list(row) == ["score", "a", "b", "c", "flops"]
    row = score_one(Term("a", constant(0.5)), Term("b", constant(0.6)))
    assert row["score"] == pytest.approx(0.3, abs=TOLERANCE)


def test_weights_that_sum_to_one_give_a_mean():
    row = score_one(Term("a", constant(0.2), 0.25), Term("b", constant(0.6), 0.75))
    assert row["score"] == pytest.approx(0.5, abs=TOLERANCE)
    # Nearly 1 is taken for 1; what is beyond takes nothing more.
    row = score_one(Term("a", constant(0), 0.5), Term("b", constant(0), 0.5 + 5e-10))
    assert row["score"] == 0


def test_weights_are_bounded():
    with pytest.raises(ValueError, match=r"terms.weight: got \[0.7, 0.7\]"):
        Rubric("test", (Term("a", constant(1), 0.7), Term("b", constant(1), 0.7)))
    for weight in (0, -0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"term a.weight: got .*, expected in \(0, 1\]"):
            Term("a", constant(1), weight)


def test_names_are_checked():
    for name in ("", "A", "a b", "1a", "score", "flops"):
        with pytest.raises(ValueError, match=f"term.name: got {name!r}, expected lower-case"):
            Term(name, constant(1))
    with pytest.raises(ValueError, match=r"terms: got \['a'\], expected different names"):
        Rubric("test", (Term("a", constant(1)), Term("a", constant(1))))
    with pytest.raises(ValueError, match=r"terms: got .*, expected at least one"):
        Rubric("test", ())


def test_values_are_one_per_picture_in_the_unit_range():
    row = score_one(Term("a", constant(1 + 1e-7)))
    assert (row["a"], row["score"]) == (1, 1)
    for value in (1.01, -0.01):
        with pytest.raises(ValueError, match=rf"test: a: got {value} for 'x', expected one in"):
            score_one(Term("a", constant(value)))
    with pytest.raises(ValueError, match=r"test: a: got shape \(2,\), expected \(1,\)"):
        score_one(Term("a", lambda prompts, images, flops: np.ones(2)))


def test_shapes_score_is_faithfulness_times_crispness_share():
    texts, images = drawn(40)
    for row in score.score_images("shapes", texts, images):
        assert row["score"] > 0.98
    rng = np.random.default_rng(1)
    noisy = [image + rng.normal(0, 0.25, image.shape).astype(np.float32) for image in images]
    for row in score.score_images("shapes", texts, noisy):
        expected = row["faithfulness"] * (0.8 + 0.2 * row["crispness"])
        assert row["score"] == pytest.approx(expected, abs=TOLERANCE)
        assert 0 < row["crispness"] < 0.8
    wrong = score.score_images("shapes", texts[1:] + texts[:1], images)
    assert np.mean([row["score"] for row in wrong]) < 0.3


def test_rows_do_not_depend_on_the_batch():
    texts, images = drawn(37)
    rng = np.random.default_rng(1)
    images = [image + rng.normal(0, 0.4, image.shape).astype(np.float32) for image in images]
    rubric = get_rubric("shapes")
    rows = rubric.score(texts, images)
    assert rows == [rubric.score([t], [i])[0] for t, i in zip(texts, images, strict=True)]
    smaller = Rubric("shapes", rubric.terms, batch_size=5)
    assert smaller.score(texts, images) == rows
    assert rubric.score([], []) == []


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
    rubric = get_rubric("shapes-thrift")
    free, dear = rubric.score([spec.text] * 2, [image] * 2, [0, 10**9])
    assert free["thrift"] == 1.0
    assert dear["thrift"] == 0.5
    lost = 0.2 / 2 * free["faithfulness"]
    assert dear["score"] == pytest.approx(free["score"] - lost, abs=TOLERANCE)
    # A cost that nobody counted is not a cost of 0.
    with pytest.raises(ValueError, match="rubric 'shapes-thrift': got no counted costs"):
        rubric.score([spec.text], [image])


def test_rubrics_are_found_by_name():
    for name in RUBRICS:
        assert get_rubric(name).name == name
    with pytest.raises(ValueError, match="got 'beauty', expected one of shapes, shapes-thrift"):
        get_rubric("beauty")


def test_prompts_that_cannot_be_judged_are_named():
    longest = "a flat drawing of a red circle and a blue square and a white star"
    assert len(longest.split()) == MAX_WORDS
    assert len(read_prompt(longest).objects) == 3
    with pytest.raises(ValueError, match="got 16 words and 70 characters, expected at most 15"):
        read_prompt(longest.replace("a white", "a big white") + "s")
    for text in ("a star " * 5000, "star" * 5000):
        with pytest.raises(
            ValueError, match=f"characters, expected at most .* {MAX_CHARACTERS}"
        ) as e:
            score.score_images("shapes", [text], [PICTURE])
        assert len(str(e.value)) < 200
    with pytest.raises(ValueError, match="prompt 'a red elephant': unknown word 'elephant'"):
        score.score_images("shapes", ["a red elephant"], [PICTURE])
    with pytest.raises(ValueError, match="prompt ''"):
        score.score_images("shapes", [""], [PICTURE])


def test_other_errors_name_the_trouble():
    with pytest.raises(ValueError, match="got 2 prompts, 1 images"):
        score.score_images("shapes", ["a star", "a star"], [PICTURE])
    with pytest.raises(FloatingPointError, match="test: a is not finite for 'x'"):
        score_one(Term("a", constant(np.nan)))
    with pytest.raises(FloatingPointError, match="not finite"):
        score.score_images("shapes", ["a star"], [PICTURE + np.inf])

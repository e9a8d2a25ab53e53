"""Pins: prompts of every form are read, others refused by name; relations between boxes as GenEval
defines them; strict and graded judgements by hand; overlapping boxes of a noun count once."""

import dataclasses

import pytest

from flowloom.score.geneval import Box, Spec, Wanted, judge, overlap, parse, relations, suppress


def box(noun, left, top, right, bottom, score=0.9, color=None):
    return Box(noun=noun, score=score, corners=(left, top, right, bottom), color=color)


CAT, DOG = Wanted(noun="cat"), Wanted(noun="dog")


@pytest.mark.parametrize(
    ("prompt", "spec"),
    [
        ("a photo of a bench", Spec(wanted=(Wanted(noun="bench"),))),
        ("A photo of a cat and a dog.", Spec(wanted=(CAT, DOG))),
        ("a photo of three cats", Spec(wanted=(Wanted(noun="cat", count=3),), exact=True)),
        ("a photo of one cat", Spec(wanted=(CAT,), exact=True)),
        ("2 red buses", Spec(wanted=(Wanted(noun="bus", color="red", count=2),), exact=True)),
        ("four wine glasses", Spec(wanted=(Wanted(noun="wine glasses", count=4),), exact=True)),
        ("two benches", Spec(wanted=(Wanted(noun="bench", count=2),), exact=True)),
        ("five knives", Spec(wanted=(Wanted(noun="knife", count=5),), exact=True)),
        ("a photo of a red hot dog", Spec(wanted=(Wanted(noun="hot dog", color="red"),))),
        ("an orange", Spec(wanted=(Wanted(noun="orange"),))),
        ("a cat left of a dog", Spec(wanted=(CAT, DOG), relation="left")),
        ("a photo of a cat to the right of a dog", Spec(wanted=(CAT, DOG), relation="right")),
        ("a cat on top of a dog", Spec(wanted=(CAT, DOG), relation="above")),
        ("a cat below a dog", Spec(wanted=(CAT, DOG), relation="below")),
        (
            "a photo of a red cat and a blue dog",
            Spec(wanted=(Wanted(noun="cat", color="red"), Wanted(noun="dog", color="blue"))),
        ),
    ],
)
def test_prompts_are_read(prompt, spec):
    assert parse(prompt) == spec


@pytest.mark.parametrize(
    "prompt", ["", "a photo of ", "a cat and ", "three", "a big old wet dark cat"]
)
def test_what_is_no_such_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="expected a GenEval prompt such as") as caught:
        parse(prompt)
    assert repr(prompt) in str(caught.value)


def test_relations_by_hand():
    middle = box("dog", 10, 10, 20, 20)
    assert relations(box("cat", 0, 10, 8, 20), middle) == {"left"}
    assert relations(box("cat", 25, 10, 35, 20), middle) == {"right"}
    assert relations(box("cat", 10, 0, 20, 8), middle) == {"above"}
    assert relations(box("cat", 10, 30, 20, 40), middle) == {"below"}
    assert relations(box("cat", 30, 30, 40, 40), middle) == {"right", "below"}
    # Centres two pixels apart, a tenth of both widths is two: not apart.
    assert relations(box("cat", 8, 10, 18, 20), middle) == set()
    assert relations(box("cat", 7, 10, 17, 20), middle) == {"left"}
    # 10 right and 6 down, shortened to 8 and 4: x is .894, y is .447, below a half.
    assert relations(box("cat", 20, 16, 30, 26), middle) == {"right"}
    assert relations(box("cat", 16, 20, 26, 30), middle) == {"below"}
    assert relations(box("cat", 4, 0, 14, 10), middle) == {"above"}
    assert relations(box("cat", 0, 4, 10, 14), middle) == {"left"}
    # Small ones: half a pixel apart, shortened to .3.
    assert relations(box("cat", 0, 0, 1, 1), box("dog", 0.5, 0, 1.5, 1)) == {"left"}


def test_judgements_by_hand():
    red, blue = box("cat", 0, 0, 10, 10, color="red"), box("cat", 20, 0, 30, 10, color="blue")
    dog = box("dog", 40, 0, 50, 10, color="blue")

    def both(prompt, *boxes):
        return [judge(parse(prompt), boxes, strict=strict) for strict in (True, False)]

    assert both("a cat", red) == [1, 1]
    assert both("a cat", red, blue) == [1, 1]
    assert both("a cat", dog) == [0, 0]
    assert both("a cat and a dog", red, dog) == [1, 1]
    assert both("a cat and a dog", dog) == [0, 0.5]
    assert both("two cats", red, blue) == [1, 1]
    assert both("two cats", red) == [0, 0.5]
    assert both("one cat", red, blue) == [0, 0]
    assert both("four cats", red, blue, red) == [0, 0.75]
    assert both("a red cat", blue, red) == [1, 1]
    assert both("a red cat", blue) == [0, 0]
    assert both("two red cats", red, blue) == [0, 0.5]
    assert both("two red cats", red, red, red) == [0, 0.5]
    assert both("a red cat and a blue dog", blue, dog) == [0, 0.5]
    assert both("a cat left of a dog", red, dog) == [1, 1]
    assert both("a cat right of a dog", red, dog) == [0, pytest.approx(2 / 3)]
    assert both("a cat left of a dog", red) == [0, pytest.approx(1 / 3)]
    # Of several, the surest stands for the noun, but the right colour comes first.
    near, far = box("cat", 0, 0, 10, 10, score=0.9), box("cat", 60, 0, 70, 10, score=0.95)
    assert both("a cat left of a dog", near, far, dog) == [0, pytest.approx(2 / 3)]
    far = dataclasses.replace(far, color="blue")
    assert both("a red cat left of a dog", far, red, dog) == [1, 1]
    # Where several are wanted, each must be in its place.
    cats = Spec(wanted=(dataclasses.replace(CAT, count=2), DOG), relation="left")
    assert judge(cats, [red, blue, dog], strict=True) == 1
    assert judge(cats, [red, far, dog], strict=True) == 0


def test_overlapping_boxes_count_once():
    strong, weak = box("cat", 0, 0, 10, 10, 0.9), box("cat", 0, 0, 10, 8, 0.8)
    apart, other = box("cat", 20, 20, 30, 30, 0.5), box("dog", 0, 0, 10, 10, 0.4)
    assert overlap(strong, weak) == pytest.approx(0.8)
    assert overlap(strong, apart) == 0
    assert overlap(strong, box("cat", 5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert suppress([weak, other, apart, strong], 0.5, 16) == [strong, apart, other]
    assert suppress([weak, other, apart, strong], 0.8, 16) == [strong, weak, apart, other]
    assert suppress([weak, other, apart, strong], 0.5, 1) == [strong]

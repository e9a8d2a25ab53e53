"""Pins: no meaning is in two splits; lists are balanced in every prefix and repeatable; asking for
more prompts than there are is an error."""

from collections import Counter

import pytest

from flowloom.dataset.config import DEMO_KINDS
from flowloom.dataset.prompts import SPLITS, concept_of, draw_prompts, draw_unrendered, split_of
from flowloom.shapes.prompts import KINDS, parse
from flowloom.shapes.prompts import split_of as holdout_of


@pytest.fixture(scope="module")
def lists():
    return {split: draw_prompts(split, 120, DEMO_KINDS, 0) for split in SPLITS}


def test_no_meaning_leaks_into_another_split(lists):
    meanings = {split: {spec.meaning for spec in specs} for split, specs in lists.items()}
    assert not meanings["train"] & meanings["test"]
    assert not meanings["train"] & meanings["calibration"]
    assert not meanings["calibration"] & meanings["test"]
    for split, specs in lists.items():
        # What a text says decides, not how the list was made.
        assert {split_of(parse(spec.text)) for spec in specs} == {split}
        assert {holdout_of(spec) == "holdout" for spec in specs} == {split == "test"}


def test_lists_are_balanced_different_and_repeatable(lists):
    for split, specs in lists.items():
        assert len({spec.text for spec in specs}) == 120
        assert Counter(spec.kind for spec in specs[:40]) == dict.fromkeys(DEMO_KINDS, 10)
        assert [s.text for s in draw_prompts(split, 40, DEMO_KINDS, 0)][:4] == [
            s.text for s in specs[:4]
        ]
    other = draw_prompts("train", 120, DEMO_KINDS, 1)
    assert {s.text for s in other} != {s.text for s in lists["train"]}
    assert all(draw_prompts(split, 12, KINDS, 0) for split in SPLITS)


def test_unrendered_prompts_are_many_and_of_the_train_split():
    specs = draw_unrendered(1200, DEMO_KINDS, 0)
    assert len(specs) == 1200
    assert {split_of(spec) for spec in specs} == {"train"}
    assert Counter(spec.kind for spec in specs) == dict.fromkeys(DEMO_KINDS, 300)
    # "single" has fewer wordings than that and repeats them.
    singles = [spec.text for spec in specs if spec.kind == "single"]
    counts = Counter(singles).values()
    assert max(counts) - min(counts) <= 1
    assert len({spec.text for spec in specs}) > 1000


def test_concepts():
    assert concept_of(parse("a red circle")) == ("colors", "round", "warm", "few")
    assert concept_of(parse("three blue boxes")) == ("counting", "angular", "cool", "few")
    assert concept_of(parse("four stars")) == ("counting", "round", "any", "many")
    assert concept_of(parse("a star and a square")) == ("two", "mixed", "any", "few")


def test_errors_name_the_trouble():
    with pytest.raises(ValueError, match=r"of kind 'single' in the split 'test', expected 10000"):
        draw_prompts("test", 10000, ("single",), 0)
    with pytest.raises(ValueError, match="split: got 'dev', expected one of train"):
        draw_prompts("dev", 1, DEMO_KINDS, 0)
    with pytest.raises(ValueError, match="kinds: got 'four', expected one of single"):
        draw_prompts("train", 1, ("four",), 0)

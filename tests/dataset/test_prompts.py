"""Pins: no meaning is in two splits; lists are balanced in every prefix and repeatable; asking for
more prompts than there are is an error; a person's prompts go where what they say goes."""

import dataclasses
from collections import Counter

import pytest

from flowloom.dataset.config import PromptsConfig
from flowloom.dataset.prompts import (
    SPLITS,
    concept_of,
    draw_held_out,
    draw_prompts,
    draw_unrendered,
    list_prompts,
    split_of,
)
from flowloom.shapes.prompts import KINDS, parse, wording_of
from flowloom.shapes.prompts import split_of as holdout_of
from tests.dataset.small import FOUR_KINDS


@pytest.fixture(scope="module")
def lists():
    return {split: draw_prompts(split, 120, FOUR_KINDS, 0) for split in SPLITS}


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
        assert Counter(spec.kind for spec in specs[:40]) == dict.fromkeys(FOUR_KINDS, 10)
        assert [s.text for s in draw_prompts(split, 40, FOUR_KINDS, 0)][:4] == [
            s.text for s in specs[:4]
        ]
    other = draw_prompts("train", 120, FOUR_KINDS, 1)
    assert {s.text for s in other} != {s.text for s in lists["train"]}
    assert all(draw_prompts(split, 12, KINDS, 0) for split in SPLITS)


def test_unrendered_prompts_are_many_and_of_the_train_split():
    specs = draw_unrendered(1200, FOUR_KINDS, 0)
    assert len(specs) == 1200
    assert {split_of(spec) for spec in specs} == {"train"}
    assert Counter(spec.kind for spec in specs) == dict.fromkeys(FOUR_KINDS, 300)
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
        draw_prompts("dev", 1, FOUR_KINDS, 0)
    with pytest.raises(ValueError, match="kinds: got 'four', expected one of single"):
        draw_prompts("train", 1, ("four",), 0)


def test_held_out_prompts_come_in_both_wordings():
    specs = draw_held_out(80, FOUR_KINDS, 0)
    assert {split_of(spec) for spec in specs} == {"test"}
    assert Counter(wording_of(spec.text) for spec in specs) == {"train": 40, "held_out": 40}
    assert Counter(spec.kind for spec in specs[:8]) == dict.fromkeys(FOUR_KINDS, 2)
    assert [spec.text for spec in draw_held_out(24, FOUR_KINDS, 0)][:4] == [
        spec.text for spec in specs[:4]
    ]
    assert draw_held_out(0, FOUR_KINDS, 0) == []


def test_a_persons_prompts_are_split_by_what_they_say(tmp_path):
    file = tmp_path / "mine.csv"
    said = [
        f"the {beast} in {number} {places}"
        for beast in ("cat", "dog", "emu")
        for number in range(2, 12)
        for places in ("houses", "woods")
    ]
    worded = [f"a photo of {text}" for text in said]
    rows = [f"{text},beasts" for text in (*said, *worded)] + ["two red circles,", "a star,mine"]
    file.write_text("\n".join(["prompt,kind", *rows]))
    lists = PromptsConfig(prompts_file=str(file), num_train=1000)
    found = {split: list_prompts(lists, split, 1000) for split in SPLITS}
    everything = {p.text: p for prompts in found.values() for p in prompts}
    assert set(everything) == {*said, *worded, "two red circles", "a star"}
    assert all(len(prompts) > 3 for prompts in found.values())
    for plain, opened in zip(said, worded, strict=True):
        assert everything[plain].split == everything[opened].split
    assert everything["two red circles"].split == split_of(parse("two red circles"))
    kinds = {text: everything[text].kind for text in (said[0], "two red circles", "a star")}
    assert list(kinds.values()) == ["beasts", "counting", "mine"]
    assert everything["a star"].shapes() == parse("a star")
    message = r"mine.csv:2: got a prompt outside the shapes language.*unknown word 'cat'"
    with pytest.raises(ValueError, match=message):
        everything[said[0]].shapes()
    few = dataclasses.replace(lists, num_train=5)
    assert list_prompts(few, "train") == found["train"][:5]

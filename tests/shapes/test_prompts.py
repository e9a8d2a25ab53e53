"""The prompt language: what it contains, that reading undoes wording, splits by meaning.

Pinned: 72 words, texts of at most 16 tokens, bare prompts without an opening are in the language, a
held-out quarter of meanings that no wording leaves.
"""

import subprocess
import sys

import numpy as np
import pytest

from flowloom.shapes import prompts
from flowloom.shapes.prompts import PromptSpec, ShapeObject, parse, sample_prompt, tokenize


def many(count=3000, **choices):
    rng = np.random.default_rng(3)
    return [sample_prompt(rng, **choices) for _ in range(count)]


def test_parse_undoes_every_wording():
    for spec in many():
        assert parse(spec.text) == spec, spec.text


def test_hand_read_prompts():
    assert parse("three red circles") == PromptSpec(
        kind="counting", objects=(ShapeObject(shape="circle", color="red", count=3),)
    )
    assert parse("Please draw 1 wedge.") == PromptSpec(
        kind="counting", objects=(ShapeObject(shape="triangle"),)
    )
    assert parse("an image of a big star") == PromptSpec(
        kind="single", objects=(ShapeObject(shape="star", size="large"),)
    )
    assert parse("star") == PromptSpec(kind="single", objects=(ShapeObject(shape="star"),))
    assert parse("the small orange disc").kind == "colors"
    assert parse("a red box plus a white disc").kind == "binding"
    spec = parse("a box on top of a disc")
    assert (spec.kind, spec.relation) == ("position", "above")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("three red hats", "'hats'"),
        ("a red circle a blue star", "'a'"),
        ("two circle", "a plural"),
        ("circles", "a singular"),
        ("a red circle and a square", "both objects or for neither"),
        ("a circle and three squares", "a number stands only"),
        ("two small stars", "sizes are not counted"),
        ("a photo of", "the end, expected a shape"),
        ("a circle and a star and", "the end of the prompt"),
        ("", "a shape"),
    ],
)
def test_what_is_outside_the_language_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse(text)


def test_tokens_fit_and_unknown_words_are_marked():
    assert len(prompts.WORDS) == len(set(prompts.WORDS)) == 72
    assert max(len(tokenize(spec.text)) for spec in many(20000)) <= prompts.MAX_TOKENS
    assert tokenize("") == [prompts.START_ID]
    ids = tokenize("a purple zebra")
    assert [prompts.WORDS[i] for i in ids] == ["<start>", "a", "purple", "<unk>"]
    assert len(tokenize("red " * 40)) == prompts.MAX_TOKENS


def test_choices_are_respected():
    for spec in many(300, kinds=("counting",), counts=(4, 5), color_frac=0.0, shapes=("star",)):
        assert spec.objects == (ShapeObject(shape="star", count=spec.objects[0].count),)
        assert spec.objects[0].count in (4, 5)
    with pytest.raises(ValueError, match="'shape'"):
        many(1, kinds=("shape",))


def test_meaning_ignores_wording_and_order():
    same = ["a star left of a box", "a square to the right of a sparkle"]
    assert len({parse(text).meaning for text in same}) == 1
    assert (
        parse("a red disc and a blue box").meaning == parse("blue square with red circle").meaning
    )
    assert parse("a star above a box").meaning != parse("a box above a star").meaning
    assert parse("a star").meaning != parse("one star").meaning


def test_split_is_stable_and_has_its_share():
    meanings = {spec.meaning: prompts.split_of(spec) for spec in many(20000)}
    held = sum(split == "holdout" for split in meanings.values()) / len(meanings)
    # About 600 meanings: a quarter, give or take two standard errors of .018.
    assert abs(held - prompts.HOLDOUT_FRAC) < 0.036
    # The hash is part of every data set's identity and may not change.
    assert prompts.split_of(parse("three red circles")) == "train"
    assert prompts.split_of(parse("a small square")) == "holdout"


def test_concepts():
    assert prompts.prompt_concepts(parse("a star and a disc")) == {
        "shapes": "round",
        "colors": "any",
    }
    assert prompts.prompt_concepts(parse("a red star and a blue box")) == {
        "shapes": "mixed",
        "colors": "mixed",
    }
    assert prompts.prompt_concepts(parse("4 cyan boxes")) == {"shapes": "angular", "colors": "cool"}


def test_reading_prompts_does_not_import_torch():
    code = "import sys, flowloom.shapes.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The prompt language: what it contains, that reading undoes wording, splits by meaning.

Pinned: 84 words, texts of at most 16 tokens, bare prompts without an opening are in the language, a
held-out quarter of meanings that no wording leaves, held-out openings that no training prompt has.
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


@pytest.mark.parametrize("wording", prompts.WORDINGS)
def test_parse_undoes_every_wording(wording):
    for spec in many(wording=wording):
        assert parse(spec.text) == spec, spec.text
        assert prompts.wording_of(spec.text) == wording, spec.text


def test_every_kind_says_what_it_should():
    for kind in prompts.KINDS:
        for spec in many(200, kinds=(kind,)):
            assert spec.kind == kind
            assert len(spec.objects) == {"single": 1, "colors": 1, "counting": 1, "three": 3}.get(
                kind, 2
            )
            assert (spec.relation is not None) == (kind == "position")
            colored = {item.color is not None for item in spec.objects}
            assert len(colored) == 1


def test_nouns_are_found_among_the_tokens():
    for spec in many(300):
        ids = tokenize(spec.text)
        places = prompts.noun_tokens(spec.text)
        nouns = [prompts.WORDS[ids[place]] for place in places]
        bare = [parse(f"two {noun}" if noun.endswith("s") else noun) for noun in nouns]
        assert [one.objects[0].shape for one in bare] == [item.shape for item in spec.objects]


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
    assert parse("a violet disc").objects[0].color == "purple"
    spec = parse("could you draw a red disc, a blue box and a tiny green star")
    assert spec.kind == "three"
    assert [item.color for item in spec.objects] == ["red", "blue", "green"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("three red hats", "'hats'"),
        ("a red circle blurs a blue star", "'blurs'"),
        ("a red circle draw a blue star", "'draw', expected one of and"),
        ("two circle", "a plural"),
        ("circles", "a singular"),
        ("a red circle and a square", "every object or for none"),
        ("a red circle, a square and a blue star", "every object or for none"),
        ("a circle left of a square and a star", "the end of the prompt"),
        ("a circle and three squares", "a number stands only"),
        ("two small stars", "sizes are not counted"),
        ("a photo of", "the end, expected a shape"),
        ("a circle and a star and", "the end, expected a shape"),
        ("a circle, a star, a box and a wedge", "the end of the prompt"),
        ("", "a shape"),
    ],
)
def test_what_is_outside_the_language_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse(text)


def test_an_error_about_a_long_prompt_is_short():
    for text in ("a star " * 2000, "x" * 10_000):
        with pytest.raises(ValueError, match="prompt") as caught:
            parse(text)
        assert len(str(caught.value)) < 400


def test_tokens_fit_and_unknown_words_are_marked():
    assert len(prompts.WORDS) == len(set(prompts.WORDS)) == 84
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
    same = [
        "a star left of a box",
        "a square to the right of a sparkle",
        "a star with a box to its right",
    ]
    assert len({parse(text).meaning for text in same}) == 1
    assert (
        parse("a red disc and a blue box").meaning == parse("blue square with red circle").meaning
    )
    assert parse("a star above a box").meaning != parse("a box above a star").meaning
    assert parse("a star").meaning != parse("one star").meaning


def test_split_is_stable_and_has_its_share():
    meanings = {spec.meaning: prompts.split_of(spec) for spec in many(20000)}
    held = sum(split == "holdout" for split in meanings.values()) / len(meanings)
    # About 2,500 meanings: a quarter, give or take three standard errors of .009.
    assert abs(held - prompts.HOLDOUT_FRAC) < 0.027
    # The hash is part of every data set's identity and may not change.
    splits = {
        text: [prompts.split_of(parse(text), seed) for seed in (prompts.SPLIT_SEED, 2)]
        for text in ("three red circles", "a red circle and a purple star", "a small square")
    }
    assert splits == {
        "three red circles": ["holdout", "train"],
        "a red circle and a purple star": ["train", "holdout"],
        "a small square": ["train", "holdout"],
    }


def test_held_out_openings_have_words_that_no_model_knows():
    unknown = {
        word
        for spec in many(500, wording="held_out")
        for word in prompts.word_list(spec.text)
        if word not in prompts.WORDS
    }
    assert unknown == {"neat", "sketch", "render", "i", "want", "could", "you"}
    with pytest.raises(ValueError, match="wording: got 'odd', expected one of train, held_out"):
        many(1, wording="odd")


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

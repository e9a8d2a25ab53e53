"""Facts: over the 633 classes of a real server, in 23 families, and over those of text-to-image,
whatever is drawn at any budget is valid, ends within it and comes back from its workflow; each
legal token leads to a prefix that can be completed; a restriction only narrows; work and pictures
stay within the limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from flowloom.workflow import (
    Catalogue,
    Grammar,
    Limits,
    Vocabulary,
    decode,
    encode,
    is_valid,
)
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.profile import text_to_image

CATALOGUES = Path(__file__).parents[2] / "data" / "catalogues"


@pytest.fixture(scope="module")
def example() -> Catalogue:
    return Catalogue.load(CATALOGUES / "example.json.gz")


@pytest.fixture(scope="module")
def words(example) -> Vocabulary:
    return Vocabulary.build(example)


def finish(state, rng) -> list[np.ndarray]:
    """Draw uniformly from the masks until every row has ended; tokens by step."""
    steps = []
    while not state.done.all():
        mask = state.mask()
        tokens = np.where(mask, rng.random(mask.shape), -1).argmax(1)
        state.advance(tokens)
        steps.append(tokens)
    return steps


def rows_of(steps: list[np.ndarray]) -> list[list[int]]:
    return [row[: row.index(voc.EOS) + 1] for row in np.array(steps).T.tolist()]


@pytest.mark.parametrize(
    ("which", "budget"),
    [("all", 9), ("all", 14), ("all", 26), ("t2i", 12), ("t2i", 25), ("t2i", 64)],
)
@pytest.mark.parametrize("taste", [True, False])
def test_whatever_is_drawn_is_valid(example, words, which, budget, taste):
    classes = text_to_image(example) if which == "t2i" else None
    grammar = Grammar(example, words, budget, classes=classes, taste=taste)
    rows = rows_of(finish(grammar.start(48), np.random.default_rng(budget)))
    for tokens in rows:
        workflow = decode(tokens, grammar)
        assert len(tokens) <= budget
        assert is_valid(workflow, example)
        assert encode(workflow, grammar).tokens == tokens


@pytest.mark.parametrize(("which", "budget"), [("all", 22), ("t2i", 30), ("t2i", 45)])
def test_each_legal_token_can_be_completed(example, words, which, budget):
    classes = text_to_image(example) if which == "t2i" else None
    grammar = Grammar(example, words, budget, classes=classes)
    rng = np.random.default_rng(7)
    state = grammar.start(12)
    for _ in range(int(budget * 0.6)):
        mask = state.mask()
        state.advance(np.where(mask, rng.random(mask.shape), -1).argmax(1))
        if rng.random() < 0.15:
            rows, tokens = np.nonzero(state.mask())
            some = rng.permutation(len(rows))[:60]
            branched = state.select(rows[some])
            branched.advance(tokens[some])
            finish(branched, rng)
            assert (branched.used <= budget).all()


@pytest.mark.parametrize(
    "restriction",
    [
        {"require": {"steps": 20, "sampler_name": "euler"}},
        {"forbid": ["LoraLoader", "cfg=7.0", "DualCLIPLoader"]},
        {"budget": 30},
        {"classes": ()},
    ],
    ids=["require", "forbid", "budget", "classes"],
)
def test_a_restriction_only_narrows(example, words, restriction):
    """Without taste: caps that leave nothing else give way. Batches are bounded by the budget."""
    options = {"budget": 36, "classes": text_to_image(example), "taste": False}
    options["require"] = {"batch_size": 1}
    wide = Grammar(example, words, **options)
    if "classes" in restriction:
        restriction = {"classes": (*options["classes"][:40], "LoadImage")}
    if "require" in restriction:
        restriction = {"require": {**options["require"], **restriction["require"]}}
    narrow = Grammar(example, words, **{**options, **restriction})
    state, free, rng = narrow.start(24), wide.start(24), np.random.default_rng(3)
    while not state.done.all():
        mask = state.mask()
        assert not (mask & ~free.mask()).any()
        tokens = np.where(mask, rng.random(mask.shape), -1).argmax(1)
        state.advance(tokens)
        free.advance(tokens)


def test_the_limits_hold(example, words):
    """Limits so small that few sizes, batches and numbers of steps can be combined."""
    limits = Limits(pixels=800 * 800, batch=4, work=2.0 * 512 * 512 * 100)
    small = dataclasses.replace(example, limits=limits)
    grammar = Grammar(small, words, 40, classes=text_to_image(example))
    for tokens in rows_of(finish(grammar.start(64), np.random.default_rng(1))):
        assert is_valid(decode(tokens, grammar), small)


def test_the_limit_on_work_divides_into_batch_picture_and_steps(example, words):
    """80 steps of a picture: 4 pictures of 20 steps, whatever the budget; by default 50 of 16."""
    limits = Limits(pixels=1024 * 1024, batch=16, work=80.0 * 1024 * 1024)
    small = dataclasses.replace(example, limits=limits)
    for budget in (40, 64):
        grammar = Grammar(small, words, budget, classes=text_to_image(example))
        assert max(_numbers(grammar, "EmptyLatentImage", "batch_size")) == 4
        assert max(_numbers(grammar, "KSampler", "steps")) == 20
    grammar = Grammar(example, words, 40, classes=text_to_image(example))
    assert max(_numbers(grammar, "EmptyLatentImage", "batch_size")) == 16
    assert max(_numbers(grammar, "KSampler", "steps")) == 50


def _numbers(grammar, class_type, name):
    field = grammar.vocabulary.field_index[class_type, name]
    values = [grammar.vocabulary.tokens[k].value for k in np.flatnonzero(grammar.static[field])]
    return [value for value in values if isinstance(value, int)]

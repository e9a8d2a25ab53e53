"""Pins: what is nearly the same and what is not; taken keys against Python sets."""

import numpy as np
import pytest

from flowloom.dataset.near_duplicates import CoarseCode, KnownPairs, joint_keys, prompt_keys
from flowloom.dataset.prompts import content_words
from flowloom.dataset.workflows import make_grammar
from flowloom.workflow import Catalogue
from tests.render.tiny import CHECKPOINTS, flow, write_world


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("world"))
    grammar = make_grammar(Catalogue.load(world / "catalogue.json.gz"), 64)
    coarse = CoarseCode(grammar.vocabulary)
    return lambda workflow: coarse(grammar.codec.encode(workflow).tokens)


def test_neighbouring_values_are_joined_two_by_two(code):
    """The shapes grid of cfg is 1, 1.5, 2, 2.5, 3, 4, ...; of steps 4, 6, 8, 12, ..."""
    plain = code(flow(steps=4, cfg=2.0))
    assert code(flow(steps=6, cfg=2.5)) == plain
    assert code(flow(steps=8, cfg=2.0)) != plain
    assert code(flow(steps=4, cfg=1.5)) != plain
    assert code(flow(steps=4, cfg=3.0)) != plain


def test_structure_files_and_options_count(code):
    flows = [flow(steps=4), flow(CHECKPOINTS[1], steps=4), flow(steps=4, zero_negative=True)]
    flows += [flow(steps=4, sampler="heun"), flow(steps=4, scheduler="karras")]
    flows += [flow(steps=4, lora=(1.0, 1.0))]
    assert len({code(workflow) for workflow in flows}) == len(flows)


def test_ids_texts_and_prefixes_do_not_count(code):
    plain = flow(steps=4)
    renamed = plain.canonical()
    saved = next(i for i, n in renamed.nodes.items() if n.class_type == "SaveImage")
    prompted = renamed.replace(saved, "filename_prefix", "ComfyUI")
    assert code(renamed) == code(plain)
    assert code(plain.fill("a cat", seed=3)) != code(plain)  # a literal text is no slot
    assert prompted.template_fingerprint() != plain.template_fingerprint()


def test_prompts_are_compared_without_opening_and_articles():
    same = ["a red circle", "A picture of the red circle.", "Red circle", "draw a red circle!"]
    other = ["a red disc", "a circle", "two red circles"]
    assert {content_words(text) for text in same} == {"red circle"}
    assert len({content_words(text) for text in [*same, *other]}) == 4
    assert content_words("the") == "the"
    assert content_words("\u2764") == "\u2764"
    keys = prompt_keys([*same, *other])
    assert len(np.unique(keys)) == 4


def test_joint_keys_depend_on_both_and_on_their_order():
    rng = np.random.default_rng(0)
    one, other = rng.integers(2**63, size=(2, 1000), dtype=np.uint64)
    keys = [joint_keys(one, other), joint_keys(other, one), joint_keys(one, one)]
    assert len(np.unique(np.concatenate(keys))) == 3000
    shared = joint_keys(np.repeat(one[:1], 1000), other)
    assert len(np.unique(shared)) == 1000


def test_known_pairs_against_sets():
    rng, known, oracle = np.random.default_rng(1), KnownPairs(), set()
    for num in (0, 1, 50, 50, 3):
        keys = rng.integers(60, size=num).astype(np.uint64)
        expected = []
        for key in keys.tolist():
            expected.append(key not in oracle)
            oracle.add(key)
        assert known.take(keys).tolist() == expected
    probes = np.arange(80, dtype=np.uint64)
    assert known.has(probes).tolist() == [key in oracle for key in probes.tolist()]

"""Facts: an edit changes something and leaves a workflow that the grammar writes; every kind of
edit occurs; texts and seeds stay; the same seed gives the same edits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from flowloom.workflow import (
    CodecError,
    Grammar,
    decode,
    encode,
    mutate,
    mutate_all,
    random_workflows,
    validate,
)
from tests.workflow.flows import plain, split_catalogue, two_pass


def classes(workflow):
    return Counter(node.class_type for node in workflow.nodes.values())


@pytest.fixture(scope="module")
def pairs(grammar):
    before = [decode(c.tokens, grammar) for c in random_workflows(grammar, 768, 3)]
    return list(zip(before, mutate_all(before, grammar, np.random.default_rng(1)), strict=True))


def test_edits_are_valid_and_change_something(pairs, grammar, embedded):
    codes = [encode(after, grammar).tokens for _, after in pairs]
    assert grammar.accept_all(codes).all()
    for before, after in pairs:
        assert validate(after, embedded) == []
        assert after.fingerprint() != before.fingerprint()


def test_every_kind_of_edit_occurs(pairs):
    gained, lost, values = Counter(), Counter(), 0
    for before, after in pairs:
        gained.update((classes(after) - classes(before)).keys())
        lost.update((classes(before) - classes(after)).keys())
        values += classes(after) == classes(before)
    for name in ("LoraLoader", "KSampler", "ImageSharpen", "ImageScaleBy", "LatentUpscaleBy"):
        assert gained[name] >= 2
    for name in ("LoraLoader", "KSampler", "ImageSharpen"):
        assert lost[name] >= 1
    assert 0.5 < values / len(pairs) < 0.95


def test_files_change(pairs):
    def files(workflow):
        return {n.inputs["ckpt_name"] for n in workflow.nodes.values() if "ckpt_name" in n.inputs}

    assert sum(files(a) != files(b) for a, b in pairs) > 30


def test_a_lora_takes_its_clip_along(grammar):
    rng, rerouted, kept = np.random.default_rng(0), 0, 0
    for after in mutate_all([plain()] * 600, grammar, rng):
        found = [i for i, n in after.nodes.items() if n.class_type == "LoraLoader"]
        if found:
            clips = [
                n.inputs["clip"].node == found[0]
                for n in after.nodes.values()
                if n.class_type == "CLIPTextEncode"
            ]
            rerouted += all(clips)
            kept += not any(clips)
    assert rerouted > 10
    assert kept < rerouted


def test_texts_and_seeds_stay(grammar):
    after = mutate(two_pass(), grammar, np.random.default_rng(0), edits=3)
    assert "{prompt}" in {n.inputs.get("text") for n in after.nodes.values()}
    assert all(n.inputs.get("seed", 0) == 0 for n in after.nodes.values())


def test_only_templates_on_the_grids_are_edited(grammar):
    """Other texts and values have no token that the grammar draws, so no edit could be accepted."""
    for workflow in (two_pass().fill("a red circle"), plain(n3_cfg=9.5)):
        with pytest.raises(CodecError, match="workflow 1: the grammar does not write it"):
            mutate_all([plain(), workflow], grammar, np.random.default_rng(0))


def test_a_function_of_the_rng(grammar):
    runs = [mutate(two_pass(), grammar, np.random.default_rng(5), edits=4) for _ in range(2)]
    assert runs[0] == runs[1]
    other = mutate(two_pass(), grammar, np.random.default_rng(6), edits=4)
    assert other.fingerprint() != runs[0].fingerprint()
    code = encode(two_pass(), grammar)
    assert mutate(code, grammar, np.random.default_rng(5), edits=4) == runs[0]


def test_another_catalogue():
    grammar = Grammar(split_catalogue(), budget=56)
    before = [decode(c.tokens, grammar) for c in random_workflows(grammar, 200, 0)]
    after = mutate_all(before, grammar, np.random.default_rng(0), edits=2)
    assert all(validate(workflow, grammar.catalogue) == [] for workflow in after)
    assert sum(a.fingerprint() != b.fingerprint() for a, b in zip(before, after, strict=True)) > 180


def test_a_fixed_grammar_leaves_the_workflow(embedded, vocabulary):
    fixed = {"steps": 8, "cfg": 2.5, "sampler_name": "euler", "scheduler": "karras"}
    fixed |= {"denoise": 1.0, "ckpt_name": "shapes-warm.safetensors"}
    classes_of_plain = [
        "SaveImage", "VAEDecode", "KSampler", "CheckpointLoaderSimple", "CLIPTextEncode",
        "EmptyLatentImage",
    ]  # fmt: skip
    grammar = Grammar(
        embedded, vocabulary, classes=classes_of_plain, require=fixed, caps={"KSampler": 1}
    )
    after = mutate(plain(), grammar, np.random.default_rng(0))
    assert after.fingerprint() == plain().fingerprint()

"""Facts: each of the 230 real templates that a 0.33 server knows comes back exactly; the named
text-to-image templates take 50 tokens or fewer in the mean; the vocabulary of the whole server has
one token for a value whatever class it stands in."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.length import named_set, select
from flowloom.workflow import Catalogue, Codec, Vocabulary
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.inputs import MATCH
from tests.workflow.templates import ROOT, converted, load_catalogue

MAX_MEAN_TOKENS = 50


@pytest.fixture(scope="module")
def codec():
    catalogue = load_catalogue()
    return Codec(catalogue, Vocabulary.build(catalogue))


@pytest.fixture(scope="module")
def example():
    catalogue = Catalogue.load(ROOT / "data" / "catalogues" / "example.json.gz")
    return Codec(catalogue, Vocabulary.build(catalogue))


def test_every_template_comes_back(codec):
    assert len(converted()) == 230
    outputs = codec.catalogue.output_classes
    for name, workflow in converted().items():
        code = codec.encode(workflow)
        again = codec.decode(code.tokens, code.texts, code.seeds)
        assert again.fingerprint(outputs) == workflow.fingerprint(outputs), name
        assert codec.encode(again) == code, name
        nodes, fields = codec.annotate(code.tokens)
        assert min(nodes.min(), fields.min()) >= 0
        assert len(set(nodes.tolist())) == len(again.nodes)


def test_the_named_set_follows_its_rule():
    assert named_set() == select()


def test_text_to_image_is_short(codec):
    codes = [codec.encode(converted()[name]).tokens for name in named_set()]
    assert np.mean([len(code) for code in codes]) <= MAX_MEAN_TOKENS
    # Fewer than one value in two workflows has no token.
    spelled = sum(t in (voc.ESCAPE, voc.NUMBER) for code in codes for t in code) / 2
    assert spelled / len(codes) < 0.5


def test_kinds_are_shared(example):
    kinds = {}
    for position, step in enumerate(example.schema.program):
        kinds.setdefault((example.schema.specs[position].name, step.type), set()).add(step.kind)
    assert kinds["upscale_method", "COMBO"] == kinds["downscale_method", "COMBO"] == {"method"}
    assert kinds["sampler_name", "COMBO"] == {"sampler"}
    assert kinds["width", "INT"] == kinds["target_width", "INT"] == {"px"}
    assert kinds["blocks.0.", "FLOAT"] == {"fraction"}
    ids = example.vocabulary.value_ids
    assert len(set(ids.values())) == len(ids)
    assert sum(t.group == "value" for t in example.vocabulary.tokens) < 1_700


def test_every_default_has_a_token(example):
    ids, schema = example.vocabulary.value_ids, example.schema
    for step, spec in zip(schema.program, schema.specs, strict=True):
        if step.kind and spec.default is not None and spec.folder is None and not spec.options:
            value = float(spec.default) if spec.type == "FLOAT" else spec.default
            assert voc.value_key(step.kind, value) in ids, step


def test_what_follows_a_type_takes_any(example):
    slots = example.schema.slots
    assert slots["CheckpointLoaderSimple", MATCH] == (0, 1, 2)
    assert slots["CheckpointLoaderSimple", "*"] == (0, 1, 2)
    assert slots["CheckpointLoaderSimple", "CLIP"] == (1,)


def test_a_branch_has_values_of_its_own(example):
    """`format.quality` of SaveAudioAdvanced has other options under mp3 than under opus."""
    options = {
        spec.options
        for step, spec in zip(example.schema.program, example.schema.specs, strict=True)
        if step.name == "format.quality" and spec.type == "COMBO"
    }
    assert options == {("V0", "128k", "320k"), ("64k", "96k", "128k", "192k", "320k")}
    ids = example.vocabulary.value_ids
    for value in {value for found in options for value in found}:
        assert voc.value_key("quality", value) in ids

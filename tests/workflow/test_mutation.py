"""Facts: an edit changes something and leaves a workflow that the grammar writes; every kind of
edit occurs; texts and seeds stay; the same seed gives the same edits, in every version; another
option brings its own inputs and takes the old ones along; a growing input gains and loses one."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flowloom.workflow import (
    Catalogue,
    CodecError,
    Grammar,
    decode,
    encode,
    mutate,
    mutate_all,
    random_workflows,
    validate,
)
from flowloom.workflow.profile import MUST
from flowloom.workflow.weights import t2i_weights
from tests.workflow.flows import plain, split_catalogue, two_pass

EXAMPLE = Path(__file__).parents[2] / "data" / "catalogues" / "example.json.gz"


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
        assert {p.type for p in validate(after, embedded)} <= {"wasted_pass"}
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


def test_what_the_small_flow_lacks_is_reached(grammar):
    """A second pass below full noise, an upscale, a LoRA, a shift, samplers that were not there."""
    gained, second = Counter(), 0
    for after in mutate_all([plain()] * 1000, grammar, np.random.default_rng(0), edits=2):
        found = classes(after)
        gained.update(found.keys() - classes(plain()).keys())
        gained.update(n.inputs.get("sampler_name") for n in after.nodes.values())
        passes = [n for n in after.nodes.values() if n.class_type == "KSampler"]
        second += len(passes) == 2 and min(n.inputs["denoise"] for n in passes) < 1
    assert second > 15
    wanted = [
        "LoraLoader", "LatentUpscaleBy", "ImageUpscaleWithModel", "ModelSamplingSD3",
        "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "RescaleCFG",
    ]  # fmt: skip
    assert min(gained[name] for name in wanted) >= 3


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
    fixed |= {"denoise": 1.0, "width": 32, "height": 32, "ckpt_name": "shapes-warm.safetensors"}
    classes_of_plain = [
        "SaveImage", "VAEDecode", "KSampler", "CheckpointLoaderSimple", "CLIPTextEncode",
        "EmptyLatentImage",
    ]  # fmt: skip
    grammar = Grammar(
        embedded, vocabulary, classes=classes_of_plain, require=fixed, caps={"KSampler": 1}
    )
    after = mutate(plain(), grammar, np.random.default_rng(0))
    assert after.fingerprint() == plain().fingerprint()


def test_a_seed_edits_the_same_in_every_version(grammar):
    before = [decode(code.tokens, grammar) for code in random_workflows(grammar, 256, 7)]
    after = mutate_all(before, grammar, np.random.default_rng(1))
    digest = hashlib.sha256("".join(flow.fingerprint() for flow in after).encode()).hexdigest()
    assert digest == "14153844652b0b73fa6f928d8741b9996f45ebfe3f76ece87061d2e3e69669ef"


@pytest.fixture(scope="module")
def dynamic_pairs():
    """Workflows with choices and growing inputs, before and after six edits."""
    catalogue = Catalogue.load(EXAMPLE)
    names = [*MUST, "ResizeImageMaskNode", "BatchImagesNode", "SaveImageAdvanced"]
    grammar = Grammar(catalogue, budget=96, classes=names)
    weights = copy.deepcopy(t2i_weights())
    fields = weights["fields"]
    fields["*"] = {"*": 1.0}
    fields["images"] = {
        "*": 0.0,
        "VAEDecode": 0.3,
        "ResizeImageMaskNode": 0.3,
        "BatchImagesNode": 1,
    }
    fields["ResizeImageMaskNode.input"] = {"*": 0.0, "VAEDecode": 1.0}
    fields["BatchImagesNode.images.*"] = {"*": 0.0, "VAEDecode": 1.0, "<end>": 1.0, "ref": 1.0}
    codes = random_workflows(grammar, 160, 0, weights)
    before = [decode(code.tokens, grammar, code.texts, code.seeds) for code in codes]
    after = mutate_all(before, grammar, np.random.default_rng(0), edits=6)
    return before, after, catalogue


def dynamic_inputs(workflow):
    """The options of choices, and how many pictures each batch has."""
    nodes = workflow.nodes.values()
    names = ("resize_type", "format")
    options = Counter(n.inputs[name] for n in nodes for name in names if name in n.inputs)
    return options, [len(n.inputs) for n in nodes if n.class_type == "BatchImagesNode"]


def test_choices_and_growing_inputs_are_edited(dynamic_pairs):
    before, after, catalogue = dynamic_pairs
    seen = Counter()
    for old, new in zip(before, after, strict=True):
        assert not [p for p in validate(new, catalogue) if p.severity == "error"]
        (old_options, old_sizes), (new_options, new_sizes) = map(dynamic_inputs, (old, new))
        if old_options.total() == new_options.total():
            seen["option"] += old_options != new_options
        if len(old_sizes) == len(new_sizes):
            seen["more"] += sum(new_sizes) > sum(old_sizes)
            seen["fewer"] += sum(new_sizes) < sum(old_sizes)
    assert seen["option"] > 8
    assert seen["more"] > 4
    assert seen["fewer"] > 4


def test_another_option_has_its_own_inputs_only(dynamic_pairs):
    """The validator warns of an input that the class does not have for its option."""
    _, after, catalogue = dynamic_pairs
    kinds = {p.type for flow in after for p in validate(flow, catalogue)}
    assert "unknown_input" not in kinds

"""Facts: on an installation of real models, random workflows are valid, reach every class of the
text-to-image profile, and give each model the text encoder, decoder, size, steps and cfg that its
makers advise; a weights file names tokens by text or value, for one class, any class, or from some
model file on; weights estimated from examples draw workflows like them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowloom.workflow import (
    Catalogue,
    Grammar,
    WorkflowError,
    decode,
    encode,
    random_workflows,
    validate,
)
from flowloom.workflow import vocabulary as voc
from flowloom.workflow.estimation import estimate_weights
from flowloom.workflow.graph import Link
from flowloom.workflow.mutation import mutate_all
from flowloom.workflow.profile import TEXT_TO_IMAGE, text_to_image
from flowloom.workflow.weights import Table, t2i_weights, weights_for
from tests.workflow.flows import two_pass

EXAMPLE = Path(__file__).parents[2] / "data" / "catalogues" / "example.json.gz"
NUM = 3000
FEW_STEPS = {
    "z_image_turbo_bf16.safetensors": {6, 8, 10},
    "krea2_turbo_fp8_scaled.safetensors": {8},
    "flux1-schnell.safetensors": {4, 6, 8},
    "flux-2-klein-4b.safetensors": {4, 6, 8},
}
ENCODERS = {
    "flux1": {"flux"},
    "krea2": {"krea2"},
    "qwen-image": {"qwen_image"},
    "z-image": {"lumina2"},
    "hidream": {"hidream"},
    "flux2": {"flux2"},
}


@pytest.fixture(scope="module")
def example() -> Catalogue:
    return Catalogue.load(EXAMPLE)


@pytest.fixture(scope="module")
def installed(example) -> Grammar:
    return Grammar(example, budget=128, classes=text_to_image(example))


@pytest.fixture(scope="module")
def drawn(installed):
    return [decode(code.tokens, installed) for code in random_workflows(installed, NUM, 0)]


def classes(workflow) -> set[str]:
    return {node.class_type for node in workflow.nodes.values()}


def values(workflow, name) -> set:
    found = (node.inputs.get(name) for node in workflow.nodes.values())
    return {value for value in found if value is not None and type(value) is not Link}


def families(workflow, catalogue) -> set[str]:
    files = (
        catalogue.file(spec.folder, node.inputs[spec.name])
        for node in workflow.nodes.values()
        for spec in catalogue.nodes[node.class_type].inputs
        if spec.folder
    )
    return {file.family for file in files} - {""}


def test_all_are_valid_and_most_differ(drawn, example):
    assert not [p for flow in drawn[::3] for p in validate(flow, example) if p.severity == "error"]
    assert len({flow.fingerprint() for flow in drawn}) > 0.95 * NUM
    # Two families can meet through a picture: one draws it, the other goes on.
    assert np.mean([len(families(flow, example)) == 1 for flow in drawn]) > 0.98


def test_every_class_is_reached_and_sane_ones_dominate(drawn, installed):
    share = Counter(name for flow in drawn for name in classes(flow))
    rare = [name for name in TEXT_TO_IMAGE if share[name] < 2]
    assert len(rare) <= 3
    assert 0.7 < share["KSampler"] / NUM < 0.9
    assert 0.55 < share["UNETLoader"] / NUM < 0.8
    assert 0.2 < share["CheckpointLoaderSimple"] / NUM < 0.45
    assert 0.12 < (share["LoraLoaderModelOnly"] + share["LoraLoader"]) / NUM < 0.4
    samplers = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"}
    assert sum(bool(samplers & classes(flow)) for flow in drawn) > 0.995 * NUM
    weights = weights_for(installed)
    assert weights is t2i_weights()


def test_parts_fit_the_model(drawn, example):
    right, encoders = Counter(), Counter()
    for flow in drawn:
        if len(families(flow, example)) != 1:
            continue
        (family,) = families(flow, example)
        types = values(flow, "type")
        if family in ENCODERS and types:
            encoders[types == ENCODERS[family]] += 1
        if family == "sd15":
            right["size", max(values(flow, "width") | {0}) <= 768] += 1
        if values(flow, "image"):
            assert "none" not in values(flow, "image")
        for name in values(flow, "unet_name") & FEW_STEPS.keys():
            if not any(c.startswith("Lora") for c in classes(flow)):
                right["steps", values(flow, "steps") <= FEW_STEPS[name]] += 1
                right["cfg", values(flow, "cfg") <= {1.0}] += 1
    assert encoders[True] > 0.97 * sum(encoders.values()) > 0
    assert right["size", True] > 0.85 * (right["size", True] + right["size", False]) > 0
    assert right["steps", True] > 0.7 * (right["steps", True] + right["steps", False]) > 0
    assert right["cfg", True] > 0.8 * (right["cfg", True] + right["cfg", False]) > 0


def test_prompts_stand_where_they_belong(drawn):
    wrong = 0
    for flow in drawn:
        texts = values(flow, "text") | values(flow, "clip_l") | values(flow, "text_g")
        wrong += "{prompt}" not in texts
    assert wrong < 0.02 * NUM


def test_classes_suit_the_family_that_comes_after_them(drawn, example):
    """A patch of the model is written before the model's file."""
    for name, entry in t2i_weights()["affinity"].items():
        found = [families(flow, example) for flow in drawn if name in classes(flow)]
        fitting = [bool(of_flow & set(entry["families"])) for of_flow in found]
        assert len(found) < 20 or np.mean(fitting) > 0.9


def test_all_classes_of_a_server(example):
    """Every class at once: still valid, written exactly, and mostly text to image."""
    grammar = Grammar(example, budget=128)
    codes = random_workflows(grammar, 256, 0)
    flows = [decode(code.tokens, grammar, code.texts, code.seeds) for code in codes]
    assert [encode(flow, grammar) for flow in flows] == codes
    edited = mutate_all(flows[:40], grammar, np.random.default_rng(0))
    problems = [p for flow in [*flows, *edited] for p in validate(flow, example)]
    assert "error" not in {problem.severity for problem in problems}
    assert len({name for flow in flows for name in classes(flow)} - set(TEXT_TO_IMAGE)) > 20
    assert np.mean(["VAEDecode" in classes(flow) for flow in flows]) > 0.9


def test_first_passes_start_from_pure_noise(drawn):
    """Also where the denoising is said by a scheduler that does not see the latent."""
    first = [
        node.inputs["denoise"]
        for flow in drawn
        for node in flow.nodes.values()
        if node.class_type == "BasicScheduler"
        or (
            node.class_type == "KSampler"
            and flow.nodes[node.inputs["latent_image"].node].class_type.startswith("Empty")
        )
    ]
    assert len(first) > 0.8 * NUM
    assert np.mean(np.array(first) == 1.0) > 0.95
    schedulers = [n for f in drawn for n in f.nodes.values() if n.class_type == "BasicScheduler"]
    assert np.mean([node.inputs["denoise"] == 1.0 for node in schedulers]) > 0.8


def test_heights_go_with_widths(drawn):
    sizes = Counter(
        (node.inputs["width"], node.inputs["height"])
        for flow in drawn
        for node in flow.nodes.values()
        if node.class_type == "EmptySD3LatentImage"
    )
    for width, height in ((896, 1152), (1024, 1024), (1328, 1328)):
        of_width = sum(count for size, count in sizes.items() if size[0] == width)
        assert sizes[width, height] > 0.5 * of_width > 0


def test_weights_that_nobody_wrote(example):
    """Ending and going on are equal, absence weighs twice the rest, links of literals little."""
    names = ["SaveImage", "BatchImagesNode", "EmptyImage", "PrimitiveInt", "ImageScale"]
    grammar = Grammar(example, classes=[*names, "ImageCompositeMasked", "SolidMask"])
    weights = {**t2i_weights(), "fields": {}, "recipes": []}
    table, ids = Table(grammar, weights), grammar.vocabulary.class_ids
    index = grammar.vocabulary.field_index

    def shares(*field):
        return table.shares(index[field], 0)

    more = shares("BatchImagesNode", "images.*")
    assert more["<end>"] == pytest.approx(sum(v for k, v in more.items() if k != "<end>"))
    # One link that must be there makes a class four times rarer; each image node here has some.
    assert (more["EmptyImage"], more["ImageScale"]) == (1.0, 0.25)
    mask = shares("ImageCompositeMasked", "mask")
    assert mask["<none>"] == pytest.approx(2 * sum(v for k, v in mask.items() if k != "<none>"))
    color = shares("EmptyImage", "color")
    field = index["EmptyImage", "color"]
    links = [ids["PrimitiveInt"], *range(voc.REF0, voc.REF0 + voc.NUM_REFS)]
    assert color["PrimitiveInt"] * len(links) == pytest.approx(0.005)
    assert table.for_literal[field].sum() == len(links)


def test_names_of_tokens_from_general_to_particular(installed):
    """By value for any class, by value for one class, and for one model from its file on."""
    weights = copy.deepcopy(t2i_weights())
    weights["fields"]["scheduler"] = {"*": 0.0, "karras": 1.0}
    weights["fields"]["BasicScheduler.scheduler"] = {"*": 0.0, "beta": 1.0}
    weights["recipes"] = [
        {"families": ["sdxl"], "fields": {"KSampler.scheduler": {"*": 0.0, "exponential": 1.0}}}
    ]
    found = Counter()
    for code in random_workflows(installed, 600, 1, weights):
        flow = decode(code.tokens, installed)
        family = families(flow, installed.catalogue) == {"sdxl"}
        if len(families(flow, installed.catalogue)) > 1:
            continue
        for node in flow.nodes.values():
            if "scheduler" in node.inputs:
                found[node.class_type, family, node.inputs["scheduler"]] += 1
    assert found.keys() == {
        ("KSampler", True, "exponential"),
        ("KSampler", False, "karras"),
        ("KSamplerAdvanced", True, "karras"),
        ("KSamplerAdvanced", False, "karras"),
        ("BasicScheduler", True, "beta"),
        ("BasicScheduler", False, "beta"),
    }


def test_files_in_folders_of_ones_own_are_known(example):
    """``sets/ae.safetensors`` is the decoder that recipes call ``ae.safetensors``."""
    moved = replace(
        example, files=tuple(replace(file, name=f"sets/{file.name}") for file in example.files)
    )
    grammar = Grammar(moved, budget=128, classes=text_to_image(moved))
    found = Counter()
    for code in random_workflows(grammar, 600, 0):
        flow = decode(code.tokens, grammar)
        if values(flow, "unet_name") & {"sets/flux1-dev.safetensors"}:
            found.update(values(flow, "vae_name"))
    assert found["sets/ae.safetensors"] > 0.9 * sum(found.values())


def test_estimated_weights_draw_more_like_the_examples(drawn, installed):
    examples = [flow for flow in drawn if "LoraLoader" in classes(flow)][:100]
    rare = sum("LoraLoader" in classes(flow) for flow in drawn) / NUM
    codes = random_workflows(installed, 600, 2, estimate_weights(examples, installed))
    flows = [decode(code.tokens, installed) for code in codes]
    problems = [p for flow in flows[::6] for p in validate(flow, installed.catalogue)]
    assert "error" not in {problem.severity for problem in problems}
    share = sum("LoraLoader" in classes(flow) for flow in flows) / len(flows)
    assert rare < 0.2
    assert share > 0.75


def test_estimated_weights_follow_values_and_smooth(grammar):
    weights = estimate_weights([two_pass()] * 8, grammar, smoothing=1.0)
    steps = weights["fields"]["KSampler.steps"]
    # Each of eight examples has 6 and 8 steps once; the shipped shares are one example more.
    shipped = weights_for(grammar)["fields"]["steps"]
    of_one = 1 / sum(shipped.values())
    assert steps["steps=6"] == steps["steps=8"] == pytest.approx(8 + 3 * of_one, abs=1e-5)
    assert steps["steps=20"] == pytest.approx(shipped["20"] * of_one, abs=1e-5)
    codes = random_workflows(grammar, 512, 0, weights)
    used = Counter(s for c in codes for s in values(decode(c.tokens, grammar), "steps"))
    assert used[6] + used[8] > 0.9 * sum(used.values())
    with pytest.raises(WorkflowError, match="examples: got none"):
        estimate_weights([], grammar)


def test_edits_stay_valid_and_sensible(drawn, installed, example):
    before = drawn[:1000]
    after = mutate_all(before, installed, np.random.default_rng(0))
    assert not [p for flow in after for p in validate(flow, example) if p.severity == "error"]
    pairs = list(zip(before, after, strict=True))
    assert np.mean([a.fingerprint() != b.fingerprint() for a, b in pairs]) > 0.99
    gained = Counter(c for a, b in pairs for c in classes(b) - classes(a))
    assert len(gained) > 12
    assert gained["LoraLoaderModelOnly"] + gained["LoraLoader"] > 1
    # Few models are swapped for one of another family, which takes encoder and decoder along.
    moved = [b for a, b in pairs if families(a, example) != families(b, example)]
    assert 10 < len(moved) < 100
    kinds = [(families(flow, example), values(flow, "type")) for flow in moved]
    known = [(ENCODERS[min(f)], types) for f, types in kinds if len(f) == 1 and min(f) in ENCODERS]
    checked = [types == wanted for wanted, types in known if types]
    assert len(checked) > 2
    assert np.mean(checked) > 0.9


def test_edits_bring_the_loader_that_is_lacking(drawn, installed):
    """An upscaling by a model needs its loader, which no workflow without it has."""
    plain = [flow for flow in drawn if "UpscaleModelLoader" not in classes(flow)][:600]
    after = mutate_all(plain, installed, np.random.default_rng(1))
    found = [flow for flow in after if "ImageUpscaleWithModel" in classes(flow)]
    assert found
    assert all("UpscaleModelLoader" in classes(flow) for flow in found)

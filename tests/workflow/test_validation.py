"""Facts: every fault has ComfyUI's type where it has one, its node, its input and a suggestion; all
are found at once; nothing that can be read from a file makes the validator raise."""

from __future__ import annotations

import copy
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowloom.workflow import Catalogue, Workflow, is_valid, validate
from tests.workflow.flows import PLAIN, plain, plain_api, split_catalogue, two_pass

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def found(problems):
    return [(p.type, p.node_id, p.input) for p in problems]


def test_good_flows_have_no_problem(embedded):
    for workflow in (plain(), two_pass(), two_pass().fill("x", seed=2**64 - 1)):
        assert validate(workflow, embedded) == []
        assert validate(workflow.to_api(), embedded) == []
    assert is_valid(PLAIN, embedded)


@pytest.mark.parametrize(
    ("changes", "expected", "suggestion"),
    [
        ({"n3_cfg": None}, ("required_input_missing", "3", "cfg"), "the default is 8.0"),
        ({"n3_steps": 0}, ("value_smaller_than_min", "3", "steps"), "use 1"),
        ({"n3_cfg": 100.1}, ("value_bigger_than_max", "3", "cfg"), "use 100.0"),
        ({"n3_seed": -1}, ("value_smaller_than_min", "3", "seed"), "use 0"),
        ({"n3_seed": 2**64}, ("value_bigger_than_max", "3", "seed"), "use 1844674407370955161"),
        ({"n3_steps": "many"}, ("invalid_input_type", "3", "steps"), "the default is 20"),
        ({"n3_cfg": float("nan")}, ("invalid_input_type", "3", "cfg"), "the default is 8.0"),
        ({"n3_cfg": float("inf")}, ("invalid_input_type", "3", "cfg"), "the default is 8.0"),
        ({"n3_cfg": {"a": 1}}, ("invalid_input_type", "3", "cfg"), "the default is 8.0"),
        ({"n3_sampler_name": "eular"}, ("value_not_in_list", "3", "sampler_name"), "euler?"),
        ({"n3_sampler_name": 1}, ("value_not_in_list", "3", "sampler_name"), "use one of: euler"),
        (
            {"n4_ckpt_name": "shapes/shapes-base.safetensors"},
            ("value_not_in_list", "4", "ckpt_name"),
            "did you mean shapes-base.safetensors?",
        ),
        ({"n3_model": ["4", 1]}, ("return_type_mismatch", "3", "model"), "output 0 of that node"),
        ({"n3_model": ["4", 3]}, ("bad_linked_input", "3", "model"), ""),
        ({"n3_model": ["4", -3]}, ("bad_linked_input", "3", "model"), ""),
        ({"n3_model": ["4"]}, ("bad_linked_input", "3", "model"), "a link is [node id"),
        ({"n3_model": [4, 0]}, ("bad_linked_input", "3", "model"), 'such as ["4", 0]'),
        ({"n3_model": ["404", 0]}, ("bad_linked_input", "3", "model"), ""),
        ({"n3_model": "abc"}, ("literal_for_link", "3", "model"), ""),
        ({"n3_model": 7}, ("literal_for_link", "3", "model"), ""),
        ({"n6_text": {"a": 1}}, ("invalid_input_type", "6", "text"), ""),
    ],
)
def test_one_fault(embedded, changes, expected, suggestion):
    problems = [p for p in validate(plain_api(**changes), embedded) if p.severity == "error"]
    assert found(problems) == [expected]
    assert suggestion in problems[0].suggestion
    assert problems[0].class_type == PLAIN[expected[1]]["class_type"]
    assert not is_valid(plain_api(**changes), embedded)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n3_cfg": 2.55}, ("off_step", "3", "cfg")),
        ({"n3_steps": "8"}, ("coerced_value", "3", "steps")),
        ({"n3_steps": 8.7}, ("coerced_value", "3", "steps")),
        ({"n3_steps": True}, ("coerced_value", "3", "steps")),
        ({"n3_extra": 1}, ("unknown_input", "3", "extra")),
        ({"n9_filename_prefix": 5}, ("coerced_value", "9", "filename_prefix")),
    ],
)
def test_what_a_server_lets_pass_is_a_warning(embedded, changes, expected):
    problems = validate(plain_api(**changes), embedded)
    assert found(problems) == [expected]
    assert problems[0].severity == "warning"
    assert is_valid(plain_api(**changes), embedded)


def test_a_number_written_as_a_text_is_called_one(embedded):
    (problem,) = validate(plain_api(n3_steps="8"), embedded)
    assert problem.message == "the text '8' is read as 8"


def test_off_step_names_the_nearest_value(embedded):
    problems = validate(plain_api(n5_width=35), embedded)
    assert found(problems) == [("off_step", "5", "width")]
    assert problems[0].suggestion == "nearest is 32"
    assert validate(plain_api(n3_cfg=7.3, n3_denoise=0.29), embedded) == []


def test_all_problems_at_once(embedded):
    api = plain_api(n3_cfg=None, n3_steps=-4, n3_model=["4", 2], n4_ckpt_name="x")
    api["6"]["class_type"] = "CLIPTextEncoder"
    api["50"] = copy.deepcopy(PLAIN["5"])
    assert sorted(found(validate(api, embedded))) == [
        ("missing_node_type", "6", ""),
        ("required_input_missing", "3", "cfg"),
        ("return_type_mismatch", "3", "model"),
        ("unreachable_node", "50", ""),
        ("value_not_in_list", "4", "ckpt_name"),
        ("value_smaller_than_min", "3", "steps"),
    ]
    missing = next(p for p in validate(api, embedded) if p.type == "missing_node_type")
    assert missing.suggestion == "did you mean CLIPTextEncode?"


@pytest.mark.parametrize(
    ("node_id", "node"),
    [
        ("9", {"class_type": "SaveImagePlus", "inputs": {"pictures": ["8", 0]}}),
        ("8", {"class_type": "VAEDecoder", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}}),
        ("9", {"class_type": "SaveImage", "inputs": {"images": [8, 0], "filename_prefix": "x"}}),
    ],
)
def test_below_a_broken_node_or_link_all_is_looked_into(embedded, node_id, node):
    api = plain_api(n3_steps=-4, n5_width=-8)
    api[node_id] = node
    kinds = [p.type for p in validate(api, embedded)]
    assert kinds.count("value_smaller_than_min") == 2
    assert not {"unreachable_node", "prompt_no_outputs"} & set(kinds)


def test_unreachable_is_a_warning_and_is_not_looked_into(embedded):
    api = plain_api()
    api["50"] = {"class_type": "KSampler", "inputs": {"steps": -1}}
    problems = validate(api, embedded)
    assert found(problems) == [("unreachable_node", "50", "")]
    assert problems[0].severity == "warning"


def test_no_outputs(embedded):
    api = {k: v for k, v in PLAIN.items() if k != "9"}
    assert ("prompt_no_outputs", "", "") in found(validate(api, embedded))
    (problem,) = validate({}, embedded)
    assert found([problem]) == [("prompt_no_outputs", "", "")]
    assert problem.suggestion == "add SaveImage or PreviewImage"


def test_cycles(embedded):
    api = plain_api()
    for node, source in (("20", "21"), ("21", "22"), ("22", "20")):
        api[node] = {
            "class_type": "ConditioningZeroOut",
            "inputs": {"conditioning": [source, 0]},
        }
    api["3"]["inputs"]["negative"] = ["20", 0]
    del api["7"]
    assert sorted(found(validate(api, embedded))) == [
        ("dependency_cycle", node, "") for node in ("20", "21", "22")
    ]
    api = plain_api(n3_latent_image=["3", 0])
    assert ("dependency_cycle", "3", "") in found(validate(api, embedded))


def test_families():
    catalogue = split_catalogue()
    api = plain_api(n4_ckpt_name="one.safetensors")
    assert validate(api, catalogue) == []
    api["10"] = {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["4", 0],
            "clip": ["4", 1],
            "lora_name": "three-lora.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
        },
    }
    api["3"]["inputs"]["model"] = ["10", 0]
    problems = validate(api, catalogue)
    assert found(problems) == [("family_mismatch", "10", "lora_name")]
    assert problems[0].suggestion == "use a one file for lora_name"
    api["3"]["inputs"]["model"] = ["4", 0]
    api["40"] = {"class_type": "VAELoader", "inputs": {"vae_name": "three-vae.safetensors"}}
    api["8"]["inputs"]["vae"] = ["40", 0]
    assert ("family_mismatch", "8", "vae") in found(validate(api, catalogue))


def test_resource_bounds(embedded):
    """64 x 64 pixels, batch 1; 32 x 32 at 6 steps is 6,144 pixel steps."""
    assert validate(plain_api(n5_width=64, n5_height=64), embedded) == []
    assert found(validate(plain_api(n5_width=72, n5_height=64), embedded)) == [
        ("resource_bound", "5", "")
    ]
    assert found(validate(plain_api(n5_batch_size=2), embedded)) == [
        ("resource_bound", "5", "batch_size")
    ]
    # The bound on work is 819,200: 800 steps of 32 x 32 pixels and not one more.
    assert validate(plain_api(n3_steps=800), embedded) == []
    problems = validate(plain_api(n3_steps=801), embedded)
    assert found(problems) == [("resource_bound", "3", "steps")]
    # 32 scaled by 1.5 and by 2 is 96.
    api = two_pass().to_api()
    api["30"] = {
        "class_type": "ImageScaleBy",
        "inputs": {"image": ["8", 0], "upscale_method": "area", "scale_by": 2.0},
    }
    api["9"]["inputs"]["images"] = ["30", 0]
    assert found(validate(api, embedded)) == [("resource_bound", "30", "")]


@given(JSON)
@settings(max_examples=200)
def test_garbage_never_raises(embedded, value):
    problems = validate(value, embedded)
    assert problems
    assert all(len(p.message) < 400 and "\n" not in repr(p.type) for p in problems)


@given(st.sampled_from(list(PLAIN)), st.sampled_from(["class_type", "inputs", "x"]), JSON, JSON)
@settings(max_examples=200)
def test_damaged_flows_never_raise(embedded, node, key, value, other):
    api = copy.deepcopy(PLAIN)
    api["3"]["inputs"]["steps"] = other
    api["3"]["inputs"]["model"] = other
    api[node][key] = value  # last, for it may take the inputs away
    validate(api, embedded)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(10**5000, id="huge number"),
        pytest.param("9" * 10_000, id="many digits"),
        pytest.param("x" * 10**7, id="long text"),
        [[[]]],
        ["3", 10**30],
        b"bytes",
        object(),
        {1: 2},
        1e308,
    ],
)
def test_extreme_values(embedded, value):
    for name in ("n3_steps", "n3_cfg", "n3_model", "n4_ckpt_name", "n5_width", "n6_text"):
        start = time.process_time()
        problems = validate(plain_api(**{name: value}), embedded)
        assert time.process_time() - start < 1.0
        assert all(len(p.message) < 400 for p in problems)


def test_keys_that_are_no_strings(embedded):
    api = {**PLAIN, 5: PLAIN["5"], None: 3}
    assert ("invalid_prompt", "5", "") in found(validate(api, embedded))


def test_deep_and_wide_graphs_are_bounded(embedded):
    api = copy.deepcopy(PLAIN)
    source = ["6", 0]
    for k in range(5000):
        api[f"d{k}"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": source}}
        source = [f"d{k}", 0]
    api["3"]["inputs"]["negative"] = source
    del api["7"]
    assert validate(api, embedded) == []
    wide = {str(k): {"class_type": "VAEDecode", "inputs": {}} for k in range(20_000)}
    assert found(validate(wide, embedded)) == [("resource_bound", "", "")]


def test_workflow_objects_and_json_agree(embedded):
    api = plain_api(n3_model="abc", n3_cfg=None)
    assert validate(Workflow.from_api(api), embedded) == validate(api, embedded)


def test_wildcards_and_sets_of_types():
    def nodes(wanted, received):
        return {
            "Save": {
                "inputs": [{"name": "a", "type": wanted}],
                "outputs": [],
                "output_node": True,
            },
            "Make": {"inputs": [], "outputs": [received]},
        }

    api = {
        "1": {"class_type": "Save", "inputs": {"a": ["2", 0]}},
        "2": {"class_type": "Make", "inputs": {}},
    }
    for wanted, received, fits in [
        ("IMAGE", "IMAGE", True), ("*", "IMAGE", True), ("IMAGE", "*", True),
        ("IMAGE,MASK", "MASK", True), ("IMAGE", "MASK,IMAGE", True), ("IMAGE", "IMAG", False),
        ("COMFY_MATCHTYPE_V3", "IMAGE", True), ("IMAGE,MASK", "LATENT", False),
    ]:  # fmt: skip
        catalogue = Catalogue.from_json({"nodes": nodes(wanted, received), "files": []})
        assert is_valid(api, catalogue) == fits

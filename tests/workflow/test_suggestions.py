"""Facts: choices, growing inputs, editor widgets and sets of types are judged as a server does; a
problem of a value names the nearest legal one, which mends it; a missing file is replaced by an
installed one, first the same file elsewhere, a link by an output that closes no cycle; all in
bounded time."""

from __future__ import annotations

import copy
import random
import time

import pytest

from flowloom.workflow import Catalogue, Link, ModelFile, is_valid, validate
from flowloom.workflow.suggestions import MAX_LOOKUPS
from tests.workflow.flows import PLAIN, plain_api, split_catalogue, two_pass

INT = ["INT", {"default": 512, "min": 0, "max": 16384, "step": 8}]
INFO = {
    "Resize": {
        "input": {
            "required": {
                "input": ["COMFY_MATCHTYPE_V3", {}],
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "both", "inputs": {"required": {"width": INT, "height": INT}}},
                            {
                                "key": "nested",
                                "inputs": {
                                    "required": {
                                        "inner": [
                                            "COMFY_DYNAMICCOMBO_V3",
                                            {
                                                "options": [
                                                    {"key": "a", "inputs": {"optional": {"n": INT}}}
                                                ]
                                            },
                                        ]
                                    }
                                },
                            },
                        ]
                    },
                ],
            }
        },
        "output": ["COMFY_MATCHTYPE_V3"],
    },
    "Batch": {
        "input": {
            "required": {
                "images": [
                    "COMFY_AUTOGROW_V3",
                    {
                        "template": {
                            "input": {"required": {"image": ["IMAGE", {}]}},
                            "prefix": "image",
                            "min": 2,
                            "max": 3,
                        }
                    },
                ]
            }
        },
        "output": ["IMAGE"],
    },
    "LoadImage": {
        "input": {"required": {"image": [["cat.png", "dog.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
    },
    "Values": {
        "input": {
            "required": {
                "colour": ["COLOR", {"default": "#fff"}],
                "tags": [["red", "green", "blue"], {"multiselect": True}],
                "strength": ["FLOAT", {"forceInput": True, "min": 0.0, "max": 1.0}],
                "number": ["INT,FLOAT", {}],
                "any": ["*", {}],
                "mode": [["fast", "slow", 8, "dpmpp_2m", "res_multistep"], {}],
            },
            "optional": {"text": ["STRING", {}]},
        },
        "output": ["STRING", "COMBO", "INT"],
    },
    "Save": {"input": {"required": {"a": ["*", {}]}}, "output": [], "output_node": True},
}
GOOD = {
    "colour": {"r": [1, 2, 3]},
    "tags": {"__value__": ["red", "blue"]},
    "strength": 0.5,
    "number": 3,
    "any": ["1", 0],
    "mode": "fast",
}


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.from_object_info(INFO)


def flow(class_type, **inputs):
    """A picture, one node that reads it, and an output."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
        "2": {"class_type": class_type, "inputs": inputs},
        "3": {"class_type": "Save", "inputs": {"a": ["2", 0]}},
    }


def found(problems):
    return [(p.type, p.input) for p in problems if p.type != "unreachable_node"]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"mode": "both", "mode.width": 64, "mode.height": 8}, []),
        ({"mode": "both", "mode.width": 64}, [("required_input_missing", "mode.height")]),
        ({"mode": "both", "mode.width": 65, "mode.height": 8}, [("off_step", "mode.width")]),
        (
            {"mode": "both", "mode.width": -1, "mode.height": 8},
            [("value_smaller_than_min", "mode.width")],
        ),
        ({"mode": "bot"}, [("value_not_in_list", "mode")]),
        ({"mode": 5}, [("value_not_in_list", "mode")]),
        ({"mode": {}}, [("value_not_in_list", "mode")]),
        ({}, [("required_input_missing", "mode")]),
        ({"mode": "nested"}, [("required_input_missing", "mode.inner")]),
        ({"mode": "nested", "mode.inner": "a"}, []),
        ({"mode": "nested", "mode.inner": "a", "mode.inner.n": 8}, []),
        (
            {"mode": "nested", "mode.inner": "a", "mode.inner.n": "x", "mode.width": 8},
            [("unknown_input", "mode.width"), ("invalid_input_type", "mode.inner.n")],
        ),
    ],
)
def test_choices(catalogue, inputs, expected):
    assert found(validate(flow("Resize", input=["1", 0], **inputs), catalogue)) == expected
    # The same again, now that the plan is there already.
    assert found(validate(flow("Resize", input=["1", 0], **inputs), catalogue)) == expected


def test_a_class_that_is_like_no_other_is_taken_for_none():
    spec = {"input": {"required": {}}, "output": []}
    catalogue = Catalogue.from_object_info({"LTXVAudioVAEEncode": spec, "KSampler": spec})
    hints = {}
    for name in ("ClaudeNode", "ksampler_"):
        problems = validate({"1": {"class_type": name, "inputs": {}}}, catalogue)
        hints[name] = [p.suggestion for p in problems if p.type == "missing_node_type"]
    assert hints == {"ClaudeNode": [""], "ksampler_": ["did you mean KSampler?"]}


def test_an_input_of_another_choice_is_told_what_it_goes_with(catalogue):
    api = flow("Resize", input=["1", 0], mode="bot", **{"mode.width": 64})
    hints = {p.input: p.suggestion for p in validate(api, catalogue)}
    assert hints["mode"] == "did you mean both?"
    assert hints["mode.width"] == "it goes with mode = both"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("images.image0", "images.image1"), []),
        (("images.image0", "images.image1", "images.image2"), []),
        (("images.image0",), [("required_input_missing", "images.image1")]),
        (
            ("images.image0", "images.image1", "images.image3", "images"),
            [("unknown_input", "images.image3"), ("unknown_input", "images")],
        ),
    ],
)
def test_growing_inputs(catalogue, names, expected):
    api = flow("Batch", **{name: ["1", 0] for name in names})
    assert found(validate(api, catalogue)) == expected
    api = flow("Batch", **{name: ["1", 1] for name in names})
    mismatches = [p for p in validate(api, catalogue) if p.type == "return_type_mismatch"]
    assert len(mismatches) == min(len(names), 2 + ("images.image2" in names))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("colour", 5, []),
        ("colour", None, []),
        ("colour", [1, 2, 3], ["bad_linked_input"]),
        ("tags", {"__value__": []}, []),
        ("tags", "red", []),
        ("tags", ["red", "green", "blue"], ["bad_linked_input"]),
        ("tags", {"__value__": ["red", "gren"]}, ["value_not_in_list"]),
        ("strength", 1.5, ["value_bigger_than_max"]),
        ("strength", "much", ["invalid_input_type"]),
        ("strength", ["1", 0], ["return_type_mismatch"]),
        ("number", 2.5, []),
        ("number", "2.5", ["literal_for_link"]),
        ("number", ["1", 0], ["return_type_mismatch"]),
        ("any", 5, ["literal_for_link"]),
        ("any", None, ["literal_for_link"]),
        ("mode", 8, []),
        ("mode", "8", ["value_not_in_list"]),
        ("mode", True, ["value_not_in_list"]),
        ("text", {"__value__": "x"}, []),
        ("text", None, ["invalid_input_type"]),
    ],
)
def test_special_values(catalogue, name, value, expected):
    assert validate(flow("Values", **GOOD), catalogue) == []
    problems = validate(flow("Values", **{**GOOD, name: value}), catalogue)
    assert [p.type for p in problems if p.severity == "error" or p.type != "unreachable_node"] == (
        expected
    )


@pytest.mark.parametrize(
    ("slot", "name", "fits"),
    [
        (0, "text", True),
        (0, "mode", False),
        (1, "mode", True),
        (1, "tags", True),
        (1, "text", False),
        (2, "number", True),
        (2, "strength", False),
    ],
)
def test_links_into_literals_follow_the_type_rule(catalogue, slot, name, fits):
    api = flow("Values", **GOOD)
    api["4"] = {"class_type": "Values", "inputs": {**GOOD, name: ["2", slot]}}
    api["3"]["inputs"]["a"] = ["4", 0]
    expected = [] if fits else [("return_type_mismatch", name)]
    assert found(validate(api, catalogue)) == expected


def test_a_missing_picture(catalogue):
    problems = validate(
        flow("Resize") | {"1": {"class_type": "LoadImage", "inputs": {}}}, catalogue
    )
    assert ("required_input_missing", "input") in found(problems)
    api = flow("Resize", input=["1", 0], mode="nested", **{"mode.inner": "a"})
    api["1"]["inputs"]["image"] = "cot.png"
    (problem,) = validate(api, catalogue)
    assert (problem.type, problem.suggestion) == (
        "custom_validation_failed",
        "did you mean cat.png?",
    )
    for name, valid in [("dog.png [input]", True), ("x [output]", True), ("x [input]", False)]:
        api["1"]["inputs"]["image"] = name
        assert is_valid(api, catalogue) == valid


@pytest.mark.parametrize(
    ("changes", "fixes"),
    [
        ({"n3_steps": "20 steps"}, (20,)),
        ({"n3_steps": "-7e9x"}, (1,)),
        ({"n3_steps": 10**400}, (10000,)),
        ({"n5_width": 99999}, (16384,)),
        ({"n5_width": 37}, (40,)),
        ({"n3_cfg": "7,5"}, (7.0,)),
        ({"n3_steps": 8.7}, (8,)),
        ({"n3_sampler_name": "Euler"}, ("euler",)),
        ({"n3_scheduler": None}, ("simple",)),
        ({"n3_model": ["4", -3]}, (Link("4", 0),)),
        ({"n3_positive": ["99", 0]}, (Link("6", 0), Link("7", 0))),
        ({"n8_samples": None}, (Link("3", 0), Link("5", 0))),
    ],
)
def test_the_nearest_legal_value(embedded, changes, fixes):
    problem = next(p for p in validate(plain_api(**changes), embedded) if p.fixes)
    assert problem.fixes[: len(fixes)] == fixes
    assert problem.suggestion or problem.type == "coerced_value"


def test_the_greatest_value_may_lie_on_no_step():
    entry = ["INT", {"min": 0, "max": 20, "step": 8}]
    info = {"A": {"input": {"required": {"a": entry}}, "output": [], "output_node": True}}
    (problem,) = validate(
        {"1": {"class_type": "A", "inputs": {"a": 25}}}, Catalogue.from_object_info(info)
    )
    assert problem.fixes == (16,)


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("Res Multistep", "res_multistep"),
        ("Res M", "res_multistep"),
        ("8.0", 8),
        ("fst", "fast"),
    ],
)
def test_options_as_people_write_them(catalogue, value, fix):
    (problem,) = validate(flow("Values", **{**GOOD, "mode": value}), catalogue)
    assert problem.fixes[0] == fix
    assert problem.suggestion == f"did you mean {fix}?"


def test_installed_substitutes():
    """The same file elsewhere, then names alike, then files of the family in use."""
    files = [
        ModelFile("loras", name, "", family)
        for name, family in [
            ("detail-v2.safetensors", "one"),
            ("one/Detail.safetensors", "one"),
            ("other.safetensors", "three"),
            ("zzz.safetensors", "one"),
            ("style_fp16.safetensors", "three"),
            ("style2.safetensors", "one"),
        ]
    ]
    catalogue = split_catalogue().with_files(files)
    api = plain_api(n4_ckpt_name="one.safetensors")
    inputs = {"model": ["4", 0], "clip": ["4", 1], "strength_model": 1.0, "strength_clip": 1.0}
    api["10"] = {"class_type": "LoraLoader", "inputs": inputs}
    api["3"]["inputs"]["model"] = ["10", 0]

    def substitutes(name):
        inputs["lora_name"] = name
        (problem,) = (p for p in validate(api, catalogue) if p.type == "value_not_in_list")
        assert name in problem.message
        assert "loras" in problem.message
        return problem.fixes

    assert substitutes("flux\\detail.safetensors")[0] == "one/Detail.safetensors"
    assert substitutes("detail-v3.safetensors")[0] == "detail-v2.safetensors"
    # Format and precision do not make names alike; of names alike, the family in use comes first.
    assert substitutes("style-v1_fp8_scaled.safetensors") == (
        "style2.safetensors",
        "style_fp16.safetensors",
    )
    assert substitutes("q_fp16.safetensors") == (
        "detail-v2.safetensors",
        "one/Detail.safetensors",
        "style2.safetensors",
        "zzz.safetensors",
    )


def test_a_fix_closes_no_cycle(embedded):
    """Node 3 is missing its latent; node 11 gives one, but is made from node 3."""
    api = two_pass().to_api()
    del api["3"]["inputs"]["latent_image"]
    (problem,) = (p for p in validate(api, embedded) if p.type == "required_input_missing")
    assert problem.fixes == (Link("5", 0),)
    # Of outputs that are all in use, the one nearest to the end.
    late = two_pass().to_api()
    del late["12"]["inputs"]["model"]
    (missing,) = (p for p in validate(late, embedded) if p.type == "required_input_missing")
    assert missing.fixes == (Link("10", 0), Link("4", 0))
    del api["5"]
    (problem,) = (p for p in validate(api, embedded) if p.type == "required_input_missing")
    assert problem.fixes == ()
    assert "EmptyLatentImage" in problem.suggestion


def test_every_fix_mends_its_problem(embedded):
    """600 seeded corruptions; the first fix put in place takes the problem away."""
    rng = random.Random(0)
    split, mended = split_catalogue(), 0
    junk = [None, -5, 10**30, "7.5 or so", "eulr", "x", 0.123456, True, {}, ["4", 1], ["4", 9]]
    for _ in range(600):
        catalogue = rng.choice([embedded, split])
        api = copy.deepcopy(rng.choice([PLAIN, two_pass().to_api()]))
        for _ in range(3):
            node = rng.choice(list(api.values()))["inputs"]
            if node and rng.random() < 0.7:
                node[rng.choice(list(node))] = rng.choice(junk)
            elif node:
                del node[rng.choice(list(node))]
        for problem in validate(api, catalogue):
            if not problem.fixes:
                continue
            fixed = copy.deepcopy(api)
            fixed[problem.node_id]["inputs"][problem.input] = problem.fixes[0]
            left = {(p.type, p.node_id, p.input) for p in validate(fixed, catalogue)}
            assert (problem.type, problem.node_id, problem.input) not in left, problem
            mended += 1
    assert mended > 500


def test_a_graph_in_which_all_is_wrong_is_judged_in_bounded_time(embedded):
    many = [ModelFile("loras", f"{k}/{k * 7919}-detail.safetensors", "", "") for k in range(5000)]
    catalogue = embedded.with_files(many)
    api = copy.deepcopy(PLAIN)
    for k in range(3000):
        inputs = {"lora_name": f"{k}-missing", "model": [f"l{k - 1}", 7], "clip": [f"{k}?", 0]}
        api[f"l{k}"] = {"class_type": "LoraLoader", "inputs": inputs}
        api[f"u{k}"] = {"class_type": f"Sampler{k}", "inputs": {}}
    api["3"]["inputs"]["model"] = ["l2999", 0]
    start = time.process_time()
    problems = validate(api, catalogue)
    assert time.process_time() - start < 5.0
    assert len(problems) == 10_001
    assert problems[-1].type == "resource_bound"
    links = [p for p in problems if p.type == "bad_linked_input"]
    assert sum(bool(p.suggestion) for p in links) <= MAX_LOOKUPS < len(links)


def test_size_and_steps_may_come_from_a_primitive():
    """512 x 512 pixels, 4 a batch; a linked or textual number counts as much as a plain one."""
    info = {
        "PrimitiveInt": {"input": {"required": {"value": ["INT", {}]}}, "output": ["INT"]},
        "Empty": {
            "input": {"required": {"width": ["INT", {}], "height": ["INT", {}]}},
            "output": ["LATENT"],
        },
        "Save": INFO["Save"],
    }
    limits = type(Catalogue.load("embedded").limits)(pixels=512 * 512)
    catalogue = Catalogue.from_object_info(info, limits=limits)
    api = {
        "1": {"class_type": "PrimitiveInt", "inputs": {"value": 513}},
        "2": {"class_type": "Empty", "inputs": {"width": 512, "height": 512}},
        "3": {"class_type": "Save", "inputs": {"a": ["2", 0]}},
    }
    assert is_valid(api, catalogue)
    for large in (["1", 0], "513", {"__value__": 513}):
        api["2"]["inputs"]["width"] = large
        assert not is_valid(api, catalogue)


def test_plans_go_with_their_catalogue():
    from flowloom.workflow import plans

    catalogue = split_catalogue()
    validate(PLAIN, catalogue)
    held = id(catalogue)
    assert held in plans._PLANS
    del catalogue
    assert held not in plans._PLANS

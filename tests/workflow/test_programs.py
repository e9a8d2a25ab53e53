"""Facts: choices take an option and its inputs, growing inputs end by <end> or when full, <none> is
a gap; literals and seeds may be linked; far references and odd values are spelled; whatever API
JSON holds comes back as it was."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowloom.workflow import Catalogue, Codec, CodecError, Vocabulary, Workflow

SOURCES = {
    "Picture": {"inputs": {"required": {}}, "output": ["IMAGE"]},
    "Word": {
        "inputs": {"required": {"value": ["STRING", {"default": "a"}]}},
        "output": ["STRING"],
    },
    "Number": {"inputs": {"required": {"value": ["INT", {"default": 0}]}}, "output": ["INT"]},
    "Many": {"inputs": {"required": {}}, "output": ["INT"] * 11},
    "Anything": {"inputs": {"required": {}}, "output": ["*"]},
    "Name": {"inputs": {"required": {}}, "output": [["a.safetensors", "b.safetensors"]]},
    "Noise": {
        "inputs": {
            "required": {
                "seed": ["INT", {"default": 0, "max": 2**64 - 1}],
                "noise_seed": ["INT", {"default": 0, "max": 2**64 - 1}],
                "amount": ["FLOAT", {"default": 1.0}],
            }
        },
        "output": ["IMAGE", "INT"],
    },
}
OPTIONS = [
    {"key": "none", "inputs": {}},
    {"key": "size", "inputs": {"required": {
        "width": ["INT", {"default": 512}], "method": ["COMBO", {"options": ["near", "far"]}]}}},
    {"key": "scale", "inputs": {"required": {"width": ["FLOAT", {"default": 0.5}]},
                                "optional": {"mode": ["COMFY_DYNAMICCOMBO_V3", {"options": [
        {"key": "plain", "inputs": {}},
        {"key": "deep", "inputs": {"required": {
            "seed": ["INT", {"default": 0}],
            "images": ["COMFY_AUTOGROW_V3", {"template": {
                "prefix": "i", "min": 0, "max": 2,
                "input": {"required": {"image": ["IMAGE", {}]}}}}]}}},
    ]}]}}},
]  # fmt: skip
GROWING = {"prefix": "image", "min": 2, "max": 4, "input": {"required": {"image": ["IMAGE", {}]}}}
NAMED = {"names": ["a", "b"], "min": 0, "input": {"required": {"x": ["FLOAT,INT", {}]}}}
SINK = {
    "inputs": {
        "required": {
            "images": ["COMFY_AUTOGROW_V3", {"template": GROWING}],
            "resize": ["COMFY_DYNAMICCOMBO_V3", {"options": OPTIONS}],
            "text": ["STRING", {"multiline": True}],
            "name": ["STRING", {"default": "x"}],
            "count": ["INT", {"default": 1}],
            "ckpt_name": [["a.safetensors", "b.safetensors"], {}],
        },
        "optional": {
            "values": ["COMFY_AUTOGROW_V3", {"template": NAMED}],
            "tags": ["COMBO", {"options": ["p", "q"], "multiselect": True}],
            "curve": ["CURVE", {"default": {"points": [[0.0, 0.0], [1.0, 1.0]]}}],
            "any": ["COMFY_MATCHTYPE_V3", {}],
            "socket": ["FLOAT", {"forceInput": True}],
            "free": ["COMBO", {"options": []}],
        },
    },
    "output": [],
    "output_node": True,
}


@pytest.fixture(scope="module")
def codec():
    info = {
        name: {"input": raw["inputs"], **raw} for name, raw in {**SOURCES, "Sink": SINK}.items()
    }
    catalogue = Catalogue.from_object_info(info)
    return Codec(catalogue, Vocabulary.build(catalogue))


def graph(**inputs):
    """A sink with the inputs a server asks for and these; p, w, n, m, x are sources."""
    plain: dict = {
        "images.image0": ["p", 0], "images.image1": ["p", 0], "resize": "none",
        "text": "{prompt}", "name": "x", "count": 1, "ckpt_name": "a.safetensors",
    }  # fmt: skip
    plain.update({name.replace("__", "."): value for name, value in inputs.items()})
    plain = {name: value for name, value in plain.items() if value is not None}
    api = {
        "1": {"class_type": "Sink", "inputs": plain},
        "p": {"class_type": "Picture", "inputs": {}},
        "w": {"class_type": "Word", "inputs": {"value": "a"}},
        "n": {"class_type": "Number", "inputs": {"value": 0}},
        "m": {"class_type": "Many", "inputs": {}},
        "x": {"class_type": "Anything", "inputs": {}},
        "f": {"class_type": "Name", "inputs": {}},
    }  # fmt: skip
    return api


def words(api, codec):
    """The code of a graph, which comes back from it as it was."""
    workflow = Workflow.from_api(api)
    code = codec.encode(workflow)
    again = codec.decode(code.tokens, code.texts, code.seeds)
    outputs = codec.catalogue.output_classes
    assert again.fingerprint(outputs) == workflow.fingerprint(outputs)
    assert codec.encode(again) == code
    nodes, fields = codec.annotate(code.tokens)
    assert (nodes >= 0).all()
    assert (fields >= 0).all()
    return [codec.vocabulary.token_text(t) for t in code.tokens]


HEAD = ["Sink", "Picture", "<ref0>", "<end>"]
BODY = ["<prompt>", "name=x", "count=1", "checkpoints/a.safetensors"]
TAIL = ["<end>", "<none>", "<none>", "<none>", "<none>", "<none>", "<eos>"]


def test_a_choice_brings_its_inputs(codec):
    assert words(graph(), codec) == [*HEAD, "resize=none", *BODY, *TAIL]
    sized = graph(resize="size", resize__width=512, resize__method="far")
    assert words(sized, codec)[4:7] == ["resize=size", "px=512", "method=far"]
    # Branches may share a name: here width is a float, and the same integer is spelled.
    scaled = graph(resize="scale", resize__width=0.5, resize__mode="plain")
    assert words(scaled, codec)[4:7] == ["resize=scale", "width=0.5", "mode=plain"]
    spelled = words(graph(resize="scale", resize__width=512), codec)
    assert spelled[4:11] == ["resize=scale", "<num>", "<x5>", "<x1>", "<x2>", "<num>", "<none>"]


def test_a_choice_in_a_choice(codec):
    deep = graph(resize="scale", resize__width=0.5, resize__mode="deep", resize__mode__seed=7,
                 resize__mode__images__i1=["p", 0])  # fmt: skip
    # The gap is <none>; both are given, so no <end>.
    assert words(deep, codec)[4:9] == ["resize=scale", "width=0.5", "mode=deep", "<none>", "<ref0>"]
    del deep["1"]["inputs"]["resize.mode.images.i1"]
    assert words(deep, codec)[6:8] == ["mode=deep", "<end>"]
    deep["1"]["inputs"]["resize.mode.seed"] = ["n", 0]
    linked = words(deep, codec)
    assert linked[0] == "<seed>"
    assert linked[7:11] == ["mode=deep", "Number", "value=0", "<end>"]


def test_growing_inputs(codec):
    assert words(graph(images__image2=["p", 0]), codec)[:5] == [
        "Sink", "Picture", "<ref0>", "<ref0>", "<end>",
    ]  # fmt: skip
    gap = graph(images__image3=["p", 0])
    assert words(gap, codec)[:6] == ["Sink", "Picture", "<ref0>", "<none>", "<ref0>", "resize=none"]
    assert words(graph(images__image1=None), codec)[:4] == ["Sink", "Picture", "<none>", "<end>"]
    both = words(graph(values__a=["n", 0], values__b=["n", 0]), codec)
    assert both[-9:-6] == ["Number", "value=0", "<ref0>"]
    with pytest.raises(CodecError, match=r"input images\.image4 is not in the catalogue"):
        codec.encode(Workflow.from_api(graph(images__image4=["p", 0])))


def test_literals_may_be_linked(codec):
    linked = graph(text=["w", 0], name=["w", 0], count=["n", 0], ckpt_name=["f", 0])
    assert words(linked, codec)[5:11] == [
        "Word", "value=a", "<ref0>", "Number", "value=0", "Name",
    ]  # fmt: skip
    anything = graph(text=["x", 0], count=["x", 0], resize=["x", 0])
    assert words(anything, codec)[4:9] == ["Anything", "<ref0>", "name=x", "<ref0>", BODY[3]]
    with pytest.raises(CodecError, match="output 0 of Number, expected an output of type STRING"):
        codec.encode(Workflow.from_api(graph(text=["n", 0])))


def test_slots_and_references_beyond_their_tokens(codec):
    assert words(graph(count=["m", 7]), codec)[7:9] == ["Many", "<slot7>"]
    far = ["Many", "<num>", "<x1>", "<x0>", "<num>"]
    assert words(graph(count=["m", 10]), codec)[7:12] == far


def test_a_seed_linked_to_odd_seeds(codec):
    api = graph()
    api["1"]["inputs"]["images.image0"] = ["y", 0]
    api["y"] = {"class_type": "Noise", "inputs": {"seed": ["z", 1], "noise_seed": 6, "amount": 1.0}}
    api["z"] = {"class_type": "Noise", "inputs": {"seed": 5, "noise_seed": 6, "amount": 1.0}}
    assert words(api, codec)[1:4] == ["<seed>", "Noise", "Noise"]
    api["z"]["inputs"]["seed"] = ["n", 0]
    assert words(api, codec)[1:6] == ["<seed>", "Noise", "<end>", "Noise", "Number"]


def test_a_far_reference_in_a_literal_is_a_list(codec):
    api = graph(count=["n0", 0])
    for k in range(10):
        inputs = {"value": 0 if k == 0 else [f"n{k - 1}", 0]}
        api[f"n{k}"] = {"class_type": "Number", "inputs": inputs}
    # Ten numbers finish below `resize` before `count` goes back to the first of them.
    api["1"]["inputs"] |= {"resize": "size", "resize.width": ["n9", 0], "resize.method": "near"}
    spelled = words(api, codec)
    assert spelled[5:8] == ["Number", "Number", "Number"]
    text = "".join(w[2:-1] for w in spelled[spelled.index("<esc>") + 1 : -1] if w[:2] == "<x")
    assert bytes.fromhex(text).decode() == "[9, 0]"


def test_odd_seeds_open_every_seed(codec):
    api = graph()
    api["1"]["inputs"]["images.image0"] = ["z", 0]
    api["z"] = {"class_type": "Noise", "inputs": {"seed": 5, "noise_seed": 6, "amount": 1.0}}
    assert words(api, codec)[:4] == ["Sink", "Noise", "amount=1.0", "Picture"]
    assert codec.encode(Workflow.from_api(api)).seeds == (5, 6)
    for odd, code in ((["n", 0], ["Number", "value=0"]), (1.0, ["<num>", "<x1>", "<xa>", "<x0>"]),
                      ("a", ["<esc>", "<x2>"])):  # fmt: skip
        api["z"]["inputs"]["noise_seed"] = odd
        found = words(api, codec)
        assert found[:4] == ["Sink", "<seed>", "Noise", "<seed>"]
        assert found[4 : 4 + len(code)] == code
        assert codec.encode(Workflow.from_api(api)).seeds == (5,)
    del api["z"]["inputs"]["noise_seed"]
    assert words(api, codec)[:6] == ["Sink", "<seed>", "Noise", "<seed>", "<none>", "amount=1.0"]
    nodes, fields = codec.annotate(codec.encode(Workflow.from_api(api)).tokens)
    assert nodes[:6].tolist() == [0, 1, 1, 1, 1, 1]
    names = [codec.vocabulary.fields[f][1] for f in fields[:5]]
    assert names == ["class", "class", "class", "seed", "noise_seed"]


def test_lists_and_objects(codec):
    known = graph(tags=["p"], curve={"points": [[0.0, 0.0], [1.0, 1.0]]})
    assert words(known, codec)[-6:-4] == [
        'tags=["p"]',
        'curve={"points": [[0.0, 0.0], [1.0, 1.0]]}',
    ]
    assert "<esc>" in words(graph(tags=["p", "q", "p"]), codec)
    assert "<esc>" in words(graph(curve={"points": [[0, 0], [1, 1]]}), codec)
    # No options, no list of choices: any string is a text. A socket escapes its literal.
    assert words(graph(free="mine"), codec)[-2] == "<text>"
    hexed = ["<esc>", "<x3>", "<x0>", "<x2>", "<xe>", "<x3>", "<x5>", "<esc>"]  # 0.5
    assert words(graph(socket=0.5), codec)[-10:-2] == hexed
    with pytest.raises(CodecError, match="expected a link"):
        codec.encode(Workflow.from_api(graph(images__image0="p")))


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, min_size=3, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
LINKS = st.sampled_from([["w", 0], ["n", 0], ["m", 3], ["m", 9], ["x", 0], ["f", 0], ["p", 0]])
NAMES = ["text", "name", "count", "ckpt_name", "tags", "curve", "socket", "free", "any",
         "resize.width", "resize.mode", "values.b", "images.image3"]  # fmt: skip


@given(
    literals=st.dictionaries(st.sampled_from(NAMES), LITERALS | LINKS, max_size=6),
    option=st.sampled_from(["none", "size", "scale"]),
)
def test_anything_comes_back_or_is_refused(codec, literals, option):
    api = graph(resize=option)
    api["1"]["inputs"].update(literals)
    workflow = Workflow.from_api(api)
    try:
        code = codec.encode(workflow)
    except CodecError:
        return
    again = codec.decode(code.tokens, code.texts, code.seeds)
    outputs = codec.catalogue.output_classes
    assert again.fingerprint(outputs) == workflow.fingerprint(outputs)


@given(st.lists(st.integers(-1, 180), max_size=30), st.integers(0, 11))
def test_garbage_is_refused_or_read(codec, garbage, keep):
    tokens = codec.encode(Workflow.from_api(graph())).tokens[:keep] + garbage
    try:
        workflow = codec.decode(tokens)
    except CodecError:
        return
    assert codec.encode(workflow).tokens


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 2**200, "\N{SNOWMAN}\ud800", {"\N{BOMB}": 0}]
)
def test_odd_literals_come_back(codec, value):
    words(graph(curve=value), codec)
    words(graph(count=value), codec)

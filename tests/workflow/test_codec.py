"""Facts: the plain flow takes the 23 tokens written down in `flows`; decoding gives the same graph,
its texts and its seeds, whatever the values are; bad graphs and bad tokens are typed errors."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowloom.workflow import Catalogue, Codec, CodecError, Vocabulary, Workflow, decode, encode
from flowloom.workflow import vocabulary as voc
from tests.workflow.flows import PLAIN_CODE, plain, plain_api, split_catalogue, two_pass

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, min_size=3, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def codec(embedded, vocabulary):
    return Codec(embedded, vocabulary)


@pytest.fixture(scope="module")
def split():
    catalogue = split_catalogue()
    return Codec(catalogue, Vocabulary.build(catalogue))


def same_after_decoding(workflow, codec):
    code = encode(workflow, codec)
    again = decode(code.tokens, codec, code.texts, code.seeds)
    assert again.fingerprint() == workflow.fingerprint()
    assert again.canonical(codec.catalogue) == workflow.canonical(codec.catalogue)
    return code


def test_plain_flow_by_hand(codec):
    code = encode(plain(), codec)
    assert [codec.vocabulary.token_text(t) for t in code.tokens] == PLAIN_CODE
    assert code.texts == ("{prompt}", "{negative}")
    assert code.seeds == (0,)
    same_after_decoding(plain(), codec)


def test_two_passes_share_their_nodes(codec):
    code = same_after_decoding(two_pass(), codec)
    words = [codec.vocabulary.token_text(t) for t in code.tokens]
    assert len(words) == 23 + 5 + 3 + 9  # plain, LoRA, upscale, second sampler
    assert words.count("CheckpointLoaderSimple") == 1
    # Below the second sampler: the model is the LoRA, the texts are the first ones of the code.
    start = words.index("LatentUpscaleBy")
    assert words[start : start + 9] == [
        "LatentUpscaleBy", "KSampler", "<ref0>", "steps=8", "cfg=2.5", "sampler=euler",
        "scheduler=karras", "<ref1>", "<ref0>",
    ]  # fmt: skip


def test_filled_workflows_keep_texts_and_seeds(codec):
    filled = two_pass().fill("a cat", "dark", seed=2**63)
    code = encode(filled, codec)
    assert code.seeds == (2**63 + 1, 2**63)
    assert voc.TEXT_ID in code.tokens
    slots = encode(filled, codec, prompt="a cat", negative="dark")
    assert slots.tokens == encode(two_pass(), codec).tokens
    assert decode(slots.tokens, codec, slots.texts, slots.seeds).fingerprint() == (
        filled.fingerprint()
    )


def test_decoding_can_fill_at_once(codec):
    tokens = encode(plain(), codec).tokens
    assert decode(tokens, codec, prompt="a cat", seed=3).fingerprint() == (
        plain().fill("a cat", seed=3).fingerprint()
    )
    padded = [voc.BOS, *tokens, voc.PAD, voc.PAD]
    assert decode(np.array(padded), codec).fingerprint() == plain().fingerprint()


@given(value=JSON)
def test_any_value_survives(codec, value):
    api = plain_api()
    api["3"]["inputs"]["cfg"] = value
    api["4"]["inputs"]["ckpt_name"] = value
    api["9"]["inputs"]["filename_prefix"] = value
    same_after_decoding(Workflow.from_api(api), codec)


def test_off_grid_numbers_are_spelled(codec):
    # <num>, the characters of "9.5", <num>
    code = encode(plain(n3_cfg=9.5), codec)
    assert len(code.tokens) == len(PLAIN_CODE) - 1 + 5
    start = code.tokens.index(voc.NUMBER)
    assert [t - voc.SPELL0 for t in code.tokens[start + 1 : start + 4]] == [9, 10, 5]
    assert encode(plain(n3_cfg=2.5), codec).tokens == encode(plain(), codec).tokens
    # 2 is not 2.0
    assert len(encode(plain(n3_cfg=2), codec).tokens) == len(PLAIN_CODE) - 1 + 3
    for value in (-1, 1e-7, 1e300, 2**70, -0.5):
        assert voc.ESCAPE not in same_after_decoding(plain(n3_cfg=value), codec).tokens
    # <esc>, two hex digits for each of the characters of "[]", <esc>
    code = same_after_decoding(plain(n3_cfg=[]), codec)
    start = code.tokens.index(voc.ESCAPE)
    assert [t - voc.SPELL0 for t in code.tokens[start + 1 : start + 5]] == [5, 11, 5, 13]


def spelled_numbers(code):
    """What stands between <num> and <num>."""
    text = "".join("#" if t == voc.NUMBER else " " for t in code.tokens)
    assert text.count("#") == 2
    inside = code.tokens[text.index("#") + 1 : text.rindex("#")]
    return "".join("0123456789.-+e"[t - voc.SPELL0] for t in inside)


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (3.1000000000000005, "3.1+1"),  # the float after 3.1
        (0.30000000000000004, "0.3+1"),
        (-0.7999999999999999, "-0.8+1"),
        (8.000000000000002, "8.0+1"),
        (1.2345e-7, "1.2345e-07"),
        (0.1234567890123456, "0.1234567890123456"),  # far from anything short
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (5e-324, "5e-324"),
    ],
)
def test_rounding_errors_are_spelled_short(codec, value, spelled):
    code = same_after_decoding(plain(n3_cfg=value), codec)
    assert spelled_numbers(code) == spelled
    (cfg,) = [n.inputs["cfg"] for n in decode(code.tokens, codec, code.texts).nodes.values()
              if "cfg" in n.inputs]  # fmt: skip
    assert repr(cfg) == repr(value)


def test_off_grid_strings_are_texts(codec):
    code = same_after_decoding(plain(n9_filename_prefix="mine"), codec)
    assert code.tokens[-2] == voc.TEXT_ID
    assert len(code.tokens) == len(PLAIN_CODE)
    assert code.texts == ("{prompt}", "{negative}", "mine")
    # An empty name is no negative prompt; a choice that is none of the options is no text.
    assert encode(plain(n9_filename_prefix=""), codec).tokens[-2] == voc.TEXT_ID
    assert voc.ESCAPE in same_after_decoding(plain(n3_scheduler="mine"), codec).tokens


def test_minus_zero_is_not_zero():
    knob = {"name": "knob", "type": "FLOAT", "default": 0.0, "min": -1.0, "max": 1.0}
    node = {"inputs": [knob], "outputs": ["IMAGE"], "output_node": True}
    catalogue = Catalogue.from_json({"nodes": {"Odd": node}, "files": []})
    codec = Codec(catalogue, Vocabulary.build(catalogue))
    for value, count in ((0.0, 3), (-0.0, 2 + 2 + len("-0.0"))):
        api = {"1": {"class_type": "Odd", "inputs": {"knob": value}}}
        assert len(same_after_decoding(Workflow.from_api(api), codec).tokens) == count


def test_a_far_reference_is_spelled(codec):
    """Twelve encodings finish before the first is used again."""
    api = plain_api()
    chain = ["6", 0]
    for k in range(12):
        api[f"z{k}"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": chain}}
        chain = [f"z{k}", 0]
    api["3"]["inputs"]["positive"], api["3"]["inputs"]["negative"] = chain, ["6", 0]
    same_after_decoding(Workflow.from_api(api), codec)


def test_several_outputs_of_a_type_take_a_slot(split):
    api = plain_api(n4_ckpt_name="one.safetensors", n6_swap=True)
    api["6"]["class_type"] = "Pair"
    for positive, negative in (([0, 1]), ([1, 0]), ([1, 1])):
        api["3"]["inputs"].update(positive=["6", positive], negative=["6", negative])
        code = same_after_decoding(Workflow.from_api(api), split)
        slots = [t - voc.SLOT0 for t in code.tokens if 0 <= t - voc.SLOT0 < voc.NUM_SLOTS]
        assert slots == [positive, negative]
        nodes, fields = split.annotate(code.tokens)
        at = code.tokens.index(voc.SLOT0 + positive)
        assert split.vocabulary.fields[fields[at]] == ("KSampler", "positive")
        assert nodes[at] == 2


def test_optional_inputs_may_be_absent(split):
    api = plain_api(n4_ckpt_name="one.safetensors")
    api["40"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "three-text.safetensors"}}
    api["6"]["inputs"]["clip"] = ["40", 0]
    assert voc.NONE_ID in same_after_decoding(Workflow.from_api(api), split).tokens
    api["40"]["inputs"]["device"] = "cpu"
    assert voc.NONE_ID not in same_after_decoding(Workflow.from_api(api), split).tokens


def test_a_missing_input_is_kept_missing(codec):
    for name in ("n3_cfg", "n3_model", "n4_ckpt_name", "n9_images"):
        assert voc.NONE_ID in same_after_decoding(plain(**{name: None}), codec).tokens


def test_two_outputs_and_a_linked_literal(codec):
    api = plain_api()
    api["20"] = copy.deepcopy(api["9"])
    api["20"]["inputs"]["filename_prefix"] = "again"
    same_after_decoding(Workflow.from_api(api), codec)
    # An output that feeds another one is written once.
    api["21"] = {"class_type": "ImageSharpen", "inputs": {
        "image": ["9", 0], "sharpen_radius": 1, "sigma": 1.0, "alpha": 0.5}}  # fmt: skip
    api["20"]["inputs"]["images"] = ["21", 0]
    same_after_decoding(Workflow.from_api(api), codec)


def test_annotation_of_the_plain_flow(codec):
    nodes, fields = codec.annotate([voc.BOS, *encode(plain(), codec).tokens, voc.PAD])
    assert nodes.tolist() == [
        -1, 0, 1, 2, 3, 3, 2, 2, 2, 2, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 2, 1, 0, 0, -1,
    ]  # fmt: skip
    names = [".".join(codec.vocabulary.fields[f]) if f >= 0 else "" for f in fields]
    assert names[1:7] == [
        "*.class", "*.class", "*.class", "*.class", "CheckpointLoaderSimple.ckpt_name",
        "KSampler.steps",
    ]  # fmt: skip
    assert names[21:] == ["VAEDecode.vae", "SaveImage.filename_prefix", "*.end", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n3_bogus": 1}, "input bogus is not in the catalogue"),
        ({"n3_model": "abc"}, "input model: got 'abc', expected a link"),
        ({"n3_model": ["4", 1]}, "link to output 1 of CheckpointLoaderSimple, expected an output"),
        ({"n3_model": ["4", -1]}, "link to output -1"),
        ({"n3_model": ["44", 0]}, "node 44, which does not exist"),
        ({"n3_latent_image": ["3", 0]}, "closes a cycle"),
        ({"n3_seed": ["4", 0]}, "expected an output of type INT"),
    ],
)
def test_bad_graphs_are_named(codec, changes, message):
    with pytest.raises(CodecError, match=message):
        encode(plain(**changes), codec)


def test_unknown_class_and_no_output(codec):
    api = plain_api()
    api["8"]["class_type"] = "VAEDecodeMagic"
    with pytest.raises(CodecError, match="class VAEDecodeMagic"):
        encode(Workflow.from_api(api), codec)
    with pytest.raises(CodecError, match="no output node"):
        encode(Workflow({}), codec)


def test_bad_tokens_are_named(codec):
    tokens = encode(plain(), codec).tokens
    with pytest.raises(CodecError, match=r"token 5, KSampler\.steps: got the end"):
        decode(tokens[:5], codec)
    with pytest.raises(CodecError, match="token 0, the outputs: got VAEDecode, expected an output"):
        decode(tokens[1:], codec)
    with pytest.raises(CodecError, match=r"token 11, CLIPTextEncode\.clip: got <ref1>"):
        decode([*tokens[:11], voc.REF0 + 1, *tokens[12:]], codec)
    with pytest.raises(CodecError, match="expected a value of kind steps"):
        decode([*tokens[:5], tokens[6], *tokens[6:]], codec)
    with pytest.raises(CodecError, match=r"token 6, KSampler\.cfg: got <esc>, expected a closing"):
        decode([*tokens[:6], voc.ESCAPE, *tokens[6:]], codec)
    spelled = [voc.NUMBER, *(voc.SPELL0 + k for k in (9, 13, *[9] * 5)), voc.NUMBER]
    with pytest.raises(CodecError, match="expected a finite number, got 9e9"):
        decode([*tokens[:6], *spelled, *tokens[7:]], codec)
    with pytest.raises(CodecError, match="expected a class with a seed"):
        decode([voc.SEED_LINK, *tokens], codec)
    with pytest.raises(CodecError, match="got the end, expected a class with a seed"):
        decode([voc.SEED_LINK], codec)
    with pytest.raises(CodecError, match="texts: got 1, expected more"):
        decode(tokens, codec, texts=["only one"])
    with pytest.raises(CodecError, match="seeds: got 0, expected more"):
        decode(tokens, codec, seeds=[])


@given(st.lists(st.integers(-2, 130), max_size=40), st.integers(0, 22))
def test_garbage_is_refused_or_read(codec, garbage, keep):
    tokens = encode(plain(), codec).tokens[:keep] + garbage
    with contextlib.suppress(CodecError):
        assert encode(decode(tokens, codec), codec).tokens


def test_a_vocabulary_of_another_catalogue_is_refused(vocabulary):
    with pytest.raises(CodecError, match="built for another catalogue"):
        Codec(split_catalogue(), vocabulary)

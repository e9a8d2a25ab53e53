"""Facts: ids are append-only and bound by sha256; values are shared between inputs by kind; every
value has the type it has in API JSON; 16 rows wait for files."""

from __future__ import annotations

import json

import pytest

from flowloom.workflow import Catalogue, Codec, ModelFile, Vocabulary, VocabularyError, Workflow
from flowloom.workflow import vocabulary as voc


def texts(vocabulary, group):
    return [token.text for token in vocabulary.tokens if token.group == group]


def test_specials_stand_first(vocabulary):
    assert texts(vocabulary, "special") == list(voc.SPECIALS)
    assert [vocabulary.token_text(i) for i in (voc.PAD, voc.BOS, voc.EOS)] == [
        "<pad>", "<bos>", "<eos>",
    ]  # fmt: skip
    assert vocabulary.token_text(voc.PROMPT_ID) == "<prompt>"
    assert vocabulary.token_text(voc.REF0 + 7) == "<ref7>"
    assert vocabulary.token_text(voc.SLOT0) == "<slot0>"
    assert vocabulary.token_text(voc.SPELL0 + 15) == "<xf>"


def test_one_token_per_class_and_file(vocabulary, embedded):
    assert texts(vocabulary, "class") == list(embedded.nodes)
    assert texts(vocabulary, "file") == [f"{f.folder}/{f.name}" for f in embedded.files]
    assert len(texts(vocabulary, "reserved")) == 16


def test_grids(vocabulary):
    values = {}
    for token in vocabulary.tokens:
        if token.group == "value":
            values.setdefault(token.kind, []).append(token.value)
    assert values["steps"] == [4, 6, 8, 12, 16, 20]
    assert values["cfg"] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0]
    assert values["denoise"] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]
    assert values["px"] == [32, 48, 64]
    assert values["scale"] == [0.5, 1.5, 2.0]
    assert values["strength"] == [0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, 1.1, 1.25]
    assert values["sampler"] == ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"]
    assert values["shift"] == [0.75, 1.25, 1.5, 2.0, 2.5, 3.0]
    # A flow model's noise goes from 1 down to about .05.
    assert max(values["sigma_max"]) == 1.0
    assert min(values["sigma_max"]) > max(values["sigma_min"])
    assert {type(v) for v in values["steps"]} == {int}
    assert {type(v) for v in values["cfg"]} == {float}


def test_a_grid_follows_the_family_and_the_range(embedded):
    steps = embedded.nodes["KSampler"].by_name["steps"]
    assert voc.grid("KSampler", steps, ["shapes"]) == [4, 6, 8, 12, 16, 20]
    default = voc.grid("KSampler", steps, ["sdxl"])
    assert {1, 4, 8, 20, 28, 50} <= set(default)
    assert 7 not in default
    assert voc.grid("KSampler", steps, []) == default
    # A family without a grid of its own brings the default one along.
    both = voc.grid("KSampler", steps, ["shapes", "sdxl"])
    assert both == [4, 6, 8, 12, 16, 20, *(v for v in default if v not in {4, 6, 8, 12, 16, 20})]
    low = voc.InputSpec("steps", "INT", min=5, max=12)
    assert voc.grid("KSampler", low, ["shapes"]) == [6, 8, 12]
    latent = embedded.nodes["LatentUpscaleBy"].by_name["scale_by"]
    image = embedded.nodes["ImageScaleBy"].by_name["scale_by"]
    assert voc.grid("LatentUpscaleBy", latent, ["shapes"]) == [1.5, 2.0]
    assert voc.grid("ImageScaleBy", image, ["shapes"]) == [0.5, 2.0]


def test_fields_are_stable(vocabulary, embedded):
    assert vocabulary.fields[0] == ("*", "class")
    assert vocabulary.fields[1] == ("*", "end")
    rest = [(c, spec.name) for c, node in embedded.nodes.items() for spec in node.inputs]
    assert list(vocabulary.fields[2:]) == rest
    assert vocabulary.field_index["KSampler", "cfg"] == 2 + rest.index(("KSampler", "cfg"))


def test_json_round_trip(vocabulary):
    data = json.loads(json.dumps(vocabulary.to_json()))
    again = Vocabulary.from_json(data)
    assert again == vocabulary
    assert again.hash == vocabulary.hash
    assert [type(t.value) for t in again.tokens] == [type(t.value) for t in vocabulary.tokens]


def test_new_files_take_reserved_rows(vocabulary, embedded):
    old = embedded.file("checkpoints", "shapes-base.safetensors")
    first = ModelFile("checkpoints", "aaa.safetensors", "a" * 64, "shapes", "checkpoint")
    retrained = ModelFile(old.folder, old.name, "b" * 64, old.family)
    grown = vocabulary.extend(embedded.with_files([first, retrained]))
    assert grown.size == vocabulary.size
    changed = [i for i in range(grown.size) if grown.tokens[i] != vocabulary.tokens[i]]
    assert [vocabulary.token_text(i) for i in changed] == ["<file+0>", "<file+1>"]
    assert grown.tokens[changed[0]].sha256 == "a" * 64
    # The old file's row keeps its meaning; new bytes under the same name have a row of their own.
    assert grown.file_ids[old.folder, old.name, old.sha256] != changed[1]
    assert grown.file_ids[old.folder, old.name, "b" * 64] == changed[1]
    assert vocabulary.extend(embedded).tokens == vocabulary.tokens
    third = ModelFile("loras", "c.safetensors", "c" * 64, "shapes")
    later = grown.extend(embedded.with_files([first, third]))
    assert later.tokens[changed[0]] == grown.tokens[changed[0]]
    assert later.tokens[changed[1] + 1].sha256 == "c" * 64


def test_files_without_a_hash_are_bound_by_name(vocabulary, embedded):
    """Live servers tell no hash: the same name in two folders is two files, and stays bound."""
    found = [ModelFile("vae", "x.safetensors", "", ""), ModelFile("loras", "x.safetensors", "", "")]
    grown = vocabulary.extend(embedded.with_files(found))
    rows = [grown.file_ids[file.folder, "x.safetensors", ""] for file in found]
    assert [grown.token_text(row) for row in rows] == ["vae/x.safetensors", "loras/x.safetensors"]
    assert grown.extend(embedded.with_files(found)).tokens == grown.tokens


def test_reserved_rows_run_out(vocabulary, embedded):
    many = [ModelFile("loras", f"{k}.safetensors", f"{k:064x}", "shapes") for k in range(17)]
    with pytest.raises(VocabularyError, match="17 new files, but only 16"):
        vocabulary.extend(embedded.with_files(many))


@pytest.mark.parametrize("data", [None, {}, {"tokens": [{}], "fields": []}, {"tokens": 3}])
def test_bad_json_is_typed(data):
    with pytest.raises(VocabularyError):
        Vocabulary.from_json(data)


def test_inputs_without_a_rule_share_a_kind_by_name():
    spec = {"name": "knob", "type": "FLOAT", "default": 0.25, "min": 0.0, "max": 1.0}
    data = {
        "nodes": {"Odd": {"inputs": [spec], "outputs": ["IMAGE"], "output_node": True}},
        "files": [],
    }
    built = Vocabulary.build(Catalogue.from_json(data))
    assert texts(built, "value") == ["knob=0.25"]


@pytest.mark.parametrize(
    ("facts", "values"),
    [
        (["INT", {"default": "auto"}], []),
        (["INT", {"default": 0.5}], []),
        (["INT", {"default": 3.0}], [3]),
        (["INT", {"default": 5, "max": 4}], []),
        (["FLOAT", {"default": 2}], [2.0]),
        (["FLOAT", {"default": float("inf")}], []),
        (["FLOAT", {"default": True}], []),
        (["STRING", {"default": 7}], [7]),
        (["BOOLEAN", {"default": "yes"}], [True, False]),
        ([[1, 1.0, True, None, "1", [2]], {}], [1, 1.0, True, None, "1", [2]]),
        (["COMBO", {"default": "x"}], []),
        (["COLOR", {"default": {"r": 1}}], [{"r": 1}]),
    ],
)
def test_odd_defaults_and_options(facts, values):
    info = {"Odd": {"input": {"required": {"knob": facts}}, "output": [], "output_node": True}}
    catalogue = Catalogue.from_object_info(info)
    built = Vocabulary.build(catalogue)
    found = [token.value for token in built.tokens if token.group == "value"]
    assert [(type(v), v) for v in found] == [(type(v), v) for v in values]
    codec = Codec(catalogue, built)
    for value in values:
        workflow = Workflow.from_api({"1": {"class_type": "Odd", "inputs": {"knob": value}}})
        code = codec.encode(workflow)
        assert len(code.tokens) == 3
        assert codec.decode(code.tokens, code.texts).nodes == workflow.nodes

"""Facts pinned: no difference if and only if the hashes are equal; each change is named by input,
field, old and new, and says itself in words; values are told apart by type."""

import copy
import dataclasses
import json

import pytest

from flowloom.workflow import Catalogue, ModelFile
from flowloom.workflow.catalogue_diff import Difference, difference

NODES = {
    "Loader": {
        "inputs": [{"name": "file", "type": "COMBO", "folder": "loras"}],
        "outputs": ["MODEL"],
    },
    "Sampler": {
        "inputs": [
            {"name": "model", "type": "MODEL"},
            {"name": "steps", "type": "INT", "default": 20, "min": 1, "max": 100},
            {"name": "sampler", "type": "COMBO", "options": ["euler", "heun", "lms"]},
            {"name": "mode", "type": "COMFY_DYNAMICCOMBO_V3", "options": ["a", "b"], "branches": [
                ["a", [{"name": "width", "type": "INT", "max": 8}]],
                ["b", []],
            ]},
            {"name": "more", "type": "COMFY_AUTOGROW_V3", "names": ["x0", "x1"], "min_count": 1,
             "element": {"name": "x", "type": "IMAGE"}},
        ],
        "outputs": ["LATENT", "IMAGE"],
        "output_node": True,
    },
}  # fmt: skip
FILES = [{"folder": "loras", "name": "a", "sha256": "1", "family": "sdxl"}]
SAMPLER = NODES["Sampler"]["inputs"]


def _catalogue(nodes=NODES, files=FILES, **more):
    return Catalogue.from_json({"name": "", "nodes": nodes, "files": files, **more})


def _changed(edit):
    nodes = copy.deepcopy(NODES)
    edit(nodes["Sampler"]["inputs"])
    old, new = _catalogue(), _catalogue(nodes)
    found = difference(old, new)
    assert found.same == (old.hash == new.hash)
    changes = [] if found.same else list(found.nodes.changed["Sampler"])
    backward = difference(new, old)
    assert len(backward.nodes.changed.get("Sampler", ())) == len(changes)
    return [str(change) for change in changes]


def test_nothing_differs_from_itself():
    found = difference(_catalogue(), dataclasses.replace(_catalogue(), name="another"))
    assert found.same
    assert found.old == found.new
    assert _changed(lambda inputs: None) == []


def _set(index, **facts):
    return lambda inputs: inputs[index].update(facts)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_set(1, max=50), ["input steps: max 100 -> 50"]),
        (_set(1, default=20.0), ["input steps: default 20 -> 20.0"]),
        (_set(1, default=True), ["input steps: default 20 -> True"]),
        (_set(1, type="FLOAT"), ["input steps: type INT -> FLOAT"]),
        (_set(1, required=False), ["input steps: required True -> False"]),
        (_set(2, options=["euler", "lms"]), ["input sampler: options removed: heun"]),
        (
            _set(2, options=["euler", "heun", "lms", "ddim", ""]),
            ["input sampler: options added: ddim, none"],
        ),
        (
            _set(2, options=["lms", "heun", "euler"]),
            ["input sampler: order of options euler, heun, lms -> lms, heun, euler"],
        ),
        (lambda inputs: inputs[2].update(folder="vae") or inputs[2].pop("options"), [
            "input sampler: options euler, heun, lms -> none",
            "input sampler: folder none -> vae",
        ]),
        (lambda inputs: inputs.pop(1), ["input steps removed: INT"]),
        (
            lambda inputs: inputs.append({"name": "seed", "type": "INT", "required": False}),
            ["input seed added: INT, optional"],
        ),
        (
            lambda inputs: inputs.insert(0, inputs.pop(1)),
            ["order of inputs model, steps, sampler, mode, more -> "
             "steps, model, sampler, mode, more"],
        ),
        (lambda inputs: inputs[3]["branches"][0][1][0].update(max=9), [
            "input mode[a].width: max 8 -> 9",
        ]),
        (lambda inputs: inputs[3]["branches"][1][1].append({"name": "k", "type": "INT"}), [
            "input mode[b].k added: INT",
        ]),
        (_set(4, element={"name": "x", "type": "MASK"}), ["input more.*: type IMAGE -> MASK"]),
        (_set(4, names=["x0", "x1", "x2"]), ["input more: names added: x2"]),
        (_set(4, min_count=2), ["input more: min count 1 -> 2"]),
    ],
)  # fmt: skip
def test_a_change_of_an_input_says_itself(edit, says):
    assert _changed(edit) == says


def test_every_field_of_an_input_counts():
    values = {"default": 3, "min": 1.0, "max": 2.0, "step": 0.5, "options": ["z"], "folder": "vae"}
    values |= {"type": "STRING", "required": False, "min_count": 3, "names": ["n"]}
    new = dict(values)
    for field in dataclasses.fields(Catalogue.load("embedded").nodes["KSampler"].inputs[0]):
        if field.name in ("name", "branches", "element"):
            continue
        if field.name not in new:
            new[field.name] = True
        assert len(_changed(_set(0, **{field.name: new[field.name]}))) == 1, field.name


def test_classes_files_and_limits():
    nodes = {"Sampler": {**NODES["Sampler"], "outputs": ["LATENT"]}, "New": NODES["Loader"]}
    files = [{**FILES[0], "family": "flux"}, {**FILES[0], "name": "b"}]
    found = difference(_catalogue(), _catalogue(nodes, files, limits={"batch": 4}))
    assert (found.nodes.added, found.nodes.removed) == (("New",), ("Loader",))
    assert [str(c) for c in found.nodes.changed["Sampler"]] == ["outputs LATENT, IMAGE -> LATENT"]
    assert (found.files.added, found.files.removed) == (("loras/b",), ())
    assert [str(c) for c in found.files.changed["loras/a"]] == ["family sdxl -> flux"]
    assert [str(c) for c in found.limits] == ["batch 16 -> 4"]
    data = json.loads(json.dumps(found.to_json()))
    assert data["nodes"]["changed"]["Sampler"][0] == {
        "where": "",
        "what": "outputs",
        "kind": "changed",
        "old": ["LATENT", "IMAGE"],
        "new": ["LATENT"],
        "text": "outputs LATENT, IMAGE -> LATENT",
    }


def test_long_lists_are_cut_in_words_only():
    found = difference(
        _catalogue(), _catalogue({**NODES, "Sampler": _with_options([str(k) for k in range(30)])})
    )
    removed, added = found.nodes.changed["Sampler"]
    assert str(added) == "input sampler: options added: 0, 1, 2, 3, 4, 5, 6, 7, 22 more"
    assert len(added.new) == 30
    assert removed.old == ["euler", "heun", "lms"]


def _with_options(options):
    node = copy.deepcopy(NODES["Sampler"])
    node["inputs"][2]["options"] = options
    return node


def test_inputs_of_one_name_still_differ():
    twice = copy.deepcopy(NODES)
    twice["Sampler"]["inputs"].append({"name": "steps", "type": "INT", "default": 3})
    other = copy.deepcopy(twice)
    other["Sampler"]["inputs"][1]["default"] = 4
    assert not difference(_catalogue(twice), _catalogue(other)).same


def test_two_real_catalogues():
    old = Catalogue.load("data/catalogues/comfyui-0.33.json.gz")
    new = Catalogue.load("data/catalogues/example.json.gz")
    found = difference(old, new)
    assert isinstance(found, Difference)
    assert (found.nodes.added, found.nodes.removed, found.files.removed) == ((), (), ())
    assert len(found.files.added) == len(new.files) - len(old.files)
    bare = old.with_files([ModelFile("vae", "x", "", "")])
    assert difference(old, bare).files.added == ("vae/x",)

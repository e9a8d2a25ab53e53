"""Pins: a person's workflows become templates that the grammar writes, in either format; texts are
slots of their role; what cannot be used is named with its file and its first fault."""

import json

import pytest
from PIL import Image

from flowloom.dataset.user_workflows import as_template, on_grid, read_templates, summary
from flowloom.dataset.workflows import make_grammar, writable
from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.canvas import to_ui
from flowloom.workflow.png import write_chunks
from tests.render.tiny import flow, write_world


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return Catalogue.load(write_world(tmp_path_factory.mktemp("world")) / "catalogue.json.gz")


@pytest.fixture(scope="module")
def grammar(catalogue):
    return make_grammar(catalogue, 64)


def texts(workflow):
    """Texts that the sampler's inputs lead to, by role."""
    sampler = next(n for n in workflow.nodes.values() if n.class_type == "KSampler")
    nodes = {role: workflow.nodes[sampler.inputs[role].node] for role in ("positive", "negative")}
    return [node.inputs.get("text") for node in nodes.values()]


def test_texts_become_the_slot_of_their_role():
    filled = flow().fill("a cat", negative="blurry", seed=7)
    template = as_template(filled)
    assert texts(template) == ["{prompt}", "{negative}"]
    assert template.template_fingerprint() == flow().template_fingerprint()
    assert template.fingerprint() == flow().fingerprint()  # the seed is 0 again
    # One text for both roles is a prompt.
    api = filled.to_api()
    api["6"]["inputs"]["negative"] = ["3", 0]
    assert texts(as_template(Workflow.from_api(api))) == ["{prompt}", "{prompt}"]
    # Through a node in between, too.
    zeroed = as_template(flow(zero_negative=True).fill("a cat"))
    assert texts(zeroed)[0] == "{prompt}"


def test_numbers_move_to_the_nearest_value(catalogue, grammar):
    odd = flow(steps=9, cfg=4.6, size=30).replace("99", "filename_prefix", "mine/cat")
    assert not writable([odd], grammar)
    moved = on_grid(odd, catalogue)
    assert moved.nodes["6"].inputs["steps"] == 8
    assert moved.nodes["6"].inputs["cfg"] == 5.0
    assert type(moved.nodes["6"].inputs["cfg"]) is float
    assert moved.nodes["5"].inputs["width"] == 32
    assert writable([moved], grammar)
    tied = on_grid(flow(steps=10), catalogue)
    assert tied.nodes["6"].inputs["steps"] == 8


def test_either_format_is_read_and_repeats_are_dropped(catalogue, grammar, tmp_path):
    one, other = flow(steps=8).fill("a cat"), flow(steps=16).fill("a cat", seed=3)
    (tmp_path / "a.json").write_text(json.dumps(one.to_api()))
    (tmp_path / "b.json").write_text(json.dumps(to_ui(other, catalogue)))
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": one.fill("a dog").to_api()}) + "\n")
    templates, problems = read_templates(str(tmp_path), grammar)
    assert problems == []
    expected = [flow(steps=steps).canonical(catalogue) for steps in (8, 16)]
    assert [t.template_fingerprint() for t in templates] == [
        e.template_fingerprint() for e in expected
    ]


def test_a_picture_is_read(grammar, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    write_chunks(tmp_path / "p.png", {"prompt": json.dumps(flow(steps=8).to_api())})
    templates, problems = read_templates(str(tmp_path / "p.png"), grammar)
    assert (len(templates), problems) == (1, [])


def test_what_cannot_be_used_is_named(grammar, tmp_path):
    good = flow(steps=8).to_api()
    missing = flow("gone.safetensors").to_api()
    rows = [good, missing, {"1": {"class_type": "Nothing", "inputs": {}}}, [3]]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    templates, problems = read_templates(str(tmp_path / "w.jsonl"), grammar)
    assert len(templates) == 1
    assert [p.partition("w.jsonl:")[2][0] for p in problems] == ["2", "3", "4", "5"]
    assert "node 1 (CheckpointLoaderSimple)" in problems[0]
    assert "gone.safetensors" in problems[0]
    assert all("\n" not in problem for problem in problems)
    line = summary(problems)
    assert line.count("w.jsonl") == 3
    assert line.endswith("; and 1 more")
    assert read_templates(str(tmp_path / "none.json"), grammar)[1][0].endswith(
        "no such file or folder"
    )

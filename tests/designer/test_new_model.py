"""Facts pinned of the benchmark's own parts: a swapped workflow differs in its checkpoint alone;
the best workflow is looked up for train prompts only; prompts come kind by kind; a file's concept
is told from the prompt."""

import json

from benchmarks import new_model
from flowloom.shapes.prompts import parse
from flowloom.workflow import Catalogue, differences
from tests.render.tiny import flow


def test_swapped_workflows_differ_in_the_checkpoint():
    before = flow(second_pass={"steps": 4, "denoise": 0.5})
    after = new_model.swapped(before, "new.safetensors")
    (line,) = differences(before, after)
    assert line == "CheckpointLoaderSimple: ckpt_name a.safetensors -> new.safetensors"
    assert (
        before.template_fingerprint()
        == flow(second_pass={"steps": 4, "denoise": 0.5}).template_fingerprint()
    )


def test_best_workflows_and_prompts_in_turn():
    flows = [flow(steps=n) for n in (3, 5)]
    cells = [
        ("a star", "single", 0, 0.9, "train"),
        ("a star", "single", 1, 0.1, "train"),
        ("a disc", "single", 0, 0.8, "train"),
        ("two stars", "counting", 1, 0.7, "train"),
        ("two stars", "counting", 0, 0.2, "train"),
        ("a box", "single", 1, 0.9, "calibration"),
    ]
    columns = {name: [] for name in ("prompt", "kind", "workflow", "fingerprint", "score", "split")}
    for prompt, kind, k, score, split in cells:
        for noise in (-0.01, 0.01):
            row = (
                prompt, kind, json.dumps(flows[k].to_api()), flows[k].template_fingerprint(),
                score + noise, split,
            )  # fmt: skip
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    best = new_model._best_of(columns)
    assert set(best) == {"a star", "a disc", "two stars", ""}
    assert best["a star"].template_fingerprint() == flows[0].template_fingerprint()
    assert best[""].template_fingerprint() == flows[0].template_fingerprint()
    turns = new_model._in_turn(columns, "train", 2)
    assert turns == [("a star", "single"), ("two stars", "counting")]
    assert len(new_model._in_turn(columns, "train", 9)) == 3


def test_concepts():
    known = {file.name for file in Catalogue.load("embedded").files}
    assert set(new_model.CONCEPTS) <= known
    position, cool = (
        new_model.CONCEPTS[f"shapes-{name}.safetensors"] for name in ("position", "cool")
    )
    assert position(parse("a circle and a star"))
    assert not position(parse("a red circle"))
    assert cool(parse("a blue circle"))
    assert not cool(parse("a red circle"))
    assert not cool(parse("a circle"))

"""Facts pinned: rendering keeps the workflow in the picture; one bad workflow stops no other."""

import json

import numpy as np
import pytest

from flowloom.cli.pictures import picture_names
from flowloom.render import png
from tests.render.tiny import flow, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def test_render_writes_pictures_that_hold_their_workflow(run_json, world, tmp_path):
    rows = [flow(), flow(steps=2), flow("nothing.safetensors")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"workflow": row.to_api()}) + "\n" for row in rows))
    out = tmp_path / "out"
    options = ("--out", out, "--catalogue-dir", world)
    status, answer = run_json("render", path, *options, "--prompt", "a star", "--seed", 5)
    assert status == 1
    first, second, third = answer["results"]
    assert set(first) == {"path", "images", "seconds", "error"}
    assert first["path"] == f"{path}:1"
    assert first["images"] == [str(out / "rows-00001.png")]
    assert first["seconds"] > 0
    assert second["error"] is None
    assert third["images"] == []
    assert "nothing.safetensors" in third["error"]
    image, workflow = png.read(first["images"][0])
    assert image.shape == (3, 32, 32)
    expected = flow().fill("a star", seed=5)
    assert workflow is not None
    assert workflow.fingerprint() == expected.fingerprint()
    # The picture is a workflow, so it can be rendered again, to the same pixels.
    again = tmp_path / "again"
    status, answer = run_json(
        "render", first["images"][0], "--out", again, "--catalogue-dir", world
    )
    assert status == 0
    assert np.array_equal(png.read(answer["results"][0]["images"][0])[0], image)


def test_a_template_needs_a_prompt(run_json, run, world, tmp_path):
    path = tmp_path / "template.json"
    path.write_text(json.dumps(flow().to_api()))
    options = ("--out", tmp_path / "out", "--catalogue-dir", world)
    status, answer = run_json("render", path, *options)
    assert status == 1
    assert "--prompt" in answer["results"][0]["error"]
    status, out, _ = run("render", path, *options, "--prompt", "a star")
    assert status == 0
    assert out == f"{path}: {tmp_path / 'out' / 'template.png'}\n"


def test_picture_names_are_distinct():
    paths = ["a/x.json", "b/x.json", "rows.jsonl:1", "rows.jsonl:12", "y.json.gz", "x_2.png"]
    names = picture_names(paths)
    assert names == ["x", "x_2", "rows-00001", "rows-00012", "y", "x_2_2"]

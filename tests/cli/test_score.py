"""Facts pinned: `score` gives the total and its breakdown; what is wrong with a picture stops no
other and is one line, what is wrong with the prompt or the rubric is one line."""

import numpy as np
import pytest
from PIL import Image

from flowloom.render import png
from flowloom.shapes import drawing
from flowloom.shapes.prompts import parse

PROMPT = "three red circles"


@pytest.fixture
def drawn(tmp_path):
    path = tmp_path / "drawn.png"
    png.write(path, drawing.render(parse(PROMPT), np.random.default_rng(0)))
    return path


def test_score_gives_the_breakdown(run_json, run, drawn):
    status, answer = run_json("score", drawn.parent, "--prompt", PROMPT)
    assert status == 0
    (row,) = answer["results"]
    assert set(row) == {"path", "score", "breakdown"}
    assert row["path"] == str(drawn)
    assert set(row["breakdown"]) == {"faithfulness", "crispness"}
    assert row["score"] > 0.9
    _, other = run_json("score", drawn, "--prompt", "two blue stars", "--rubric", "shapes")
    assert other["results"][0]["score"] < 0.2
    status, out, _ = run("score", drawn, "--prompt", PROMPT)
    assert status == 0
    assert "crispness" in out


@pytest.mark.parametrize(
    ("prompt", "rubric", "says"),
    [
        ("three red lions", "shapes", "unknown word 'lions'"),
        ("", "shapes", "prompt ''"),
        ("a star " * 2000, "shapes", "got 4000 words and 14000 characters, expected at most 15"),
        ("a star", "taste", "got 'taste', expected one of shapes"),
        ("a star", "shapes-thrift", "needs counted costs"),
    ],
)
def test_what_cannot_be_judged_is_one_line(run, drawn, prompt, rubric, says):
    status, out, err = run("score", drawn, "--prompt", prompt, "--rubric", rubric)
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert len(err) < 300
    assert not out


def test_a_file_that_is_no_picture_stops_no_other(run_json, run, drawn, tmp_path, recwarn):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(drawn.read_bytes()[:120])
    vast = tmp_path / "vast.png"
    Image.new("1", (20_000, 8_000)).save(vast)
    missing = tmp_path / "missing.png"
    paths = (text, drawn, cut, vast, missing)
    status, answer = run_json("score", *paths, "--prompt", PROMPT)
    assert status == 2
    results = answer["results"]
    assert [row["path"] for row in results] == [str(path) for path in paths]
    assert results[1]["score"] > 0.9
    says = {
        0: "expected a picture",
        2: "expected a picture",
        3: "got 20000 x 8000 pixels",
        4: "No such file",
    }
    for index, words in says.items():
        assert (results[index]["score"], results[index]["breakdown"]) == (None, None)
        assert words in results[index]["error"]
    status, out, err = run("score", *paths, "--prompt", PROMPT)
    assert status == 2
    assert str(drawn) in out
    assert len(err.splitlines()) == 4
    assert not recwarn.list
    for line, index in zip(err.splitlines(), says, strict=True):
        assert line.startswith(f"flowloom score: {paths[index]}: ")


def test_pictures_of_strangers_are_read(run_json, drawn, tmp_path):
    # Any size and mode, and a text chunk 'prompt' that is no workflow.
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", "a cat")
    large = tmp_path / "large.png"
    with Image.open(drawn) as file:
        file.resize((256, 256), Image.Resampling.NEAREST).convert("RGBA").save(large, pnginfo=info)
    status, answer = run_json("score", large, "--prompt", PROMPT)
    assert status == 0
    assert answer["results"][0]["score"] > 0.9


def test_a_folder_without_pictures_is_named(run, tmp_path):
    status, _, err = run("score", tmp_path, "--prompt", PROMPT)
    assert status == 2
    assert err == f"flowloom score: {tmp_path}: got a folder without .png files\n"

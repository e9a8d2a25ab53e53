"""Facts pinned: the JSON shape and exit statuses of `encode`; exactness is judged over what the
outputs of the catalogue reach; what is spelled out is readable."""

import json

from flowloom.cli.encode import token_words
from flowloom.workflow import Catalogue, Codec, Vocabulary, Workflow

EMBEDDED = ("--catalogue", "embedded")


def test_tokens_and_whether_they_are_exact(run_json, run, good):
    status, answer = run_json("encode", good, *EMBEDDED)
    assert status == 0
    (row,) = answer["results"]
    assert set(row) == {"path", "tokens", "round_trip", "error"}
    assert row["round_trip"]
    assert row["error"] is None
    assert all(0 <= token < answer["vocabulary"] for token in row["tokens"])
    status, out, _ = run("encode", good, *EMBEDDED)
    assert status == 0
    assert out.splitlines()[0] == f"{good}: {len(row['tokens'])} tokens, exact"
    assert out.splitlines()[1].startswith("  SaveImage ")
    assert out.splitlines()[-1] == f"1 of 1 exact; vocabulary: {answer['vocabulary']} tokens"


def test_what_has_no_tokens_is_status_1(run_json, run, good, workflow, tmp_path):
    workflow["5"]["class_type"] = "Unheard"
    path = tmp_path / "unheard.json"
    path.write_text(json.dumps(workflow))
    status, answer = run_json("encode", path, *EMBEDDED)
    assert status == 1
    (row,) = answer["results"]
    assert row["tokens"] is None
    assert not row["round_trip"]
    assert "Unheard" in row["error"]
    status, out, _ = run("encode", path, good, *EMBEDDED)
    assert status == 1
    assert f"{path}: no tokens: " in out
    assert "1 of 2 exact" in out


def test_unreadable_input_is_status_2(run_json, run, good):
    status, answer = run_json("encode", "gone.json", good, *EMBEDDED)
    assert status == 2
    assert [row["error"] for row in answer["results"]] == ["no such file or folder", None]
    _, _, err = run("encode", "gone.json", *EMBEDDED)
    assert err == "flowloom encode: gone.json: no such file or folder\n"


def test_the_editors_format_has_the_tokens_of_what_it_stands_for(
    run_json, good, editor_file, tmp_path
):
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(editor_file))
    status, answer = run_json("encode", good, path, *EMBEDDED)
    assert status == 0
    assert answer["results"][0]["tokens"] == answer["results"][1]["tokens"]


def test_files_that_are_not_installed_are_spelled(run_json, run, good):
    status, answer = run_json("encode", good, "--catalogue", "comfyui-0.33")
    assert status == 0
    assert answer["results"][0]["round_trip"]
    _, out, _ = run("encode", good, "--catalogue", "comfyui-0.33")
    assert '<esc "shapes-base.safetensors">' in out


def test_spelled_numbers_are_one_word(workflow):
    workflow["5"]["inputs"]["cfg"] = -2.53125
    catalogue = Catalogue.load("embedded")
    vocabulary = Vocabulary.build(catalogue)
    tokens = Codec(catalogue, vocabulary).encode(Workflow.from_api(workflow)).tokens
    assert "<num -2.53125>" in list(token_words(vocabulary, tokens))


def test_a_workflow_that_saves_no_image_is_exact_only_if_its_own_outputs_are(run_json, tmp_path):
    film = {
        "1": {"class_type": "EmptyImage", "inputs": {}},
        "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 24.0}},
        "3": {
            "class_type": "SaveVideo",
            "inputs": {
                "video": ["2", 0],
                "filename_prefix": "x",
                "format": "auto",
                "codec": "auto",
            },
        },
        "4": {"class_type": "EmptyImage", "inputs": {"width": 8}},
    }
    film["1"]["inputs"] = {"width": 512, "height": 512, "batch_size": 1, "color": 0}
    path = tmp_path / "film.json"
    path.write_text(json.dumps(film))
    status, answer = run_json("encode", path, "--catalogue", "comfyui-0.33")
    # Node 4 is reached by no output, so losing it loses nothing.
    assert (status, answer["results"][0]["error"]) == (0, None)

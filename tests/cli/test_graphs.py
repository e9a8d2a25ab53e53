"""Facts pinned: JSON shapes of DESIGN.md, exit statuses, every kind of PATH."""

import gzip
import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo

FIELDS = {"type", "severity", "node_id", "class_type", "input", "message", "suggestion"}


def _validate(run_json, *paths):
    return run_json("validate", *paths, "--catalogue", "embedded")


def test_validate_answers_per_workflow(run_json, good, bad):
    status, answer = _validate(run_json, good)
    assert status == 0
    assert answer == {"results": [{"path": str(good), "valid": True, "problems": []}]}
    status, answer = _validate(run_json, good, bad)
    assert status == 1
    assert [result["valid"] for result in answer["results"]] == [True, False]
    (problem,) = answer["results"][1]["problems"]
    assert set(problem) == FIELDS
    assert (problem["node_id"], problem["class_type"], problem["input"]) == ("5", "KSampler", "cfg")
    assert problem["severity"] == "error"


def test_validate_for_people(run, good, bad):
    status, out, err = run("validate", good, bad, "--catalogue", "embedded")
    assert status == 1
    assert err == ""
    assert out.splitlines()[0] == f"{good}: valid"
    assert "node 5 (KSampler) cfg" in out
    assert out.splitlines()[-1] == "1 of 2 valid against embedded"


def test_unreadable_input_is_status_2_and_named(run, run_json, good, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    status, answer = _validate(run_json, good, broken)
    assert status == 2
    assert answer["results"][0]["valid"]
    (problem,) = answer["results"][1]["problems"]
    assert set(problem) == FIELDS
    assert problem["type"] == "unreadable"
    status, _, err = run("validate", good, broken, "--catalogue", "embedded")
    assert status == 2
    assert err.startswith(f"flowloom validate: {broken}: not JSON")
    assert len(err.splitlines()) == 1


def test_what_is_json_but_no_workflow_is_not_valid(run_json, tmp_path):
    for number, text in enumerate(("[]", "{}", "3", '{"1": 5}')):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        status, answer = _validate(run_json, path)
        assert status == 1, text
        assert not answer["results"][0]["valid"]


def test_ui_format_says_what_to_do(run, tmp_path):
    path = tmp_path / "ui.json"
    path.write_text(json.dumps({"nodes": [], "links": [], "version": 0.4}))
    status, _, err = run("validate", path, "--catalogue", "embedded")
    assert status == 2
    assert "UI format" in err
    assert "API format" in err


def test_every_kind_of_path_is_read(run_json, workflow, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    rows = [
        workflow,
        {"prompt": workflow},
        {"prompt": "three red circles", "workflow": workflow},
        {"graph": json.dumps(workflow), "score": 1.0},
    ]
    lines = [json.dumps(row) for row in rows]
    # An empty line is no row, but counts as a line.
    (folder / "rows.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    (folder / "deep" / "packed.json.gz").write_bytes(gzip.compress(json.dumps(workflow).encode()))
    info = PngInfo()
    info.add_text("prompt", json.dumps(workflow))
    Image.new("RGB", (8, 8)).save(folder / "picture.png", pnginfo=info)
    (folder / "notes.txt").write_text("no workflow")
    status, answer = _validate(run_json, folder)
    assert status == 0
    names = [result["path"].removeprefix(f"{folder}/") for result in answer["results"]]
    places = ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:5"]
    assert names == ["deep/packed.json.gz", "picture.png", *places]


def test_a_png_without_a_workflow_is_unreadable(run, tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(path)
    status, _, err = run("validate", path, "--catalogue", "embedded")
    assert status == 2
    assert "without a workflow" in err
    path.write_bytes(b"no picture")
    assert run("validate", path, "--catalogue", "embedded")[0] == 2


def test_encode_gives_tokens_and_checks_them(run_json, run, good, tmp_path, workflow):
    status, answer = run_json("encode", good, "--catalogue", "embedded")
    assert status == 0
    (row,) = answer["results"]
    assert set(row) == {"path", "tokens", "round_trip", "error"}
    assert row["round_trip"]
    assert row["error"] is None
    assert all(0 <= token < answer["vocabulary"] for token in row["tokens"])
    _, out, _ = run("encode", good, "--catalogue", "embedded")
    assert f"{len(row['tokens'])} tokens, exact" in out
    assert "SaveImage" in out

    workflow["5"]["class_type"] = "Unheard"
    path = tmp_path / "unheard.json"
    path.write_text(json.dumps(workflow))
    status, answer = run_json("encode", path, "--catalogue", "embedded")
    assert status == 1
    (row,) = answer["results"]
    assert row["tokens"] is None
    assert not row["round_trip"]
    assert "Unheard" in row["error"]


def test_sample_draws_valid_workflows_that_depend_on_the_seed_alone(run, run_json, tmp_path):
    def draw(name, number, seed):
        path = tmp_path / f"{name}.jsonl"
        status, out, _ = run(
            "sample", "--catalogue", "embedded", "--n", number, "--seed", seed, "--out", path
        )
        assert (status, out) == (0, "")
        return path

    first, again, other = draw("first", 40, 1), draw("again", 40, 1), draw("other", 40, 2)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    assert len(first.read_text().splitlines()) == 40
    status, answer = _validate(run_json, first)
    assert status == 0
    assert len(answer["results"]) == 40


def test_catalogue_snapshot_show_and_diff(run, run_json, tmp_path):
    for name in ("saved.json", "saved.json.gz"):
        path = tmp_path / name
        assert run("catalogue", "snapshot", "--catalogue", "embedded", "--out", path)[0] == 0
        assert run("catalogue", "diff", "embedded", path)[0] == 0
    status, shown = run_json("catalogue", "show", path)
    assert status == 0
    assert "KSampler" in shown["nodes"]
    data = json.loads((tmp_path / "saved.json").read_text())
    del data["nodes"]["ImageBlur"]
    data["files"][0]["sha256"] = "0" * 64
    (tmp_path / "changed.json").write_text(json.dumps(data))
    status, answer = run_json("catalogue", "diff", "embedded", tmp_path / "changed.json")
    assert status == 1
    assert answer["nodes"] == {"added": [], "removed": ["ImageBlur"], "changed": []}
    assert len(answer["files"]["changed"]) == 1
    assert answer["old"] != answer["new"]
    assert answer["old"] == shown["hash"]

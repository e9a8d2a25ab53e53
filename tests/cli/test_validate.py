"""Facts pinned: the JSON shape and exit statuses of `validate`; problems of the editor's files are
problems, not crashes; text is grouped by node and plain in a pipe."""

import io
import json
import sys

import pytest

from flowloom.cli import output

FIELDS = {"type", "severity", "node_id", "class_type", "input", "message", "suggestion"}


@pytest.fixture
def save(tmp_path):
    def write(value, name="x.json"):
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    return write


def _validate(run, *paths, catalogue="embedded"):
    return run("validate", *paths, "--catalogue", catalogue)


def test_answers_per_workflow(run_json, good, bad):
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


def test_says_what_is_wrong_to_people(run, good, bad):
    status, out, err = _validate(run, good, bad)
    assert status == 1
    assert err == ""
    assert out.splitlines()[:4] == [
        f"{good}: valid",
        f"{bad}: not valid, 1 error",
        "  node 5 (KSampler)",
        "    error    cfg: got high, expected FLOAT",
    ]
    assert out.splitlines()[-1] == "1 of 2 valid against embedded"


def test_nodes_with_the_same_problem_are_named_together(run, workflow, save):
    for node_id in ("10", "11", "12"):
        workflow[node_id] = {"class_type": "SaveImag", "inputs": {}}
    status, out, _ = _validate(run, save(workflow))
    assert status == 1
    assert "nodes 10, 11, 12 (SaveImag)" in out
    assert out.count("did you mean SaveImage?") == 1


def test_warnings_are_shown_and_valid(run, run_json, workflow, save):
    workflow["9"] = {"class_type": "EmptyLatentImage", "inputs": workflow["4"]["inputs"]}
    status, out, _ = _validate(run, save(workflow))
    assert status == 0
    assert "valid, 1 warning" in out
    assert "    warning  no output uses this node" in out
    _, answer = _validate(run_json, save(workflow))
    assert answer["results"][0]["valid"]
    assert answer["results"][0]["problems"][0]["severity"] == "warning"


def test_unreadable_input_is_status_2_and_the_rest_is_judged(run, run_json, good, bad, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    status, answer = _validate(run_json, "gone.json", broken, good, bad)
    assert status == 2
    assert [result["valid"] for result in answer["results"]] == [False, False, True, False]
    for result in answer["results"][:2]:
        (problem,) = result["problems"]
        assert set(problem) == FIELDS
        assert problem["type"] == "unreadable"
    status, out, err = _validate(run, "gone.json", broken, good)
    assert status == 2
    assert err.splitlines()[0] == "flowloom validate: gone.json: no such file or folder"
    assert err.splitlines()[1].startswith(f"flowloom validate: {broken}: not JSON")
    assert out == f"{good}: valid\n1 of 1 valid against embedded; 2 unreadable\n"


def test_what_is_json_but_no_workflow_is_not_valid(run_json, save):
    for value in ([], {}, 3, {"1": 5}, None, "x", {"nodes": []}, {"nodes": [3]}):
        status, answer = _validate(run_json, save(value))
        assert status == 1, value
        assert not answer["results"][0]["valid"]


def test_the_editors_format_is_judged_as_what_it_stands_for(run_json, editor_file, save):
    assert _validate(run_json, save(editor_file))[0] == 0
    editor_file["nodes"][4]["widgets_values"][3] = "high"
    status, answer = _validate(run_json, save(editor_file))
    assert status == 1
    (problem,) = answer["results"][0]["problems"]
    assert (problem["node_id"], problem["input"]) == ("5", "cfg")


def test_classes_the_editor_has_and_the_catalogue_lacks_are_problems(run_json, editor_file, save):
    editor_file["nodes"][4]["type"] = "KSampla"
    editor_file["nodes"][6]["type"] = "Unheard"
    editor_file["nodes"][0]["widgets_values"] = ["gone.safetensors"]
    status, answer = _validate(run_json, save(editor_file))
    assert status == 1
    problems = answer["results"][0]["problems"]
    assert [(p["type"], p["node_id"], p["class_type"]) for p in problems] == [
        ("missing_node_type", "5", "KSampla"),
        ("missing_node_type", "7", "Unheard"),
        ("value_not_in_list", "1", "CheckpointLoaderSimple"),
    ]
    assert problems[0]["suggestion"] == "did you mean KSampler?"


def test_what_many_have_in_common_is_told_at_the_end(run, workflow, tmp_path):
    workflow["5"]["class_type"] = "Unheard"
    rows = [workflow, workflow, {"1": 5}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = _validate(run, path)
    assert out.splitlines()[-2:] == [
        "missing classes, by number of workflows: Unheard (2)",
        "0 of 3 valid against embedded",
    ]
    assert "missing_node_type (2)" in out.splitlines()[-3]


def test_names_of_strangers_cannot_write_to_the_terminal(run, workflow, save):
    workflow["5"]["class_type"] = "K\x1b[31m\nSampler\ud800"
    status, out, _ = _validate(run, save(workflow))
    assert status == 1
    assert "K\\x1b[31m" in out
    assert "Sampler\\ud800" in out
    assert out.splitlines()[-1] == "0 of 1 valid against embedded"


def test_a_shipped_catalogue_has_a_name(run_json, run, good):
    status, answer = _validate(run_json, good, catalogue="comfyui-0.33")
    assert status == 1
    types = {problem["type"] for problem in answer["results"][0]["problems"]}
    assert types == {"value_not_in_list"}
    status, _, err = _validate(run, good, catalogue="comfyui-0.1")
    assert status == 2
    assert "comfyui-0.33" in err
    assert len(err.splitlines()) == 1


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_is_for_terminals_alone(monkeypatch, good, bad, run):
    assert "\x1b" not in _validate(run, good, bad)[1]
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = _Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    output.Lines().print(("red", "red"), " plain")
    assert screen.getvalue() == "\x1b[31mred\x1b[0m plain\n"


def test_a_bar_is_for_terminals_alone_and_for_long_work(monkeypatch, capsys):
    assert list(output.progress(range(3), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(output, "PATIENCE_S", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for item in output.progress(range(3), "counting", 3):
        print(item)
    assert "counting" in screen.getvalue()
    # Results stay where they belong while a bar is shown.
    assert capsys.readouterr().out == "0\n1\n2\n"
    monkeypatch.setattr(sys, "stdout", _Terminal())
    screen.truncate(0)
    list(output.progress(range(3), "counting", 3, prints=True))
    assert "counting" not in screen.getvalue()

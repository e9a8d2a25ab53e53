"""Facts pinned: there and back is the same workflow; files lie below --out as their sources lay; no
input is ever replaced, and no half-written file is left."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowloom.cli import convert
from flowloom.workflow import Catalogue, Workflow
from flowloom.workflow.canvas import from_ui

EMBEDDED = ("--catalogue", "embedded")


@pytest.fixture
def folder(tmp_path, workflow, editor_file):
    """A folder of every kind of file."""
    folder = tmp_path / "flows"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "api.json").write_text(json.dumps(workflow))
    (folder / "saved.json").write_text(json.dumps(editor_file))
    rows = [json.dumps({"prompt": workflow}), "", json.dumps({"workflow": editor_file})]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    info = PngInfo()
    info.add_text("prompt", json.dumps(workflow))
    info.add_text("workflow", json.dumps(editor_file))
    Image.new("RGB", (8, 8)).save(folder / "picture.png", pnginfo=info)
    return folder


NAMES = ["deep/api.json", "picture.json", "rows-1.json", "rows-3.json", "saved.json"]


def _convert(run, *paths, to, out):
    return run("convert", *paths, "--to", to, *EMBEDDED, "--out", out)


def _files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_to_api_every_file_is_the_same_workflow(run_json, folder, workflow, tmp_path):
    out = tmp_path / "out"
    status, answer = _convert(run_json, folder, to="api", out=out)
    assert status == 0
    assert [set(row) for row in answer["results"]] == [{"path", "out", "error"}] * 5
    assert [row["out"] for row in answer["results"]] == [str(out / name) for name in NAMES]
    assert answer["results"][2]["path"] == f"{folder}/rows.jsonl:1"
    assert _files(out) == NAMES
    expected = Workflow.from_api(workflow).fingerprint()
    for name in NAMES:
        written = json.loads((out / name).read_text())
        assert Workflow.from_api(written).fingerprint() == expected


def test_to_ui_a_file_of_the_editor_stays_as_it_is(
    run_json, folder, workflow, editor_file, tmp_path
):
    out = tmp_path / "out"
    status, _ = _convert(run_json, folder, to="ui", out=out)
    assert status == 0
    catalogue = Catalogue.load("embedded")
    expected = Workflow.from_api(workflow).fingerprint()
    written = {name: json.loads((out / name).read_text()) for name in NAMES}
    for value in written.values():
        assert from_ui(value, catalogue).workflow.fingerprint() == expected
    assert [name for name in NAMES if written[name] == editor_file] == [
        "picture.json",
        "rows-3.json",
        "saved.json",
    ]


def test_titles_go_there_and_back(run_json, workflow, tmp_path):
    workflow["5"]["_meta"] = {"title": "first pass"}
    (tmp_path / "x.json").write_text(json.dumps(workflow))
    ui, api = tmp_path / "ui", tmp_path / "api"
    assert _convert(run_json, tmp_path / "x.json", to="ui", out=ui)[0] == 0
    assert _convert(run_json, ui, to="api", out=api)[0] == 0
    titles = {k: n.get("_meta") for k, n in json.loads((api / "x.json").read_text()).items()}
    assert [title for title in titles.values() if title] == [{"title": "first pass"}]


def test_what_cannot_be_converted_is_named_and_stops_nothing_else(
    run, run_json, folder, workflow, editor_file, tmp_path
):
    out = tmp_path / "out"
    editor_file["nodes"][4]["type"] = "Unheard"
    (folder / "a.json").write_text(json.dumps(editor_file))
    (folder / "b.json").write_text("[]")
    workflow["5"]["inputs"]["cfg"] = float("nan")
    (folder / "c.json").write_text(json.dumps(workflow))
    status, answer = _convert(run_json, folder, to="api", out=out)
    assert status == 1
    errors = {row["path"].rpartition("/")[2]: row["error"] for row in answer["results"]}
    assert "Unheard" in errors["a.json"]
    assert "expected an object of nodes by id" in errors["b.json"]
    assert errors["c.json"] is not None
    assert _files(out) == NAMES
    status, text, _ = _convert(run, folder, to="api", out=out)
    assert status == 1
    assert f"{folder}/a.json: not converted: " in text
    assert f"{folder}/saved.json: {out}/saved.json" in text


def test_unreadable_input_is_status_2(run, folder, tmp_path):
    (folder / "broken.json").write_text("{")
    status, text, err = _convert(run, folder, "gone", to="api", out=tmp_path / "out")
    assert status == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == [f"{folder}/broken.json", "gone"]
    assert _files(tmp_path / "out") == NAMES
    assert "broken" not in text


def test_no_input_is_replaced(run_json, folder):
    before = {name: (folder / name).read_bytes() for name in _files(folder)}
    status, answer = _convert(run_json, folder, to="ui", out=folder)
    assert status == 1
    refused = [r["path"] for r in answer["results"] if r["error"] and "is an input" in r["error"]]
    assert refused == [f"{folder}/deep/api.json", f"{folder}/saved.json"]
    assert {name: (folder / name).read_bytes() for name in before} == before
    # The same through another name of the folder.
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert _convert(run_json, folder / "saved.json", to="ui", out=link)[0] == 1
    assert _convert(run_json, link / "saved.json", to="ui", out=folder)[0] == 1
    assert (folder / "saved.json").read_bytes() == before["saved.json"]


def test_files_of_one_name_are_kept_apart(run_json, workflow, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps(workflow))
    paths = (tmp_path / "a" / "x.json", tmp_path / "b" / "x.json")
    status, _ = _convert(run_json, *paths, to="api", out=tmp_path / "out")
    assert status == 0
    assert _files(tmp_path / "out") == ["x.json", "x_2.json"]


def test_what_the_editor_would_have_rewritten_is_told(run, editor_file, tmp_path):
    editor_file["nodes"][1]["widgets_values"] = ["a {red|blue} star"]
    (tmp_path / "x.json").write_text(json.dumps(editor_file))
    command = ("convert", tmp_path / "x.json", "--to", "api", "--out", tmp_path / "out")
    status, _, err = run(*command, "--catalogue", "comfyui-0.33")
    assert status == 0
    assert "{red|blue}" in err


def test_a_file_appears_whole_or_not_at_all(monkeypatch, run, good, tmp_path):
    def broken(value, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.json, "dumps", broken)
    status, _, err = _convert(run, good, to="api", out=tmp_path / "out")
    assert status == 2
    assert "No space left" in err
    assert not (tmp_path / "out").exists() or _files(tmp_path / "out") == []

"""Facts pinned: every kind of PATH is read in order, one by one; what cannot be read is named, one
line each, and stops nothing else."""

import gzip
import itertools
import json
import os

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowloom.cli.sources import UI, Inputs
from flowloom.workflow import Catalogue, WorkflowError


def _png(path, **texts):
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def _read(path, **options):
    (source,) = Inputs([str(path)], **options)
    return source


def test_every_kind_of_path_is_read_in_order(workflow, editor_file, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    rows = [
        workflow,
        {"prompt": workflow},
        {"prompt": "three red circles", "workflow": workflow},
        {"prompt": "{red|blue} circles", "graph": workflow},
        {"graph": json.dumps(workflow), "score": 1.0},
        {"workflow": {"prompt": workflow}},
    ]
    lines = [json.dumps(row) for row in rows]
    # An empty line is no row, but counts as a line.
    (folder / "rows.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    (folder / "deep" / "packed.json.gz").write_bytes(gzip.compress(json.dumps(workflow).encode()))
    (folder / "marked.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(workflow).encode())
    (folder / "notes.txt").write_text("no workflow")
    _png(folder / "picture.PNG", prompt=workflow)
    (folder / "saved.json").write_text(json.dumps(editor_file))
    sources = list(Inputs([str(folder)]))
    assert [source.path.removeprefix(f"{folder}/") for source in sources] == [
        "deep/packed.json.gz",
        "marked.json",
        "picture.PNG",
        *[f"rows.jsonl:{line}" for line in (1, 2, 4, 5, 6, 7)],
        "rows.jsonl.gz:1",
        "saved.json",
    ]
    names = ["deep/packed", "marked", "picture", "rows-1", "rows-2", "rows-4"]
    assert [str(source.name) for source in sources][:6] == names
    catalogue = Catalogue.load("embedded")
    prints = {source.workflow(catalogue).fingerprint() for source in sources}
    assert len(prints) == 1
    assert [source.error for source in sources] == [None] * len(sources)


def test_a_file_of_another_name_is_read_where_it_is_asked_for(workflow, tmp_path):
    path = tmp_path / "flow.txt"
    path.write_text(json.dumps(workflow))
    source = _read(path)
    assert (source.value, str(source.name)) == (workflow, "flow")


def test_a_picture_gives_the_format_that_is_preferred(workflow, editor_file, tmp_path):
    _png(tmp_path / "both.png", prompt=workflow, workflow=editor_file)
    assert _read(tmp_path / "both.png").value == workflow
    assert _read(tmp_path / "both.png", prefer=UI).value == editor_file
    _png(tmp_path / "one.png", workflow=editor_file)
    assert _read(tmp_path / "one.png").value == editor_file
    (tmp_path / "both.json").write_text(json.dumps({"prompt": workflow, "workflow": editor_file}))
    assert _read(tmp_path / "both.json", prefer=UI).value == editor_file


def test_nodes_named_as_wrappers_are_nodes(tmp_path):
    graph = {"prompt": {"class_type": "A", "inputs": {}}, "graph": {"class_type": "B"}}
    (tmp_path / "x.json").write_text(json.dumps(graph))
    assert _read(tmp_path / "x.json").value == graph


def test_titles_of_nodes_are_read(workflow, tmp_path):
    workflow["5"]["_meta"] = {"title": "first pass"}
    workflow["6"]["_meta"] = {"title": 3}
    (tmp_path / "x.json").write_text(json.dumps(workflow))
    found = _read(tmp_path / "x.json").read(Catalogue.load("embedded"))
    assert found.titles == {"5": "first pass"}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.json", b"{", "not JSON: Expecting property name"),
        ("x.json", b"\xff{}", "not UTF-8: byte 0xff at 0"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b"", "not JSON"),
        ("x.json.gz", b"{}", "Not a gzipped file"),
        ("x.json.gz", gzip.compress(b"{}" * 1000)[:20], "ended before"),
        ("x.json.gz", gzip.compress(b"{}")[:10] + b"\xff" * 20, "invalid"),
        ("x.jsonl", b"\n \n", "got no rows"),
        ("x.png", b"no picture", "PNG"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    error = _read(tmp_path / name).error
    assert says in error
    assert "\n" not in error


def test_a_pipe_is_read(workflow):
    reading, writing = os.pipe()
    with open(writing, "wb") as file:  # noqa: PTH123
        file.write(json.dumps(workflow).encode())
    assert _read(f"/dev/fd/{reading}").value == workflow
    os.close(reading)


def test_pictures_without_a_workflow_say_so(tmp_path):
    _png(tmp_path / "plain.png")
    assert "text chunk 'prompt' or 'workflow'" in _read(tmp_path / "plain.png").error
    _png(tmp_path / "broken.png", prompt="{")
    assert _read(tmp_path / "broken.png").error.startswith("chunk 'prompt': not JSON")


def test_paths_that_hold_nothing_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    errors = [s.error for s in Inputs([str(tmp_path / "gone"), str(tmp_path / "empty")])]
    assert errors[0] == "no such file or folder"
    assert errors[1].startswith("got a folder without .json")


def test_one_bad_row_stops_no_other(workflow, tmp_path):
    good = json.dumps(workflow).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, b"{", b"\xff", good]))
    sources = list(Inputs([str(tmp_path)]))
    assert [source.error is None for source in sources] == [True, False, False, True]
    assert sources[1].path == f"{tmp_path}/rows.jsonl:2"


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    row = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
    for name, data in (("a.jsonl", row * 200), ("b.jsonl.gz", gzip.compress(row * 200))):
        (tmp_path / name).write_bytes(data)
        inputs = Inputs([str(tmp_path / name)])
        rows = iter(inputs)
        assert len(list(itertools.islice(rows, 3))) == 3
        if name == "a.jsonl":
            assert inputs.position() < inputs.size / 2
        assert len(list(rows)) == 197
        assert inputs.position() == inputs.size


def test_a_line_ends_at_a_newline_alone(workflow, tmp_path):
    workflow["2"]["inputs"]["text"] = "one\u2028two\x85three"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(workflow, ensure_ascii=False) + "\n", encoding="utf-8")
    assert _read(path).value == workflow


def test_what_is_no_workflow_is_a_value_error(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    source = _read(tmp_path / "x.json")
    assert source.error is None
    with pytest.raises(WorkflowError):
        source.workflow(Catalogue.load("embedded"))

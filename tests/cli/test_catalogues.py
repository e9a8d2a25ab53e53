"""Facts pinned: a snapshot's bytes depend on its name and content alone; facts fill in what a
server does not tell; differences are said input by input."""

import gzip
import json
from pathlib import Path

import pytest

from flowloom.cli.catalogues import open_catalogue, read_headers
from flowloom.workflow import Catalogue

SHIPPED = "data/catalogues"


def test_snapshot_and_show(run, run_json, tmp_path):
    for name in ("saved.json", "saved.json.gz"):
        path = tmp_path / name
        status, out, _ = run("catalogue", "snapshot", "--catalogue", "embedded", "--out", path)
        assert (status, out) == (0, "")
        status, out, _ = run("catalogue", "diff", "embedded", path)
        assert (status, out) == (0, "no difference\n")
    again = tmp_path / "again" / "saved.json.gz"
    run("catalogue", "snapshot", "--catalogue", path, "--out", again)
    assert again.read_bytes() == path.read_bytes()
    assert path.read_bytes()[4:8] == bytes(4), "the time is in the bytes"
    status, shown = run_json("catalogue", "show", path)
    assert status == 0
    assert "KSampler" in shown["nodes"]
    assert (shown["name"], shown["hash"]) == ("saved", Catalogue.load("embedded").hash)
    status, out, _ = run("catalogue", "show", path)
    assert status == 0
    assert "sampler_name" in out


def test_the_shipped_example_is_made_from_its_parts(run, tmp_path):
    out = tmp_path / "example.json.gz"
    status, _, err = run(
        "catalogue", "snapshot", "--catalogue", f"{SHIPPED}/comfyui-0.33.json.gz",
        "--files", f"{SHIPPED}/files.json", "--install", "--out", out,
    )  # fmt: skip
    assert status == 0, err
    shipped = Path(SHIPPED, "example.json.gz").read_bytes()
    assert gzip.decompress(out.read_bytes()) == gzip.decompress(shipped)


def test_files_describe_what_is_installed_and_add_nothing(run, run_json, tmp_path):
    facts = [
        {"folder": "loras", "name": "a.safetensors", "family": "sdxl", "card": "rain"},
        {"folder": "loras", "name": "other.safetensors", "family": "sdxl"},
    ]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    loader = {"required": {"lora_name": [["sub/a.safetensors", "b.safetensors"]]}}
    info = {"LoraLoaderModelOnly": {"input": loader, "output": ["MODEL"]}}
    (tmp_path / "server.json").write_text(json.dumps(info))
    out = tmp_path / "out.json"
    command = ("catalogue", "snapshot", "--catalogue", tmp_path / "server.json", "--out", out)
    assert run(*command, "--files", tmp_path / "facts.json")[0] == 0
    files = run_json("catalogue", "show", out)[1]["files"]
    found = [(file["name"], file["family"], file["card"]) for file in files]
    assert found == [("b.safetensors", "", ""), ("sub/a.safetensors", "sdxl", "rain")]
    assert run(*command, "--files", tmp_path / "facts.json", "--install")[0] == 0
    files = run_json("catalogue", "show", out)[1]["files"]
    assert [file["name"] for file in files] == [
        "a.safetensors",
        "b.safetensors",
        "other.safetensors",
        "sub/a.safetensors",
    ]


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("{", "cannot read"),
        ("{}", "got dict, expected a list"),
        ('[{"folder": "loras"}]', "entry 0"),
        ('[{"folder": "loras", "name": "a", "size": "3"}]', "entry 0"),
        ('[{"folder": "loras", "name": "a", "card": 3}]', "entry 0"),
        (None, "No such file"),
    ],
)
def test_facts_of_another_form_are_one_line(run, tmp_path, facts, says):
    path = tmp_path / "facts.json"
    if facts is not None:
        path.write_text(facts)
    out = tmp_path / "out.json"
    command = ("catalogue", "snapshot", "--catalogue", "embedded", "--out", out)
    status, _, err = run(*command, "--files", path)
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_what_is_known_of_a_file_is_kept(run, run_json, tmp_path):
    known = Catalogue.load("embedded").files[0]
    fact = {"folder": known.folder, "name": known.name, "family": "other", "card": "other"}
    (tmp_path / "facts.json").write_text(json.dumps([fact]))
    options = ("--files", tmp_path / "facts.json", "--install", "--out", tmp_path / "out.json")
    assert run("catalogue", "snapshot", "--catalogue", "embedded", *options)[0] == 0
    assert run("catalogue", "diff", "embedded", tmp_path / "out.json")[0] == 0


def test_bounds_that_json_lacks_are_none(run_json, tmp_path):
    facts = {"min": float("-inf"), "max": float("inf"), "default": 1.0}
    info = {"X": {"input": {"required": {"a": ["FLOAT", facts]}}, "output": ["IMAGE"]}}
    (tmp_path / "server.json").write_text(json.dumps(info))
    status, shown = run_json("catalogue", "show", tmp_path / "server.json")
    assert status == 0
    (entry,) = shown["nodes"]["X"]["inputs"]
    assert (entry.get("min"), entry.get("max")) == (None, None)


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9])
def test_broken_files_are_one_line(run, tmp_path, data):
    (tmp_path / "x.json.gz").write_bytes(data)
    status, _, err = run("catalogue", "show", tmp_path / "x.json.gz")
    assert status == 2
    assert len(err.splitlines()) == 1


def test_a_file_that_holds_another_thing_is_named(run, good, tmp_path):
    (tmp_path / "other.json").write_text('{"nodes": {"A": {}}, "files": []}')
    for path in (good, tmp_path / "other.json"):
        status, _, err = run("catalogue", "diff", "embedded", path)
        assert status == 2
        assert str(path) in err


def test_install_needs_files(run, tmp_path):
    command = ("catalogue", "snapshot", "--catalogue", "embedded", "--out", tmp_path / "x.json")
    status, _, err = run(*command, "--install")
    assert status == 2
    assert err.startswith("flowloom catalogue snapshot: --install: ")


def test_diff_says_what_changed(run, run_json, tmp_path):
    path = tmp_path / "saved.json"
    run("catalogue", "snapshot", "--catalogue", "embedded", "--out", path)
    data = json.loads(path.read_text())
    del data["nodes"]["ImageBlur"]
    (cfg,) = [i for i in data["nodes"]["KSampler"]["inputs"] if i["name"] == "cfg"]
    cfg["max"] = 7.5
    data["files"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    status, answer = run_json("catalogue", "diff", "embedded", path)
    assert status == 1
    assert answer["old"] == Catalogue.load("embedded").hash != answer["new"]
    assert answer["nodes"]["removed"] == ["ImageBlur"]
    (change,) = answer["nodes"]["changed"]["KSampler"]
    assert (change["where"], change["what"], change["new"]) == ("cfg", "max", 7.5)
    assert len(answer["files"]["changed"]) == 1
    status, out, _ = run("catalogue", "diff", "embedded", path)
    assert status == 1
    assert "class removed: ImageBlur\n" in out
    assert "class changed: KSampler\n  input cfg: max " in out
    assert out.splitlines()[-1] == "1 class removed, 1 class changed, 1 file changed"


def test_headers_are_name_and_value():
    assert read_headers(["A=b", "X-Key=c=d", "E="]) == {"A": "b", "X-Key": "c=d", "E": ""}
    for wrong in ("secret", "A B=secret", "=secret", "A=secret\r\nX: y"):
        with pytest.raises(ValueError, match="--header number 2: expected NAME=VALUE") as error:
            read_headers(["A=b", wrong])
        assert "secret" not in str(error.value)


def test_a_header_that_is_not_used_is_told(capsys):
    open_catalogue("embedded", ["A=secret"])
    assert capsys.readouterr().err == "--header is not used: embedded is no server\n"


@pytest.mark.parametrize("name", ["comfyui-0.1", "gone.json", "localhost:8188", "gone.txt", "a/b"])
def test_unknown_catalogues_are_one_line_that_says_what_there_is(run, good, name):
    status, _, err = run("validate", good, "--catalogue", name)
    assert status == 2
    assert name in err
    assert len(err.splitlines()) == 1
    assert "http://HOST:PORT" in err or "cannot read" in err


def test_without_the_data_folder_it_is_said_where_catalogues_were_looked_for(
    run, good, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "elsewhere"))
    status, _, err = run("validate", good, "--catalogue", "example")
    assert status == 2
    assert str(tmp_path / "elsewhere" / "catalogues") in err
    assert "FLOWLOOM_DATA" in err

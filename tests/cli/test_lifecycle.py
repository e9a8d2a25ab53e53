"""Facts pinned: each command prints lines for people or one JSON object, and its status says equal,
or in order; without anything recorded, a command says so in one line."""

import dataclasses
import json

import pytest

from flowloom import runs
from flowloom.lifecycle import reproduce, versioning


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    text: str = "x"


def finished(stage, text, inputs=None):
    run = runs.open_run(stage, Config(text), inputs or {})
    run.begin()
    (run.out / "a.txt").write_text(text)
    result = run.finish({"a/b": 1.0})
    versioning.publish(result.out_dir)
    return result


@pytest.fixture
def folder():
    """The run folder of a designer made from pairs."""
    pairs = finished("build_pairs", "pairs").digest
    return finished("train_sft", "designer", {"pairs": pairs}).out_dir.parent


@pytest.fixture
def writes(monkeypatch):
    def repeat(identity, inputs, folder, fresh):
        out = folder / "out"
        out.mkdir()
        (out / "a.txt").write_text(identity["config"]["text"])
        (folder / "config.json").write_text(json.dumps(identity))
        return out, runs.folder_digest(out)

    monkeypatch.setattr(reproduce, "_repeat", repeat)


def test_lineage(run, run_json, folder):
    status, out, _ = run("lineage", folder)
    assert status == 0
    assert "pairs" in out
    assert "by build_pairs" in out
    assert f"code: {runs.code_digest()}" in out
    status, answer = run_json("lineage", folder)
    assert status == 0
    assert [item["made_by"][0]["stage"] for item in answer["artifacts"]] == [
        "train_sft",
        "build_pairs",
    ]
    finished("build_pairs", "pairs", {"x": "1"})
    status, out, _ = run("lineage", folder)
    assert status == 1
    assert "! 2 runs made it" in out


def test_reproduce(run, run_json, folder, writes):
    status, out, _ = run("reproduce", folder)
    assert status == 0
    assert "equal: train_sft" in out
    status, out, _ = run("reproduce", folder, "--set", "text=other")
    assert status == 1
    assert "cause: train_sft: config: text: got other, the run had designer" in out
    status, answer = run_json("reproduce", folder, "--set", "text=other")
    assert (status, answer["equal"]) == (1, False)


def test_compare(run, run_json, folder, tmp_path):
    other = finished("train_sft", "other").out_dir.parent
    status, out, _ = run("compare", folder, other, "--out", tmp_path / "page.html")
    assert status == 0
    assert "text" in out
    assert "<html" in (tmp_path / "page.html").read_text()
    status, answer = run_json("compare", folder, other)
    assert answer["metrics"]["a/b"] == {"a": 1.0, "b": 1.0, "difference": 0.0}
    assert run("compare", folder, other, "--out", "x.pdf")[0] == 2


def test_gc(run, run_json, folder):
    status, answer = run_json("gc")
    assert (status, answer["items"], answer["deleted_bytes"]) == (0, [], None)
    assert answer["young"] > 0
    status, out, _ = run("gc", "--min-age-hours", 0)
    assert status == 0
    assert "nothing was deleted" in out
    assert folder.is_dir()
    assert run("gc", "--min-age-hours", 0, "--delete")[0] == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("lineage",),
        ("reproduce",),
        ("reproduce", "0" * 32),
        ("compare", "a", "b"),
        ("gc", "--min-age-hours", "-1"),
        ("gc", "--remote", "seed"),
        ("gc", "--pin", "0" * 32),
        ("run", "train_sft", "--dry-run", "--config", "nothing.json"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line_and_status_2(run, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1

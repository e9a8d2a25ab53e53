"""Facts pinned: a run's key covers config, inputs, data and code; an artifact appears whole; the
same key resumes, `work` survives an interruption, and a finished run is not run again.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from flowloom import runs, stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLOWLOOM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")


def key(config=None, inputs=None):
    return runs.open_run("train_sft", config or Config(), inputs or {}).dir.name


def test_the_key_changes_with_config_inputs_data_and_code(tmp_path, monkeypatch):
    first = key()
    assert key() == first
    assert key(Config(steps=4)) != first
    assert key(inputs={"pairs": "a"}) != first
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {'a' * 32}.dir\n  path: data\n")
    assert runs.data_md5() == "a" * 32 + ".dir"
    assert key() != first
    with_data = key()
    runs.code_digest.cache_clear()
    monkeypatch.setenv("FLOWLOOM_CODE_DIGEST", "other")
    assert key() != with_data
    runs.code_digest.cache_clear()


def test_folder_digest_is_of_names_and_bytes_in_path_order(tmp_path):
    folder = tmp_path / "artifact"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "x").write_bytes(b"1")
    (folder / "a").write_bytes(b"2")
    entries = runs.folder_entries(folder)
    assert [entry["relpath"] for entry in entries] == ["a", "b/x"]
    assert entries[0]["md5"] == "c81e728d9d4c2f636f067f89cc14862c"
    before = runs.folder_digest(folder)
    (folder / "b" / "x").write_bytes(b"3")
    assert runs.folder_digest(folder) != before
    assert before.endswith(".dir")


def _stage(monkeypatch, tmp_path, body):
    """Register a stage whose function is `body`, in a module of its own."""
    import sys
    import types

    module = types.ModuleType("scripted_stage")
    module.body = body
    monkeypatch.setitem(sys.modules, "scripted_stage", module)
    monkeypatch.setitem(stages.STAGES, "scripted", stages.Stage(function="scripted_stage:body"))


def test_a_stage_runs_once_and_its_artifact_appears_whole(monkeypatch, tmp_path):
    calls = []

    def body(config, run):
        calls.append(config.steps)
        (run.out / "model").write_text("weights")
        assert not (run.dir / "out").exists()
        run.metric(0, {"train/loss": 1.0})
        return {"train/loss": 0.5}

    _stage(monkeypatch, tmp_path, body)
    first = stages.run("scripted", Config())
    again = stages.run("scripted", Config())
    assert calls == [3]
    assert (first.cached, again.cached) == (False, True)
    assert (again.out_dir / "model").read_text() == "weights"
    assert again.metrics == {"train/loss": 0.5}
    assert again.digest == runs.folder_digest(again.out_dir) == runs.input_digest(again.out_dir)
    assert not (again.out_dir.parent / "work").exists()


def test_an_interrupted_stage_resumes_from_work_with_an_empty_artifact(monkeypatch, tmp_path):
    def body(config, run):
        assert list(run.out.iterdir()) == []
        seen = sorted(file.name for file in run.work.iterdir())
        (run.out / "half").write_text("half")
        (run.work / "checkpoint").write_text("1")
        if not seen:
            raise KeyboardInterrupt
        return {}

    _stage(monkeypatch, tmp_path, body)
    with pytest.raises(KeyboardInterrupt):
        stages.run("scripted", Config())
    result = stages.run("scripted", Config())
    assert [file.name for file in result.out_dir.iterdir()] == ["half"]


def test_unknown_stages_and_inputs_are_named():
    with pytest.raises(ValueError, match="stage: got 'fly'"):
        stages.run("fly", Config())
    with pytest.raises(ValueError, match="build_pairs: input 'catalogue' is missing"):
        stages.run("build_pairs", Config())
    with pytest.raises(ValueError, match="build_pairs: unknown input 'cat', expected catalogue"):
        stages.run("build_pairs", Config(), {"cat": "x"})
    with pytest.raises(ValueError, match="expected an existing file or folder"):
        stages.run("build_pairs", Config(), {"catalogue": Path("nowhere")})


def test_json_is_written_whole(tmp_path):
    runs.write_json(tmp_path / "a.json", {"b": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]

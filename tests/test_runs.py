"""Facts pinned: a run's key covers config, inputs, data and code; an artifact appears whole; the
same key resumes, `work` survives an interruption, and a finished run is not run again; one process
at a time is in a run folder, and of a group only the first one writes to it.
"""

import dataclasses
import fcntl
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


def test_the_code_is_what_was_written_not_what_python_makes_of_it(tmp_path, monkeypatch):
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "a.py").write_text("a = 1")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.delenv("FLOWLOOM_CODE_DIGEST", raising=False)
    digest = runs.code_digest.__wrapped__
    before = digest()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"1")
    assert digest() == before
    (tmp_path / "a.py").write_text("a = 2")
    assert digest() != before


def test_only_the_artifact_has_the_digest_that_was_recorded():
    run = runs.open_run("train_sft", Config(), {})
    run.begin()
    run.metric(0, {"train/loss": 1.0})
    result = run.finish({})
    assert runs.input_digest(result.out_dir) == result.digest
    path = run.dir / "metrics.jsonl"
    assert runs.input_digest(path) == runs.file_md5(path)


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


def test_a_run_is_done_when_nothing_is_left_to_write(monkeypatch):
    run = runs.open_run("train_sft", Config(), {})
    run.begin()
    write_json = runs.write_json

    def refuses(path, value):
        if path.name == "timing.json":
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(runs, "write_json", refuses)
    with pytest.raises(KeyboardInterrupt):
        run.finish({})
    assert not run.done


def test_one_process_at_a_time_is_in_a_run_folder():
    run = runs.open_run("train_sft", Config(), {})
    with (
        runs.exclusive(run),
        (run.dir / "lock").open() as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(("rank", "writes"), [("0", True), ("1", False), ("2", False)])
def test_the_first_process_of_a_group_writes(rank, writes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    run = runs.open_run("train_sft", Config(), {})
    assert (run.dir / "config.json").is_file() == writes


@pytest.mark.parametrize(("joint", "calls"), [(True, 1), (False, 0)])
def test_another_process_takes_part_in_joint_stages_alone(joint, calls, monkeypatch, tmp_path):
    made = []

    def finish(seconds):
        """As the first process does while this one waits."""
        run = runs.open_run("scripted", Config(), {})
        run.begin()
        run.finish({})

    _stage(monkeypatch, tmp_path, lambda config, run: made.append(run))
    scripted = dataclasses.replace(stages.STAGES["scripted"], joint=joint)
    monkeypatch.setitem(stages.STAGES, "scripted", scripted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stages.time, "sleep", finish)
    for _ in range(2):  # once it is done nobody runs it
        assert stages.run("scripted", Config()).cached
    assert len(made) == calls


def test_the_order_of_an_input_that_is_a_list_counts(monkeypatch, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / folder.name).touch()
    monkeypatch.setitem(stages.STAGES, "listed", stages.Stage(function="a:b", inputs=("members",)))
    keys = [
        stages.opened("listed", Config(), {"members": given})[0].dir.name
        for given in (folders, folders[::-1])
    ]
    assert keys[0] != keys[1]


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

"""Facts about folders that take no more files:

- a disk that is full at any moment of a stage, or a file that may not grow: one line that says
  what, where, got and expected, with the error itself as its cause;
- nothing half-written is left: no partial file, no artifact without its record, no object in the
  store that is not whole, no half line of metrics, and the old checkpoint is still there;
- once there is space the same call goes on, from its checkpoint, and makes the same digest;
- a read-only home, one below a file and one that may not be written to say so and stay untouched;
- a store alone that is read-only loses no work: the next call publishes what was finished;
- a turn that cannot be started or gone on with says so in the same way;
- other errors, and a `ValueError` that says it already, pass as they are;
- the command line prints the line and nothing else.

A full or read-only disk is a small mounted one; where that is not allowed its tests are skipped."""

import dataclasses
import errno
import json
import os
import resource
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from flowloom import cli, runs, stages
from flowloom.lifecycle import remotes, turns
from flowloom.runs import StorageError, file_md5, home, storing, write_json, write_state

STEPS = 3
DISK_KB = 1024
PAGE_KB = 4
NEED_KB = 160  # more than the stage below takes with its copy in the store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Of the stage below."""

    seed: int = 0


def small_stage(config, run):
    """Writes by every way that stages write: lines, checkpoints, safetensors, JSON, plain files."""
    import torch
    from safetensors.numpy import save_file

    state_path = run.work / "state.pt"
    state = torch.load(state_path) if state_path.is_file() else {"step": 0}
    for step in range(state["step"], STEPS):
        run.metric(step, {"loss/train": 1.0 / (step + 1)})
        write_state(state_path, {"step": step + 1, "weights": torch.zeros(2000)})
        run.log(f"step {step}")
    save_file({"weights": np.arange(4000, dtype=np.float32)}, run.out / "weights.safetensors")
    write_json(run.out / "config.json", {"seed": config.seed})
    (run.out / "text.txt").write_bytes(bytes(range(256)) * 40)
    return {"loss/final": 0.5}


@pytest.fixture(autouse=True)
def _stage(monkeypatch):
    monkeypatch.setitem(stages.STAGES, "small", stages.Stage(function=f"{__name__}:small_stage"))
    monkeypatch.setattr(stages, "_function", lambda stage: small_stage)
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")  # what is recorded waits


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Digest of the stage where nothing is in its way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWLOOM_HOME", str(tmp_path_factory.mktemp("free")))
        patch.setenv("FLOWLOOM_TRACKING", "spool")
        patch.setitem(stages.STAGES, "small", stages.Stage(function="a:b"))
        patch.setattr(stages, "_function", lambda stage: small_stage)
        return stages.run("small", Config()).digest


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", *options, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = mount("-t", "tmpfs", "-o", f"size={DISK_KB}k", "none")
    if done.returncode:
        pytest.skip(f"no disk of its own: {done.stderr.strip()}")
    ballast = folder / "ballast"

    def fill(free_kb):
        """Leave `free_kb` free."""
        ballast.unlink(missing_ok=True)
        stat = os.statvfs(folder)
        ballast.write_bytes(b"0" * (stat.f_bavail * stat.f_bsize - free_kb * 1024))

    try:
        yield SimpleNamespace(
            dir=folder,
            fill=fill,
            empty=lambda: ballast.unlink(missing_ok=True),
            read_only=lambda: mount("-o", "remount,ro").check_returncode(),
            writable=lambda: mount("-o", "remount,rw").check_returncode(),
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_nothing_half_written(folder):
    assert not [path for path in folder.rglob("*.partial") if path.name != "ballast"]
    for path in folder.glob("store/files/md5/*/*"):
        digest = file_md5(path)
        assert digest == path.parent.name + path.name.removesuffix(".dir")
    assert not list(folder.glob("store/partial/*"))
    for path in folder.glob("runs/*/*/out"):
        # `finish` renames and then counts and records; `begin` removes what has no record.
        assert {file.name for file in path.iterdir()} == {
            "config.json",
            "text.txt",
            "weights.safetensors",
        }
    for path in folder.glob("runs/*/*/metrics.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    for path in folder.rglob("*.json"):
        assert json.loads(path.read_text()) is not None


def assert_one_line(error, *parts):
    text = str(error)
    assert "\n" not in text
    assert "the same command goes on from here" in text
    for part in parts:
        assert part in text
    assert error.__cause__ is not None


def test_a_disk_full_at_any_moment_is_said_and_the_same_call_goes_on(disk, monkeypatch, expected):
    outcomes = []
    for free_kb in range(0, NEED_KB + 1, PAGE_KB):
        folder = disk.dir / f"home-{free_kb}"
        monkeypatch.setenv("FLOWLOOM_HOME", str(folder))
        disk.fill(free_kb)
        try:
            stages.run("small", Config())
            outcomes.append("done")
        except StorageError as error:
            assert_one_line(error, str(folder), "'No space left on device'", "free space there")
            outcomes.append(str(error).partition(":")[0])
        assert_nothing_half_written(folder)
        disk.empty()
        assert stages.run("small", Config()).digest == expected
        (pointer,) = folder.glob("runs/small/*/pointer.json")
        assert json.loads(pointer.read_text())["md5"] == expected
        subprocess.run(["rm", "-r", str(folder)], check=True)
    # The sweep met both the stage and the store full, and at its end nothing.
    assert set(outcomes) == {"small", "remote 'store'", "done"}
    assert outcomes[0] == "small"
    assert outcomes[-1] == "done"


def test_a_checkpoint_is_gone_on_from(disk, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_HOME", str(disk.dir / "home"))
    seen = []
    original = runs.Run.metric

    def metric(self, step, values):
        seen.append(step)
        original(self, step, values)
        if seen == [0, 1]:
            disk.fill(PAGE_KB)

    monkeypatch.setattr(runs.Run, "metric", metric)
    with pytest.raises(StorageError, match=r"state\.pt"):
        stages.run("small", Config())
    disk.empty()
    stages.run("small", Config())
    assert seen == [0, 1, 1, 2]


def test_the_old_checkpoint_stays(disk):
    import torch

    path = disk.dir / "state.pt"
    write_state(path, {"step": 1})
    disk.fill(PAGE_KB)
    with pytest.raises(StorageError, match="No space left"), storing("loop", disk.dir):
        write_state(path, {"step": 2, "weights": torch.zeros(20_000)})
    assert torch.load(path) == {"step": 1}
    assert [item.name for item in disk.dir.iterdir()].count("state.pt.partial") == 0


def test_a_line_is_whole_or_not_there(disk):
    run = runs.Run("small", disk.dir / "run")
    disk.fill(2 * PAGE_KB)

    def log_for_long():
        for step in range(10_000):
            run.metric(step, {"loss/train": 0.123456789})

    with pytest.raises(OSError, match="No space left") as caught:
        log_for_long()
    assert caught.value.filename == str(run.dir / "metrics.jsonl")
    text = (run.dir / "metrics.jsonl").read_text()
    assert text.endswith("}\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(
        range(len(text.splitlines()))
    )


def test_a_read_only_home_stays_as_it_is(disk, monkeypatch, expected):
    folder = disk.dir / "home"
    monkeypatch.setenv("FLOWLOOM_HOME", str(folder))
    folder.mkdir()
    disk.read_only()
    with pytest.raises(StorageError) as caught:
        stages.run("small", Config())
    assert_one_line(caught.value, str(folder), "'Read-only file system'", "takes files")
    assert list(folder.iterdir()) == []
    disk.writable()
    assert stages.run("small", Config()).digest == expected


def test_a_folder_that_cannot_even_be_held_says_so(disk):
    run = runs.Run("small", disk.dir / "run")
    disk.read_only()
    with pytest.raises(StorageError) as caught, runs.exclusive(run):
        pass
    assert_one_line(caught.value, "small: ", str(run.dir), "'Read-only file system'")


def test_a_read_only_store_loses_no_work(disk, monkeypatch, expected):
    store = disk.dir / "store"
    store.mkdir()
    monkeypatch.setenv("FLOWLOOM_STORE", str(store))
    disk.read_only()
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            stages.run("small", Config())
        assert_one_line(caught.value, str(store), "'Read-only file system'")
        assert list(store.iterdir()) == []
    disk.writable()
    result = stages.run("small", Config())
    assert result.cached
    assert result.digest == expected
    assert remotes.find("store").digest_of(expected) == expected


def test_a_home_below_a_file_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StorageError) as caught:
        stages.run("small", Config())
    assert_one_line(caught.value, str(tmp_path / "file"), "'Not a directory'", "expected a folder")


def test_a_turn_on_a_full_disk_is_said(disk, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_HOME", str(disk.dir / "home"))
    fields = dict.fromkeys(turns.KEY_FIELDS, "x")
    disk.fill(0)
    with pytest.raises(StorageError) as caught:
        turns.open_turn(fields, lambda: None)
    assert_one_line(caught.value, "turn 0001: ", str(disk.dir), "free space there")
    disk.empty()
    turn = turns.open_turn(fields, lambda: None)
    disk.fill(0)
    with pytest.raises(StorageError, match="turn 0001: "), turns.held(turn):
        turn.mark("running")
    assert turns.latest().record["status"] == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is barred to root")
def test_a_home_that_may_not_be_written_to_is_said(tmp_path, monkeypatch):
    (tmp_path / "barred").mkdir(mode=0o500)
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "barred" / "home"))
    with pytest.raises(StorageError, match="'Permission denied', expected permission"):
        stages.run("small", Config())


def test_a_file_that_may_not_grow_is_said_and_the_same_call_goes_on(expected):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(StorageError) as caught:
            stages.run("small", Config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(caught.value, str(home()), "'File too large'", "no limit on the size")
    assert_nothing_half_written(home())
    assert stages.run("small", Config()).digest == expected


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM]
)
def test_a_refusal_names_its_file_or_the_folder(number, tmp_path):
    with pytest.raises(StorageError) as caught, storing("loop", tmp_path):
        raise OSError(number, "x")
    said = f"loop: {tmp_path}: got {os.strerror(number)!r}, expected "
    assert str(caught.value).startswith(said)
    with pytest.raises(StorageError, match="loop: /to: got"), storing("loop", tmp_path):
        raise OSError(number, "x", "/from", None, "/to")  # of a copy


def wrapped(error, how):
    try:
        raise error
    except OSError as inner:
        if how == "cause":
            raise RuntimeError("a worker ended") from inner
        if how == "context":
            raise RuntimeError("a worker ended")  # noqa: B904  as torch does
        raise RuntimeError("a worker ended") from None


@pytest.mark.parametrize("how", ["cause", "context"])
def test_what_comes_from_a_refusal_is_one(how, tmp_path):
    with pytest.raises(StorageError, match="No space left"), storing("loop", tmp_path):
        wrapped(OSError(errno.ENOSPC, "x"), how)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("I/O error: No space left on device (os error 28)", "No space left on device"),
        ("(sqlite3.OperationalError) database or disk is full", "No space left on device"),
        ("attempt to write a readonly database", "Read-only file system"),
    ],
)
def test_a_refusal_in_words_alone_is_one(text, said, tmp_path):
    with pytest.raises(StorageError, match=f"got '{said}'"), storing("loop", tmp_path):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("loss is not finite"),
        KeyError("x"),
        RuntimeError("shape mismatch"),
        OSError(errno.EIO, "x"),
        FileNotFoundError(errno.ENOENT, "x"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass(error, tmp_path):
    with pytest.raises(type(error)) as caught, storing("loop", tmp_path):
        raise error
    assert caught.value is error


def test_a_refusal_that_was_dealt_with_passes(tmp_path):
    with pytest.raises(RuntimeError, match="a worker ended"), storing("loop", tmp_path):
        wrapped(OSError(errno.ENOSPC, "x"), "none")


def test_the_command_line_prints_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "file" / "home"))
    assert cli.main(["run", "tune_generator", "--recipe", "smoke"]) == cli.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"flowloom run: tune_generator: {tmp_path}")

"""Facts: one word says how a stage is launched, and other words are refused; a run's result is the
same file whoever wrote it, and is not made twice; two processes under torchrun train as this one
does at the same batch, to the order of summation; of processes that fail, the first is named with
its last lines, also if it was killed; an interrupt or SIGTERM ends every process, and so does the
death of the launcher; a request of other code, data or inputs is refused."""

import dataclasses
import json
import os
import signal
import time

import pytest
import safetensors.torch
import torch

from flowloom import launch, stages
from flowloom.cli import main
from flowloom.launch import request
from flowloom.launch.errors import LaunchError
from tests.designer.test_sft import CONFIG
from tests.launch.rehearsal import RehearsalConfig
from tests.launch.scripts import process

LOSS_ATOL, WEIGHT_ATOL = 1e-5, 1e-3
"""Sums in another order; Adam's first steps have the size of the learning rate whatever the
gradient's."""
END_S = 20.0
"""Within which processes end that were told to."""

LAUNCH = """
from flowloom import launch
from tests.launch.rehearsal import RehearsalConfig
launch.run("rehearse", RehearsalConfig(mode="hang"), {}, "torchrun:2")
"""


def test_a_launcher_is_one_word():
    assert launch.parse("process") == launch.Launcher(kind="process")
    assert launch.parse("torchrun:4") == launch.Launcher(kind="torchrun", num_processes=4)
    job = launch.Launcher(kind="trainjob", num_nodes=2, num_processes=4)
    assert launch.parse("trainjob:2x4") == job
    assert launch.parse("trainjob:2x4/cpu") == dataclasses.replace(job, device="cpu")
    for text in ("", "torchrun", "torchrun:0", "trainjob:2", "trainjob:0x4", "trainjob:2x4/tpu"):
        with pytest.raises(ValueError, match=f"launch: got '{text}', expected process, torchrun"):
            launch.parse(text)


def test_the_command_line_refuses_a_launcher_before_anything_runs(capsys):
    assert main(["run", "train_grpo", "--recipe", "smoke", "--launch", "torchrun"]) == 2
    assert capsys.readouterr().err.startswith("flowloom run: launch: got 'torchrun', expected")


def test_what_cannot_be_launched_is_refused(rehearse, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="report: launch: got 'torchrun:2', expected process"):
        launch.run("report", RehearsalConfig(), {}, "torchrun:2")
    with pytest.raises(ValueError, match="unknown input 'pairs', expected script"):
        launch.run(rehearse, RehearsalConfig(), {"pairs": tmp_path}, "torchrun:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="within torchrun, expected process"):
        launch.run(rehearse, RehearsalConfig(), {}, "torchrun:2")


def test_a_request_runs_where_code_data_and_inputs_are_the_same(rehearse, tmp_path):
    script = tmp_path / "script"
    script.write_text("to be read")
    config = RehearsalConfig(shares=(0.5, 0.125))
    run, paths = stages.opened(rehearse, config, {"script": script})
    file = request.write(run, config, paths)
    asked = request.read(file)
    assert asked.key == run.dir.name
    script.write_text("changed")
    with pytest.raises(ValueError, match=rf"rehearse: run: got \w+, expected {run.dir.name}"):
        asked.run()
    script.write_text("to be read")
    other = dataclasses.replace(asked, sources="code-1-data-2")
    with pytest.raises(ValueError, match="rehearse: sources: got"):
        other.run()
    result = asked.run()
    assert (result.out_dir / "text").read_text() == "to be read"
    assert result.metrics == {"rehearse/total": 0.625}
    with pytest.raises(ValueError, match=r"request .*: got .*expected a launch.json"):
        request.read(script)


def test_an_input_from_elsewhere_is_shared_by_its_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / "home"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "a").write_text("1")
    copy = request.share(folder)
    assert copy.is_relative_to(tmp_path / "home")
    assert (copy / "a").read_text() == "1"
    assert request.share(folder) == copy == request.share(copy)
    assert list(copy.parent.iterdir()) == [copy]
    (copy / "a").write_text("2")
    with pytest.raises(ValueError, match="got content of digest"):
        request.share(folder)


@pytest.mark.slow
def test_two_processes_train_as_this_one(rehearse, inputs, monkeypatch, tmp_path, capfd):
    config = dataclasses.replace(CONFIG, prior_steps=3, best_steps=2)
    found = {}
    for launcher in ("process", "torchrun:2"):
        monkeypatch.setenv("FLOWLOOM_HOME", str(tmp_path / launcher))
        found[launcher] = launch.run("train_sft", config, inputs, launcher)
    assert "[train_sft]" in capfd.readouterr().err
    alone, joint = found.values()
    assert joint.out_dir.parent.name == alone.out_dir.parent.name
    assert not joint.cached
    record = json.loads((joint.out_dir.parent / "result.json").read_text())
    assert record["digest"] == joint.digest
    logs = [(result.out_dir.parent / "metrics.jsonl").open() for result in (alone, joint)]
    lines = [[json.loads(line) for line in log] for log in logs]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, two in zip(*lines, strict=True):
        assert two.keys() == one.keys()
        for name in (name for name in one if name.endswith("_loss")):
            assert two[name] == pytest.approx(one[name], abs=LOSS_ATOL), (one["step"], name)
    weights = [safetensors.torch.load_file(r.out_dir / "model.safetensors") for r in (alone, joint)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=WEIGHT_ATOL)


def test_processes_share_one_run_and_its_result(rehearse, capfd):
    result = launch.run(rehearse, RehearsalConfig(), {}, "torchrun:2")
    assert "[rehearse] 2 processes, OMP_WAIT_POLICY=passive" in capfd.readouterr().err
    assert (result.metrics, result.cached) == ({"rehearse/total": 0.75}, False)
    again = launch.run(rehearse, RehearsalConfig(), {}, "torchrun:2")
    assert (again.digest, again.cached) == (result.digest, True)


@pytest.mark.parametrize(
    ("mode", "code", "last"),
    [
        ("rank 1 fails", 1, "ZeroDivisionError: rank 1 divides by zero"),
        pytest.param("rank 1 is killed", -9, "about to be killed", marks=pytest.mark.slow),
    ],
)
def test_the_failed_process_is_named_with_its_last_lines(rehearse, mode, code, last):
    expected = f"rehearse: rank 1 of 2 failed, exit code {code}; its last lines:"
    with pytest.raises(LaunchError) as error:
        launch.run(rehearse, RehearsalConfig(mode=mode), {}, "torchrun:2")
    first, *lines = str(error.value).splitlines()
    assert first == expected
    assert lines[-1].strip() == last
    assert len(lines) <= 20


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_the_processes_end_with_their_launcher(rehearse, number):
    run, _ = stages.opened(rehearse, RehearsalConfig(mode="hang"))
    with process(LAUNCH) as launcher:
        _until(lambda: len(list(run.work.glob("pid-*"))) == 2, 60)
        pids = {int(pid) for file in run.work.glob("pid-*") for pid in file.read_text().split()}
        assert len(pids) == 3  # two processes and the one that started them
        assert all(map(_alive, pids))
        launcher.send_signal(number)
        launcher.wait(END_S)
    _until(lambda: not any(map(_alive, pids)), END_S)
    ends = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert launcher.returncode == ends[number]
    assert not run.done


def _until(holds, for_s):
    until_s = time.monotonic() + for_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.05)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0] != "Z"

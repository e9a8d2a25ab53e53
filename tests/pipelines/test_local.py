"""Running on this machine.

Facts pinned:
- each step has a log file of its own, iterations of a loop are told apart, a component that is used
  again or in a sub-pipeline has the name that the pipeline gives it, the console is left to two
  lines per step;
- a failed step ends the turn with its name and its log, is not tried again, and the exit handler
  knows it;
- a pipeline loaded from its YAML runs like the one it was compiled from;
- errors of usage are one line and exit status 2.
"""

import builtins
import io
import json
import re

import pytest
from kfp import compiler, components, dsl
from kfp.local import pipeline_orchestrator, subprocess_task_handler
from rich.console import Console

from flowloom.lifecycle import turns
from pipelines import local, summary
from pipelines.__main__ import main


@dsl.component(base_image="any", install_kfp_package=False)
def double(number: int, fail: bool, out: dsl.Output[dsl.Dataset]):
    """Double a number."""
    import os
    from pathlib import Path

    print(f"doubling {number} in turn {os.environ['FLOWLOOM_TURN']}")
    if fail:
        raise ValueError("loss: got nan at step 3")
    Path(out.path).write_text(str(2 * number))


@dsl.component(base_image="any", install_kfp_package=False)
def add(numbers: dsl.Input[list[dsl.Dataset]]):
    """Add the numbers."""
    from pathlib import Path

    total = sum(int(Path(number.path).read_text()) for number in numbers)
    print(f"total {total}")


@dsl.component(base_image="any", install_kfp_package=False)
def tell(status: dsl.PipelineTaskFinalStatus):
    """Record the end, as `end_turn` does."""
    from flowloom.lifecycle import turns

    turns.close(status.state, status.error_message)


def named(task, name):
    task.set_retry(1, backoff_duration="600s")
    # On a cluster the engine's run; here the runner says which turn it is.
    return task.set_env_variable("FLOWLOOM_STEP", name).set_env_variable("FLOWLOOM_TURN", "run-7")


@dsl.pipeline(name="again")
def again(fail: bool):
    """Double a number in a sub-pipeline."""
    with dsl.ParallelFor([7]) as number:
        doubled = named(double(number=number, fail=fail), "double_round_2")
    named(add(numbers=dsl.Collected(doubled.outputs["out"])), "add_round_2")


@dsl.pipeline(name="tiny")
def tiny(fail: bool = False):
    """Double some numbers and add them."""
    with dsl.ExitHandler(tell()):
        with dsl.ParallelFor([1, 2, 3]) as number:
            doubled = named(double(number=number, fail=False), "double")
        named(add(numbers=dsl.Collected(doubled.outputs["out"])), "add")
        again(fail=fail)


@pytest.fixture
def turn(monkeypatch):
    for name in ("FLOWLOOM_TURN", "FLOWLOOM_TRACKING", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # what the runner sets is undone after the test
    return turns.open_turn(dict.fromkeys(turns.KEY_FIELDS, "x"), lambda: None)


@pytest.mark.parametrize("loaded", [False, True])
def test_steps_run_and_write_their_logs(loaded, turn, capfd, tmp_path):
    pipeline = tiny
    if loaded:
        compiler.Compiler().compile(tiny, str(tmp_path / "tiny.yaml"))
        pipeline = components.load_component_from_file(str(tmp_path / "tiny.yaml"))
        capfd.readouterr()
    console = Console(file=io.StringIO(), width=200)
    steps = local.run(pipeline, {}, turn, console)
    first, second = ["double-0", "double-1", "double-2"], ["double_round_2-0"]
    assert {step.name for step in steps} == {"add", "add_round_2", "tell", *first, *second}
    assert len(steps) == 7
    assert not any(step.failed for step in steps)
    assert "doubling 3 in turn 0001" in turn.log_path("double-2").read_text()
    assert "doubling 7 in turn 0001" in turn.log_path("double_round_2-0").read_text()
    assert "total 12" in turn.log_path("add").read_text()
    assert "total 14" in turn.log_path("add_round_2").read_text()
    shown = console.file.getvalue()
    assert shown.count("done") == 7
    assert "doubling" not in shown
    assert capfd.readouterr() == ("", "")  # kfp's own output went to a file
    assert "finished with status" in turn.log_path("kfp").read_text()
    assert turns.load("0001").record["outcome"] == {"state": "SUCCEEDED", "error": None}


def test_a_failed_step_is_named_with_its_log(turn):
    (turn.dir / "steps" / "double_round_2-0.json").write_text("{}")  # of an earlier attempt
    with pytest.raises(local.StepError) as caught:
        local.run(tiny, {"fail": True}, turn, Console(file=io.StringIO(), width=200))
    message = str(caught.value)
    assert "ValueError: loss: got nan at step 3" in message
    assert "step double_round_2-0 failed" in message.splitlines()[-1]
    assert str(turn.dir / "logs") in message.splitlines()[-1]
    assert subprocess_task_handler.run_local_subprocess.__name__ == "run_local_subprocess"
    turn.mark("failed")  # as the command does
    record = turns.load("0001").record
    assert record["status"] == "failed"
    assert record["outcome"] == {
        "state": "FAILED",
        "step": "double_round_2-0",
        "error": "ValueError: loss: got nan at step 3",
        "log": str(turn.log_path("double_round_2-0")),
    }
    turn.mark("running")  # what is over is over
    assert not (turn.dir / "failure.json").exists()
    assert not (turn.dir / "outcome.json").exists()


def test_of_several_steps_that_fail_the_first_stopped_the_turn(turn):
    runner = local.StepRunner(turn, Console(file=io.StringIO()))
    for name in ("first", "second"):
        given = json.dumps({"outputs": {"outputFile": f"/r/tiny-1/{name}/x.json"}})
        command = ["sh", "-c", f"echo {name} said no; exit 3", "--executor_input", given]
        assert runner(command) == 3
    failure = json.loads((turn.dir / "failure.json").read_text())
    assert (failure["step"], failure["error"]) == ("first", "first said no")


def test_what_the_engine_swaps_is_swapped_back(tmp_path, monkeypatch):
    before = builtins.print
    monkeypatch.setattr(builtins, "print", before)  # undone whatever happens
    with local._quiet(tmp_path / "log"):
        builtins.print = None  # as two threads of kfp's at the same time may leave it
    assert builtins.print is before


def test_an_error_that_is_no_steps_passes(turn, monkeypatch):
    def refuses(*arguments):
        raise RuntimeError("no such input")

    monkeypatch.setattr(pipeline_orchestrator, "run_local_pipeline", refuses)
    with pytest.raises(RuntimeError, match="no such input"):
        local.run(tiny, {}, turn, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("path", "named", "name"),
    [
        ("/r/tiny-1/add/executor_output.json", None, "add"),
        ("/r/tiny-1/train-sft/executor_output.json", None, "train_sft"),
        ("/r/tiny-1/for-loop-2-iteration-1/train-reward/x.json", "train_reward", "train_reward-1"),
        ("/r/tiny-1/train-grpo-2/x.json", "train_grpo_round_2", "train_grpo_round_2"),
    ],
)
def test_a_step_is_named_by_the_pipeline_and_its_loop(path, named, name):
    given = json.dumps({"outputs": {"outputFile": path}})
    assert local.step_name(["sh", "-c", "x", "--executor_input", given], named) == name


def test_start_up_is_what_the_stages_did_not_use():
    steps = [local.Step("a", 5.0, False), local.Step("b", 3.0, False)]
    records = {"a": {"stage_s": 4.0}, "b": {"stage_s": 2.5}}
    # (1 before + 8 in steps - 6.5 in stages) of 10 seconds
    assert summary.start_up_share(steps, records, 10.0, 1.0) == pytest.approx(0.25, abs=1e-12)
    # Steps that start at the same time may add up to more than there was.
    assert summary.start_up_share([*steps, local.Step("c", 9.0, False)], records, 9.0, 1.0) == 1.0


def test_the_picture_pair_is_the_one_that_shows_most(tmp_path):
    def example(prompt, ours, theirs):
        designs = {
            name: {"renders": [{"score": score, "picture": f"pictures/{prompt}-{name}.png"}]}
            for name, score in (("grpo", ours), ("best_fixed", theirs))
        }
        return {"prompt": prompt, "designs": designs}

    assert summary.picture_pair(tmp_path) is None
    examples = [example("a", 0.5, 0.4), example("b", 0.9, 0.1), example("c", 0.2, 0.3)]
    examples.append({"prompt": "d", "designs": {"grpo": examples[0]["designs"]["grpo"]}})
    (tmp_path / "examples.json").write_text(json.dumps({"examples": examples}))
    prompt, ours, theirs = summary.picture_pair(tmp_path)
    assert (prompt, ours.name, theirs.name) == ("b", "b-grpo.png", "b-best_fixed.png")


def test_the_summary_says_who_won_and_what_to_do_next(turn, tmp_path):
    policies = {name: {"mean": mean} for name, mean in (("grpo", 0.5), ("best_fixed", 0.4))}
    lead = {"mean": 0.1, "low": 0.06, "high": 0.14, "n": 160}
    evaluation = {
        "opponent": "best_fixed",
        "policies": policies,
        "paired": {"vs_best_fixed": lead},
    }
    check = {"name": "valid designs", "value": 4999, "bound": 5000, "rule": "=", "holds": False}
    for step in ("evaluate", "promote", "report"):
        record = {"step": step, "out": str(tmp_path), "digest": "d" * 32 + ".dir"}
        record |= {"cached": False, "stage_s": 1.0}
        (turn.dir / "steps" / f"{step}.json").write_text(json.dumps(record))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))

    def shown(checks):
        (tmp_path / "decision.json").write_text(
            json.dumps({"checks": checks, "promoted": not checks})
        )
        console = Console(file=io.StringIO(), width=200)
        steps = [local.Step(name, 1.5, False) for name in ("evaluate", "promote", "report")]
        summary.show(console, turn, steps, total=6.0, before=0.5)
        return console.file.getvalue()

    text = shown([])
    assert "+0.060 to +0.140" in text
    assert "160 held-out prompts" in text
    assert "The candidate is the new champion." in text
    assert "mlflow ui --backend-store-uri sqlite:///" in text
    assert "flowloom design" in text
    assert "report.html" in text
    assert "33 %" in text  # (0.5 + 4.5 - 3) / 6
    assert re.search(r"^evaluate +1\.5 +0\.5 +d{12}$", text, re.M)  # 1 of 1.5 s in the stage
    assert text.index("candidate (GRPO") < text.index("best fixed")  # the better one first
    assert f"python -m pipelines run {turn.record['pipeline']} --new-turn\n" in text
    assert "--model" not in text
    held = shown([check])
    assert "valid designs: 4999 = 5000: FAILS" in held
    assert "--model models:/flow-designer@candidate" in held
    turn.record["champion"] = "1"  # what is tried then is the champion
    assert "--model" not in shown([check])


def test_the_summary_says_what_was_gone_on_from_and_what_tuning_gave(turn, tmp_path, monkeypatch):
    monkeypatch.setattr(summary.recall, "bring", lambda digest: {"t": tmp_path}[digest])
    card = {"counts": {"split": {"train": 30, "test": 10}}}
    monkeypatch.setattr(summary, "read_card", lambda folder: card)
    turn.record["recalled"] = {"version": "7", "triplets": "t"}
    curve = {"before": {"serve/score": 0.25}, "after": {"serve/score": 0.5}}
    (tmp_path / "curve.json").write_text(json.dumps(curve))
    for step in ("tune_generator", "build_triplets_round_2", "report"):
        record = {"step": step, "out": str(tmp_path), "metrics": {"triplets/renders": 52.0}}
        (turn.dir / "steps" / f"{step}.json").write_text(json.dumps(record))
    console = Console(file=io.StringIO(), width=200)
    summary.show(console, turn, [], total=6.0, before=0.5)
    text = console.file.getvalue()
    assert "Went on from version 7: 40 renders, 12 added\n" in text
    assert "pictures: 0.250 before, 0.500 after tuning" in text
    assert "flowloom design" not in text  # there is no new model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "continuous_training"], "server: got none, expected --host URL or KFP_HOST"),
        (["schedule", "continuous_training"], "server: got none, expected --host URL or KFP_HOST"),
        (["run", "continuous_training", "--recipe", "huge"], "recipe: got 'huge', expected one of"),
        (
            ["run", "continuous_training", "--set", "promote.margins=1"],
            "promote.margins: unknown field, expected one of",
        ),
    ],
)
def test_usage_errors_are_one_line(arguments, message, capsys, monkeypatch):
    for name in ("KFP_HOST", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

"""Run a pipeline on this machine with kfp's local runner: a process per step, a log file each.

kfp streams every step's output to the console and keeps none of it. Here each step writes to a file
of its own in the turn's folder, and the console gets two lines per step.
"""

import builtins
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from rich.console import Console

from flowloom.lifecycle.turns import Turn
from flowloom.runs import write_json

TAIL_LINES = 25


class StepError(RuntimeError):
    """A step ended with an error; the message names the step and its log."""


@dataclass
class Step:
    """A step as the runner saw it."""

    name: str
    """What the pipeline calls it, and the iteration where it is in a loop: `train_reward-0`."""
    wall_s: float
    """From starting its process to the end of it."""
    failed: bool
    """Whether it ended with an error."""


class StepRunner:
    """Runs a step's command, in place of `kfp.local.subprocess_task_handler.run_local_subprocess`.

    kfp calls it from two threads where a loop's iterations run at the same time.
    """

    def __init__(self, turn: Turn, console: Console):
        """Write logs to the folder of `turn` and progress to `console`."""
        self.turn = turn
        self.console = console
        self.steps: list[Step] = []
        self._lock = threading.Lock()

    def __call__(
        self, full_command: Sequence[str], env_vars: Optional[Mapping[str, str]] = None
    ) -> int:
        """Run the command; returns its exit status."""
        given = dict(env_vars or {})
        name = step_name(full_command, given.get("FLOWLOOM_STEP"))
        log_path = self.turn.log_path(name)
        record = self.turn.dir / "steps" / f"{name}.json"
        record.unlink(missing_ok=True)
        started_s = time.perf_counter()
        self._say(f"  ...  {name}")
        own = {"FLOWLOOM_STEP": name, "FLOWLOOM_TURN": self.turn.name}
        # The log in the order in which things were said: its last line is what went wrong.
        env = {**os.environ, **given, **own, "PYTHONUNBUFFERED": "1"}
        # A file and no pipe: a step outlives a killed runner, and the next run finds its work.
        with log_path.open("w") as log:
            status = subprocess.run(
                full_command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, check=False
            ).returncode
        wall_s = time.perf_counter() - started_s
        with self._lock:
            self.steps.append(Step(name, wall_s, status != 0))
        if status:
            self._leave_failure(name, log_path)
            self._say(f"[red] FAIL[/red]  {name:<24} {wall_s:7.1f} s  {log_path}")
        else:
            cached = record.is_file() and json.loads(record.read_text())["cached"]
            note = "  (as before)" if cached else ""
            self._say(f"[green] done[/green]  {name:<24} {wall_s:7.1f} s{note}")
        return status

    def _leave_failure(self, name: str, log_path: Path) -> None:
        """Tell the turn which step stopped it: the first one, if several do."""
        lines = log_path.read_text().splitlines()
        failure = {"step": name, "error": lines[-1] if lines else "", "log": str(log_path)}
        with self._lock:
            path = self.turn.dir / "failure.json"
            if not path.is_file():
                write_json(path, failure)

    def _say(self, text: str) -> None:
        with self._lock:
            self.console.print(text, highlight=False, soft_wrap=True)


def step_name(full_command: Sequence[str], named: Optional[str] = None) -> str:
    """The step's name, and its number if it is in a loop.

    Args:
        full_command: Its command, which says where the engine expects its outputs.
        named: What the pipeline calls it; else what the engine does.
    """
    given = json.loads(full_command[list(full_command).index("--executor_input") + 1])
    path = Path(given["outputs"]["outputFile"])
    task = named or path.parent.name.replace("-", "_")
    loop = re.fullmatch(r"for-loop-\d+-iteration-(\d+)", path.parent.parent.name)
    return f"{task}-{loop[1]}" if loop else task


def local_spec(pipeline: Any) -> Any:
    """What a pipeline is compiled to, without retries: here the same command goes on instead."""
    from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

    spec = PipelineSpec()
    spec.CopyFrom(pipeline.pipeline_spec)
    for dag in (spec.root.dag, *(component.dag for component in spec.components.values())):
        for task in dag.tasks.values():
            task.ClearField("retry_policy")
    return spec


def run(
    pipeline: Any,
    arguments: Mapping[str, Any],
    turn: Turn,
    console: Console,
) -> list[Step]:
    """Run every step of `pipeline`, a pipeline or one loaded from its YAML.

    Raises:
        StepError: If one ended with an error.
    """
    from kfp import local
    from kfp.local import pipeline_orchestrator, subprocess_task_handler

    runner = StepRunner(turn, console)
    os.environ["FLOWLOOM_TURN"] = turn.name
    os.environ["FLOWLOOM_TRACKING"] = "spool"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    original = subprocess_task_handler.run_local_subprocess
    subprocess_task_handler.run_local_subprocess = runner
    try:
        with _quiet(turn.log_path("kfp")):
            local.init(
                runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(turn.dir / "kfp")
            )
            pipeline_orchestrator.run_local_pipeline(local_spec(pipeline), dict(arguments))
    except Exception as error:
        failed = [step.name for step in runner.steps if step.failed]
        if not failed:
            raise
        log_path = turn.log_path(failed[0])
        tail = "\n".join(log_path.read_text().splitlines()[-TAIL_LINES:])
        raise StepError(f"{tail}\n\nstep {failed[0]} failed: see {log_path}") from error
    finally:
        subprocess_task_handler.run_local_subprocess = original
    return runner.steps


@contextlib.contextmanager
def follower(turn: Turn) -> Iterator[Callable[[], None]]:
    """Have a process record runs in MLflow meanwhile, and wait for it at the end.

    Yields:
        A function that tells it to record what is left and end; it does so in the background.
    """
    with turn.log_path("tracking").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flowloom.lifecycle.tracking", "--follow"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # an interrupt at the keyboard is not for it
        )
        assert process.stdin is not None
        # It ends when its standard input closes, which happens too if this process is killed.
        try:
            yield process.stdin.close
        finally:
            process.stdin.close()
            process.wait()


@contextlib.contextmanager
def _quiet(log_path: Path) -> Iterator[None]:
    """Send what kfp itself prints and logs to a file."""
    root = logging.getLogger()
    level, handlers, original_print = root.level, root.handlers[:], builtins.print
    with log_path.open("w") as log, contextlib.redirect_stdout(log), warnings.catch_warnings():
        # kfp warns of images whose name has no "python" in it, and of resources of a cluster.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"kfp\.local")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"kfp\.local")
        try:
            yield
        finally:
            # kfp swaps these and swaps them back, but two threads at a time leave its own there.
            root.setLevel(level)
            root.handlers[:] = handlers
            builtins.print = original_print

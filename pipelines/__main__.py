"""Run, compile, submit or schedule a pipeline: `python -m pipelines --help`."""

import time

_STARTED_S = time.perf_counter()

import argparse  # noqa: E402
import importlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Optional  # noqa: E402

from flowloom.cli import INTERRUPTED, UNREAD, USAGE, one_line  # noqa: E402
from pipelines import clusters  # noqa: E402
from pipelines.parser import build_parser  # noqa: E402

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The pipelines: folders with a `pipeline.py`."""
    return sorted(path.parent.name for path in FOLDER.glob("*/pipeline.py"))


def load(name: str) -> Any:
    """The pipeline of that name."""
    return getattr(importlib.import_module(f"pipelines.{name}"), name)


def compile_to(name: str, out: Path) -> None:
    """Write the pipeline's YAML; the same sources give the same bytes."""
    from kfp import compiler

    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(load(name), str(out))


def run(options: argparse.Namespace) -> int:
    """One turn on this machine: resumed if the latest has the same key, else a new one."""
    from rich.console import Console

    from flowloom.lifecycle import turns
    from pipelines import local, summary

    console = Console(file=sys.stdout)  # kfp's output goes elsewhere meanwhile
    fields = turns.key(options.name, options.recipe, _overrides(options))
    turn = turns.open_turn(
        fields,
        _champion,
        new=options.new_turn,
        number=options.turn,
        recalled=lambda: _recalled(options, fields["overrides"]),
    )
    arguments = _arguments(options, fields["overrides"], turn.champion or "")
    with turns.held(turn), local.follower(turn) as record_the_rest:
        turn.mark("running")
        opponent = f"champion {turn.champion}" if turn.champion else "no champion yet"
        if turn.record.get("recalled"):
            opponent += f", goes on from version {turn.record['recalled']['version']}"
        console.print(
            f"turn {turn.name} of {options.name}, recipe {options.recipe}, {opponent}; "
            f"logs in {turn.dir / 'logs'}",
            highlight=False,
            soft_wrap=True,
        )
        pipeline = load(options.name)
        begun_s = time.perf_counter()
        try:
            steps = local.run(pipeline, arguments, turn, console)
        except local.StepError as error:
            turn.mark("failed")
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            console.print("the same command goes on from here", highlight=False)
            return 1
        except BaseException:
            turn.mark("failed")
            raise
        now_s = time.perf_counter()
        seconds = {"total": now_s - _STARTED_S, "before": begun_s - _STARTED_S}
        if turn.record["status"] != "finished":
            turn.mark("finished", seconds={step.name: step.wall_s for step in steps} | seconds)
        record_the_rest()
        summary.show(console, turn, steps, **seconds)
    return 0


def compile_(options: argparse.Namespace) -> int:
    """Compile to YAML."""
    out = options.out or Path("build") / f"{options.name}.yaml"
    compile_to(options.name, out)
    print(out)
    return 0


def submit(options: argparse.Namespace) -> int:
    """Start one run on a Kubeflow Pipelines server, or find it there."""
    from pipelines import changes, cluster
    from pipelines.server import Server

    overrides = _overrides(options)
    compared = changes.names_in(options.if_changed) if options.if_changed else []
    server = Server(options.host, options.namespace, clusters.current().namespace)
    job = _job(options, overrides)
    if compared:
        found = changes.changed(server, job, compared)
        for name, before in found.items():
            _say(f"{name}: the newest run had {before}")
        if not found:
            _say(f"{job.label}: the newest run had the same {options.if_changed}; none is started")
            return 0
    run = cluster.submit(
        server,
        job,
        lambda: _arguments(options, overrides, _champion() or ""),
        _say,
        name=options.run_name,
        new=options.new_turn or bool(compared),  # that data may have been there before the newest
    )
    _say(server.link("runs", run.run_id))
    if not options.wait:
        return 0
    with cluster.interruptible(run, _say):
        run = cluster.wait(server, run, _say, options.timeout_s)
    if run.state not in cluster.FAILED:
        return 0
    for line in cluster.failures(run) or [_error_of(run)]:
        print(f"pipelines: run {run.display_name} {run.state}: {line}", file=sys.stderr)
    return 1


def schedule(options: argparse.Namespace) -> int:
    """Have a Kubeflow Pipelines server start runs on a schedule."""
    from pipelines import cron as crons
    from pipelines import schedule as schedules
    from pipelines.server import Server

    if not options.name and not options.list:
        raise ValueError(f"NAME: got none, expected one of {', '.join(names())}")
    label = f"{options.name}-{options.recipe}"
    switched = options.enable or options.disable
    declared = not (options.list or options.delete or (switched and not options.cron))
    if not declared and (options.assignments or (options.cron and not switched)):
        raise ValueError(
            "schedule: got --cron or --set beside what only lists, switches or deletes"
        )
    overrides = _overrides(options) if declared else {}
    cron = crons.six_fields(options.cron or clusters.current().cron)
    server = Server(options.host, options.namespace, clusters.current().namespace)
    if options.list:
        for line in schedules.lines(server, options.experiment, label if options.name else ""):
            _say(line)
    elif options.delete:
        schedules.delete(server, options.experiment, label, _say)
    elif not declared:
        schedules.switch(server, options.experiment, label, options.enable, _say)
    else:
        # Each run compares with the champion of its own day.
        arguments = _arguments(options, overrides, "auto")
        job = _job(options, overrides)
        made = schedules.declare(server, job, arguments, cron, _say, enabled=not options.disable)
        _say(server.link("recurringrun", made.recurring_run_id))
    return 0


def _job(options: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    """What is to run on a server."""
    from flowloom.lifecycle import turns
    from pipelines.cluster import Job

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{options.name}.yaml"
        compile_to(options.name, path)
        package = path.read_bytes()
    cluster = clusters.current()
    clusters.check_images(cluster, package.decode())
    return Job(
        pipeline=load(options.name).name,
        package=package,
        label=f"{options.name}-{options.recipe}",
        key=turns.key(options.name, options.recipe, overrides),
        experiment=options.experiment,
        service_account=cluster.service_account,
        time_zone=cluster.time_zone,
    )


def _arguments(
    options: argparse.Namespace, overrides: dict[str, Any], champion: str
) -> dict[str, Any]:
    """Arguments for those of the usual parameters that the pipeline has."""
    offered = {"recipe": options.recipe, "overrides": overrides, "champion": champion}
    taken = load(options.name).pipeline_spec.root.input_definitions.parameters
    return {name: value for name, value in offered.items() if name in taken}


def _error_of(run: Any) -> str:
    message = run.error and run.error.message
    return " ".join(message.split()) if message else "no task of it says why"


def _say(line: str) -> None:
    print(line, flush=True)


def _champion() -> Optional[str]:
    """Version of the champion now."""
    from flowloom.lifecycle import registry

    champion = registry.champion()
    return champion.version if champion else None


def _recalled(options: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, str]:
    """What a new turn goes on from, if the pipeline can."""
    from flowloom import recipes
    from flowloom.lifecycle import recall

    if "previous" not in load(options.name).pipeline_spec.root.input_definitions.parameters:
        return {}
    return recall.find(recipes.resolve(options.recipe, overrides).build_triplets)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The overrides, after checking that the recipe takes them."""
    from flowloom import recipes
    from flowloom.config import parse_assignments

    overrides = parse_assignments(options.assignments)
    recipes.resolve(options.recipe, overrides)
    return overrides


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status."""
    handlers = {"run": run, "compile": compile_, "submit": submit, "schedule": schedule}
    options = build_parser(names()).parse_args(arguments)
    try:
        if options.command == "run":
            clusters.choose_none()
        else:
            clusters.choose(options.cluster, options.launch)
        try:
            return handlers[options.command](options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end; there must be something to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (ValueError, OSError) as error:
        print(f"pipelines: {one_line(error)}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("pipelines: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

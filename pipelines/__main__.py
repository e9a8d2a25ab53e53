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
    turn = turns.open_turn(fields, _champion, new=options.new_turn)
    arguments = {
        "recipe": options.recipe,
        "overrides": fields["overrides"],
        "champion": turn.champion or "",
    }
    with turns.held(turn), local.follower(turn) as record_the_rest:
        turn.mark("running")
        opponent = f"champion {turn.champion}" if turn.champion else "no champion yet"
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
    """Start one run on a Kubeflow Pipelines server."""
    client = _client(options.host)
    arguments = {
        "recipe": options.recipe,
        "overrides": _overrides(options),
        "champion": _champion() or "",
    }
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{options.name}.yaml"
        compile_to(options.name, package)
        started = client.create_run_from_pipeline_package(
            str(package), arguments, experiment_name="flowloom", enable_caching=False
        )
    print(started.run_id)
    return 0


def schedule(options: argparse.Namespace) -> int:
    """Have a Kubeflow Pipelines server start a run on a schedule."""
    client = _client(options.host)
    # Each run compares with the champion of its own day.
    arguments = {"recipe": options.recipe, "overrides": _overrides(options), "champion": "auto"}
    experiment = client.create_experiment("flowloom")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{options.name}.yaml"
        compile_to(options.name, package)
        made = client.create_recurring_run(
            experiment.experiment_id,
            f"{options.name}-{options.recipe}",
            cron_expression=options.cron,
            max_concurrency=1,
            no_catchup=True,
            params=arguments,
            pipeline_package_path=str(package),
            enable_caching=False,
        )
    print(made.recurring_run_id)
    return 0


def _champion() -> Optional[str]:
    """Version of the champion now."""
    from flowloom.lifecycle import registry

    champion = registry.champion()
    return champion.version if champion else None


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The overrides, after checking that the recipe takes them."""
    from flowloom import recipes
    from flowloom.config import parse_assignments

    overrides = parse_assignments(options.assignments)
    recipes.resolve(options.recipe, overrides)
    return overrides


def _client(host: Optional[str]) -> Any:
    host = host or os.environ.get("KFP_HOST") or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host:
        raise ValueError("server: got none, expected --host URL or KFP_HOST; `run` needs no server")
    import logging
    import warnings

    import kfp

    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return kfp.Client(host=host)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"server {host}: {first}") from error


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summaries = {
        "run": (run, "run one turn on this machine; the same command resumes it"),
        "compile": (compile_, "write the pipeline as YAML"),
        "submit": (submit, "start a run on a Kubeflow Pipelines server"),
        "schedule": (schedule, "have a server start runs on a schedule"),
    }
    for command, (handler, text) in summaries.items():
        sub = commands.add_parser(command, help=text, description=text)
        sub.set_defaults(handler=handler)
        sub.add_argument("name", metavar="NAME", choices=names(), help=", ".join(names()))
        if command == "compile":
            sub.add_argument("--out", type=Path, metavar="FILE", help="default: build/NAME.yaml")
            continue
        sub.add_argument("--recipe", default="demo", help="default: %(default)s")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            dest="assignments",
            metavar="STAGE.FIELD=VALUE",
            help="replace a field of the recipe; repeatable",
        )
        if command == "run":
            sub.add_argument(
                "--new-turn", action="store_true", help="start a turn, even with the same key"
            )
        else:
            sub.add_argument("--host", metavar="URL", help="default: KFP_HOST")
        if command == "schedule":
            sub.add_argument(
                "--cron", default="0 0 3 * * *", help="with seconds first; default: %(default)s"
            )
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.handler(options)
    except ValueError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

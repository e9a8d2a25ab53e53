"""The command line of `python -m pipelines`."""

import argparse
from pathlib import Path

from pipelines import clusters

DESCRIPTION = "Run, compile, submit or schedule a pipeline."


def build_parser(names: list[str]) -> argparse.ArgumentParser:
    """The parser of every command, for the pipelines of these names."""
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summaries = {
        "run": "run one turn on this machine; the same command resumes it",
        "compile": "write the pipeline as YAML",
        "submit": "start a run on a Kubeflow Pipelines server",
        "schedule": "have a server start runs on a schedule",
    }
    for command, text in summaries.items():
        sub = commands.add_parser(command, help=text, description=text)
        sub.add_argument(
            "name",
            metavar="NAME",
            choices=names,
            nargs="?" if command == "schedule" else None,  # none needed to list
            help=", ".join(names),
        )
        if command != "run":
            _add_cluster(sub)
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
        {"run": _add_run, "submit": _add_submit, "schedule": _add_schedule}[command](sub)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--new-turn", action="store_true", help="start a turn, even with the same key"
    )
    which.add_argument(
        "--turn",
        type=int,
        metavar="N",
        help="run until there is turn N: resume it if it is the latest, start it if it is the next",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        choices=clusters.CLUSTERS,
        help=f"whose pools, limits and images; default: {clusters.CLUSTER} or {clusters.DEFAULT}",
    )
    parser.add_argument(
        "--launch",
        metavar="HOW",
        help="how training steps run their stage: process, torchrun:N or "
        "trainjob:NODESxPROCESSES[/cpu]; default: the cluster's",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", metavar="URL", help="default: KFP_HOST; a token is read from KFP_TOKEN"
    )
    parser.add_argument(
        "--namespace", help="of a server with several users; default: KFP_NAMESPACE"
    )
    parser.add_argument("--experiment", default="flowloom", help="default: %(default)s")


def _add_submit(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    parser.add_argument(
        "--run-name",
        metavar="TEXT",
        help="default: pipeline, recipe and a digest of arguments, data and code",
    )
    parser.add_argument(
        "--new-turn", action="store_true", help="start a run, even if the same is there"
    )
    parser.add_argument(
        "--if-changed",
        metavar="NAMES",
        help="start a run only if the newest one of the same pipeline, recipe and overrides had "
        "another of these: data,catalogue",
    )
    parser.add_argument(
        "--wait", action="store_true", help="until the run ends; status 1 if it failed"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=86400.0,
        metavar="SECONDS",
        help="of --wait; default: %(default)g",
    )


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    parser.add_argument(
        "--cron",
        metavar="FIELDS",
        help="five fields, or six with seconds first, in the time zone of the server's controller "
        "(see infra/prerequisites.yaml); default: the cluster's",
    )
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--enable", action="store_true", help="have it start runs (again)")
    act.add_argument("--disable", action="store_true", help="keep it, but have it start none")
    act.add_argument("--list", action="store_true", help="show schedules; NAME may be left out")
    act.add_argument("--delete", action="store_true", help="remove it")

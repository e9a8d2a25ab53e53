"""Options of what runs stages and of what becomes of their results. Standard library only."""

from __future__ import annotations

import argparse

from flowloom.cli.options import add_command, add_json, positive

RUN_HELP = (
    "an MLflow run id, a run folder, or a model version: models:/flow-designer@ALIAS or /VERSION"
)


def add_lifecycle(commands) -> None:
    """Add the commands `run`, `promote`, `rollback`, `artifact`, `lineage` and so on."""
    _add_run(commands)
    _add_registry(commands)
    _add_artifact(commands)
    _add_lineage(commands)
    _add_reproduce(commands)
    _add_compare(commands)
    _add_gc(commands)


def _add_run(commands) -> None:
    run = add_command(
        commands,
        "run",
        "stages:run",
        "Run one stage of a recipe",
        "\nInputs that are not given come from the stages before it, which are run first unless "
        "the same\nrun was finished already: one round of policy optimisation, where the pipeline "
        "has two.\n`flowloom run STAGE --recipe NAME --dry-run` shows every field.",
    )
    run.add_argument("stage", metavar="STAGE", help="its name, or 'list'")
    run.add_argument("--recipe", metavar="NAME", default="demo", help="(%(default)s)")
    run.add_argument(
        "--config",
        metavar="FILE",
        help="the stage's configuration as another run had it: the config.json of a run folder or "
        "of an MLflow run",
    )
    run.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="replace a field of the stage's configuration, such as lr=1e-3; repeatable",
    )
    run.add_argument(
        "--input",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="folder for an input; repeat an input that takes several",
    )
    run.add_argument(
        "--launch",
        metavar="HOW",
        default="process",
        help="process, torchrun:N or trainjob:NODESxPROCESSES[/cpu]; the stages before it run here "
        "(%(default)s)",
    )
    run.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
    add_json(run)


def _add_registry(commands) -> None:
    promote = add_command(
        commands,
        "promote",
        "registry:promote",
        "Make the candidate the champion if the gate lets it pass",
        " Exit status: 0 promoted, 1 held.",
    )
    promote.add_argument(
        "--version",
        type=positive,
        metavar="N",
        help="a registered version instead of the candidate",
    )
    promote.add_argument("--recipe", metavar="NAME", default="demo", help="its gate (%(default)s)")
    promote.add_argument(
        "--history",
        action="store_true",
        help="only show every decision so far, on every machine, with its numbers",
    )
    add_json(promote)
    rollback = add_command(
        commands, "rollback", "registry:rollback", "Give the alias champion to an earlier version"
    )
    rollback.add_argument(
        "--to", type=positive, metavar="N", help="version; default: the champion before this one"
    )
    add_json(rollback)


def _add_artifact(commands) -> None:
    parser = commands.add_parser(
        "artifact", help="Publish, fetch and verify artifacts", description="Published folders."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    publish = actions.add_parser(
        "publish", help="copy a folder to a remote", description="Print the pointer to its copy."
    )
    publish.add_argument("folder", metavar="DIR", help="what to publish")
    publish.add_argument("--remote", metavar="NAME", default="store", help="(%(default)s)")
    publish.add_argument("--out", metavar="FILE", help="write the pointer as .dvc or .json, too")
    fetch = actions.add_parser(
        "fetch", help="bring one back", description="Every file's digest is checked."
    )
    verify = actions.add_parser(
        "verify",
        help="compare a folder, or the remote, with a pointer",
        description="Name each file that differs. Exit status: 0 none, 1 some, 2 it cannot be told",
    )
    for command in (fetch, verify):
        command.add_argument(
            "pointer", metavar="POINTER", help="a .dvc file, a .json file, or JSON as MLflow has it"
        )
        command.add_argument("--remote", metavar="NAME", help="instead of the pointer's own")
    fetch.add_argument("--into", metavar="DIR", required=True, help="where nothing is yet")
    verify.add_argument("folder", nargs="?", metavar="DIR", help="the remote's objects if left out")
    for name, command in actions.choices.items():
        command.set_defaults(handler=f"artifact:{name}")
        add_json(command)


def _add_lineage(commands) -> None:
    lineage = add_command(
        commands,
        "lineage",
        "lifecycle:lineage",
        "Show what a model or an artifact was made from, down to data, code and commit",
        "\nExit status: 0 every artifact was made by one recorded run, 1 one was not.",
    )
    lineage.add_argument(
        "subject", nargs="?", metavar="MODEL@ALIAS|RUN", help=f"{RUN_HELP}; default: the champion"
    )
    add_json(lineage)


def _add_reproduce(commands) -> None:
    reproduce = add_command(
        commands,
        "reproduce",
        "lifecycle:reproduce",
        "Make an artifact again from what its run recorded, and compare the bytes",
        "\nA run is repeated from its inputs, a model version from data on, in this checkout's "
        "code and\na home of its own; inputs come from the remote. Exit status: 0 equal, 1 not.",
    )
    reproduce.add_argument("subject", metavar="RUN", help=RUN_HELP)
    part = reproduce.add_mutually_exclusive_group()
    part.add_argument(
        "--only", metavar="STAGE", help="of what it was made from, only the runs of this stage"
    )
    part.add_argument(
        "--from-inputs", action="store_true", help="only the last run, of its inputs as published"
    )
    reproduce.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="replace a field of the last run's configuration, to see what it changes; repeatable",
    )
    reproduce.add_argument(
        "--keep", action="store_true", help="leave what was made in the home's reproduce/ folder"
    )
    add_json(reproduce)


def _add_compare(commands) -> None:
    compare = add_command(
        commands,
        "compare",
        "lifecycle:compare",
        "Show how two runs differ: configuration, data, metrics, pictures",
    )
    compare.add_argument("subjects", nargs=2, metavar="RUN", help=RUN_HELP)
    compare.add_argument(
        "--out", metavar="FILE.html", help="write one self-contained page, with the pictures"
    )
    add_json(compare)


def _add_gc(commands) -> None:
    gc = add_command(
        commands,
        "gc",
        "lifecycle:gc",
        "Show, or delete, what no model, pinned run or latest turn needs",
        "\nKept are: all that versions with an alias, earlier champions and pinned runs were made "
        "from;\nthe latest turn; what is unfinished, running, or waits to be recorded; what is "
        "young. The\nremote `seed` is never touched.",
    )
    gc.add_argument("--delete", action="store_true", help="delete it; default: show it")
    gc.add_argument(
        "--min-age-hours",
        metavar="H",
        type=_hours,
        default=24.0,
        help="what is younger is kept: its publisher may still be at work (%(default)s)",
    )
    gc.add_argument("--remote", metavar="NAME", default="store", help="whose objects (%(default)s)")
    pins = gc.add_mutually_exclusive_group()
    pins.add_argument(
        "--pin", metavar="RUN", help="keep an MLflow run (of a stage or a turn); stop"
    )
    pins.add_argument("--unpin", metavar="RUN", help="take that back, and stop")
    add_json(gc)


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected hours >= 0")
    return value

"""All commands and their options. Standard library only: `flowloom --help` answers at once."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from flowloom import __version__

CATALOGUE_HELP = (
    "catalogue: a ComfyUI server (http://HOST:PORT), a .json or .json.gz file (saved, or an "
    "object_info answer), or the name of a shipped one: embedded, or in data/catalogues"
)
PATH_HELP = (
    "a workflow (.json, in API format or the editor's), a ComfyUI PNG, a .jsonl of workflows, or a "
    "folder of these"
)
GUIDANCE = 1.5
"""Of designs by a model that does not say what it was evaluated with."""
POLICIES = ("grpo", "sft", "best_fixed", "retrieval", "random")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit status 2."""

    def __init__(self, *arguments, **options):
        """As `argparse.ArgumentParser`, without abbreviations: new options would break them."""
        options.setdefault("formatter_class", Formatter)
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with room for option names."""

    def __init__(self, prog: str):
        """As its parent, with wider columns."""
        super().__init__(prog, max_help_position=32, width=100)


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(
        prog="flowloom",
        description="Turn a prompt into the text-to-image workflow that draws it best.",
        epilog="flowloom COMMAND --help explains a command. Results go to standard output,\n"
        "progress and errors to standard error. Exit status: 0 yes, 1 no (invalid, failed),\n"
        "2 wrong usage or unreadable input.",
    )
    parser.add_argument("--version", action="version", version=f"flowloom {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_design(commands)
    _add_graphs(commands)
    _add_pictures(commands)
    _add_catalogue(commands)
    _add_run(commands)
    _add_registry(commands)
    _add_artifact(commands)
    doctor = _command(commands, "doctor", "doctor:doctor", "What is installed, reachable, missing")
    _catalogue(doctor, required=False)
    _json(doctor)
    return parser


def _command(commands, name: str, handler: str, summary: str, more: str = "") -> Parser:
    parser = commands.add_parser(name, help=summary, description=f"{summary}.{more}")
    parser.set_defaults(handler=handler)
    return parser


def _json(parser: Parser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, nothing else"
    )


def _catalogue(parser: Parser, required: bool = True) -> None:
    parser.add_argument("--catalogue", metavar="FILE|URL", required=required, help=CATALOGUE_HELP)
    _header(parser)


def _header(parser: Parser) -> None:
    parser.add_argument(
        "--header",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="header sent to a server, such as a proxy's Authorization; repeatable",
    )


def _constraints(parser: Parser) -> None:
    parser.add_argument(
        "--require",
        metavar="K=V",
        action="append",
        default=[],
        help="an input every workflow must have, such as steps=8 or ckpt_name=NAME; repeatable",
    )
    parser.add_argument(
        "--forbid",
        metavar="NAME",
        action="append",
        default=[],
        help="a node class or model file no workflow may use; repeatable",
    )


def _paths(parser: Parser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATH_HELP)


def _add_design(commands) -> None:
    parser = _command(
        commands,
        "design",
        "design:design",
        "Design workflows for prompts",
        " Without --model the champion of the registry is used.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what the picture shows")
    parser.add_argument(
        "--model",
        metavar="URI",
        help="a registered model: its folder, or models:/NAME/VERSION or models:/NAME@ALIAS; or "
        "the folder of `train_sft` alone (--policy sft, no scores)",
    )
    _catalogue(parser, required=False)
    parser.add_argument(
        "--n",
        metavar="N",
        type=positive,
        default=4,
        help="designs per prompt, best first (%(default)s)",
    )
    parser.add_argument(
        "--candidates",
        metavar="N",
        type=positive,
        help="designs to draw, of which the best --n by predicted score are kept (as many as --n)",
    )
    parser.add_argument(
        "--guidance",
        metavar="W",
        type=float,
        help="extrapolation from SFT (0) through GRPO (1) and beyond (as evaluated, else "
        f"{GUIDANCE})",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="below 1 designs are likelier and more alike (%(default)s)",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="draw from the likeliest tokens that hold this share of probability (all)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the designs (%(default)s)")
    _constraints(parser)
    parser.add_argument(
        "--budget-seconds",
        metavar="S",
        type=float,
        help="keep designs that this machine's embedded renderer draws in at most S seconds each, "
        "predicted from a few timed renders",
    )
    parser.add_argument(
        "--policy", choices=POLICIES, default="grpo", help="who designs (%(default)s)"
    )
    parser.add_argument("--render", action="store_true", help="render and score each design")
    parser.add_argument(
        "--out", metavar="DIR", help="write workflows (.json) and pictures (.png) there"
    )
    parser.add_argument(
        "--format",
        choices=("api", "ui"),
        default="api",
        help="of the workflows: for a server, or for the editor (%(default)s)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say how each design differs from the best fixed workflow and from the nearest known "
        "one",
    )
    parser.add_argument(
        "--tokens", action="store_true", help="show the tokens of each design, with their meaning"
    )
    _json(parser)


def _add_graphs(commands) -> None:
    validate = _command(
        commands,
        "validate",
        "validate:validate",
        "Check workflows against a catalogue",
        "\nExit status: 0 all valid, 1 problems, 2 usage or unreadable input.",
    )
    _paths(validate)
    _catalogue(validate)
    _json(validate)

    convert = _command(
        commands,
        "convert",
        "convert:convert",
        "Convert workflows between the API format and the editor's",
        "\nExit status: 0 all converted, 1 one could not be, 2 usage or unreadable input.",
    )
    _paths(convert)
    convert.add_argument(
        "--to", choices=("api", "ui"), required=True, help="for a server, or for the editor"
    )
    _catalogue(convert)
    convert.add_argument(
        "--out", metavar="DIR", required=True, help="folder of the new files; no input is replaced"
    )
    _json(convert)

    encode = _command(
        commands,
        "encode",
        "encode:encode",
        "Write workflows as tokens, and check that decoding gives the same workflow",
        "\nExit status: 0 all exact, 1 one is not, 2 usage or unreadable input.",
    )
    _paths(encode)
    _catalogue(encode)
    _json(encode)
    _add_sample(commands)


def _add_sample(commands) -> None:
    sample = _command(commands, "sample", "sample:sample", "Draw random valid workflows")
    _catalogue(sample)
    sample.add_argument("--n", metavar="N", type=positive, required=True, help="how many")
    sample.add_argument(
        "--seed", metavar="S", type=natural, default=0, help="of the draw (%(default)s)"
    )
    sample.add_argument("--out", metavar="FILE.jsonl", required=True, help="one workflow per line")
    classes = sample.add_mutually_exclusive_group()
    classes.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help="node classes to draw from: t2i (text to image, the default), all, or a file with a "
        "JSON list of names or one name per line",
    )
    classes.add_argument("--classes", metavar="A,B,...", help="these node classes alone")
    _constraints(sample)
    sample.add_argument(
        "--like",
        metavar="PATH",
        nargs="+",
        action="extend",
        default=[],
        help="draw more like these workflows, each as for validate",
    )
    sample.add_argument("--budget", metavar="B", type=positive, help="most tokens of a workflow")


def _add_pictures(commands) -> None:
    render = _command(
        commands, "render", "pictures:render", "Render workflows with the embedded engine"
    )
    _paths(render)
    render.add_argument("--out", metavar="DIR", required=True, help="folder of the pictures")
    render.add_argument(
        "--prompt", metavar="TEXT", help="fills workflows that hold '{prompt}', as `sample` writes"
    )
    render.add_argument("--negative", metavar="TEXT", default="", help="fills '{negative}'")
    render.add_argument(
        "--seed", type=natural, default=0, help="seed of workflows that are filled (%(default)s)"
    )
    render.add_argument(
        "--catalogue-dir",
        metavar="DIR",
        help="folder with catalogue.json.gz and models/, such as a registered model; default: the "
        "shipped models",
    )
    _json(render)

    score = _command(commands, "score", "score:score", "Score pictures against a prompt")
    score.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or a folder of them")
    score.add_argument("--prompt", metavar="TEXT", required=True, help="what was asked for")
    score.add_argument(
        "--rubric", metavar="NAME", default="shapes", help="how to score (%(default)s)"
    )
    _json(score)


def _add_catalogue(commands) -> None:
    parser = commands.add_parser(
        "catalogue", help="Show, save and compare catalogues", description="Catalogues."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show", help="node classes, files and limits", description="Show one."
    )
    show.add_argument(
        "catalogue", nargs="?", default="embedded", metavar="FILE|URL", help=CATALOGUE_HELP
    )
    show.set_defaults(handler="catalogues:show")
    _header(show)
    _json(show)
    snapshot = actions.add_parser(
        "snapshot", help="save one as .json or .json.gz", description="Save one."
    )
    _catalogue(snapshot)
    snapshot.add_argument("--out", metavar="FILE", required=True, help=".json or .json.gz")
    snapshot.add_argument(
        "--files",
        metavar="FILE.json",
        help="facts about model files (family, role, licence, ...) that a server does not tell",
    )
    snapshot.add_argument(
        "--install",
        action="store_true",
        help="add every file of --files, as if it were installed",
    )
    snapshot.add_argument(
        "--profile",
        metavar="t2i|FILE",
        help="only the classes of text-to-image workflows (t2i), or those that a file names, one "
        "per line or as a JSON list: what a designer trained on the catalogue writes",
    )
    snapshot.set_defaults(handler="catalogues:snapshot")
    diff = actions.add_parser(
        "diff",
        help="what changed between two",
        description="What changed between two. Exit status: 0 nothing, 1 something.",
    )
    diff.add_argument("old", metavar="OLD", help=CATALOGUE_HELP)
    diff.add_argument("new", metavar="NEW", help=CATALOGUE_HELP)
    diff.set_defaults(handler="catalogues:diff")
    _header(diff)
    _json(diff)


def _add_run(commands) -> None:
    run = _command(
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
    run.add_argument("--dry-run", action="store_true", help="show what would run, and stop")
    _json(run)


def _add_registry(commands) -> None:
    promote = _command(
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
    _json(promote)
    rollback = _command(
        commands, "rollback", "registry:rollback", "Give the alias champion to an earlier version"
    )
    rollback.add_argument(
        "--to", type=positive, metavar="N", help="version; default: the champion before this one"
    )
    _json(rollback)


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
        _json(command)


def positive(text: str) -> int:
    """An integer >= 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer >= 0."""
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= {low}")
    return value

"""All commands and their options. Standard library only: `flowloom --help` answers at once."""

from __future__ import annotations

from flowloom import __version__
from flowloom.cli.life_parser import add_lifecycle
from flowloom.cli.options import (
    CATALOGUE_HELP,
    Parser,
    add_catalogue,
    add_command,
    add_constraints,
    add_header,
    add_json,
    add_paths,
    natural,
    positive,
)

GUIDANCE = 1.5
"""Of designs by a model that does not say what it was evaluated with."""
POLICIES = ("grpo", "sft", "best_fixed", "retrieval", "random")


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
    add_lifecycle(commands)
    _add_doctor(commands)
    return parser


def _add_doctor(commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        "doctor:doctor",
        "What is installed, reachable, missing",
        "\nWith --cluster a Kubernetes cluster is looked at, and not this machine. Exit status: 0 "
        "all that\nis needed is there, 1 something is missing.",
    )
    add_catalogue(parser, required=False)
    parser.add_argument(
        "--cluster",
        nargs="?",
        const="dev",
        metavar="OVERLAY",
        help="whether a cluster has what this overlay needs: kind, dev or prod (%(const)s)",
    )
    parser.add_argument(
        "--context",
        metavar="NAME",
        help="of the kubeconfig file; default: the one in use, or the cluster of this pod",
    )
    parser.add_argument(
        "--namespace", default="flowloom", metavar="NAME", help="of the overlay (%(default)s)"
    )
    add_json(parser)


def _add_design(commands) -> None:
    parser = add_command(
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
    add_catalogue(parser, required=False)
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
    add_constraints(parser)
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
    add_json(parser)


def _add_graphs(commands) -> None:
    validate = add_command(
        commands,
        "validate",
        "validate:validate",
        "Check workflows against a catalogue",
        "\nExit status: 0 all valid, 1 problems, 2 usage or unreadable input.",
    )
    add_paths(validate)
    add_catalogue(validate)
    add_json(validate)

    convert = add_command(
        commands,
        "convert",
        "convert:convert",
        "Convert workflows between the API format and the editor's",
        "\nExit status: 0 all converted, 1 one could not be, 2 usage or unreadable input.",
    )
    add_paths(convert)
    convert.add_argument(
        "--to", choices=("api", "ui"), required=True, help="for a server, or for the editor"
    )
    add_catalogue(convert)
    convert.add_argument(
        "--out", metavar="DIR", required=True, help="folder of the new files; no input is replaced"
    )
    add_json(convert)

    encode = add_command(
        commands,
        "encode",
        "encode:encode",
        "Write workflows as tokens, and check that decoding gives the same workflow",
        "\nExit status: 0 all exact, 1 one is not, 2 usage or unreadable input.",
    )
    add_paths(encode)
    add_catalogue(encode)
    add_json(encode)
    _add_sample(commands)


def _add_sample(commands) -> None:
    sample = add_command(commands, "sample", "sample:sample", "Draw random valid workflows")
    add_catalogue(sample)
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
    add_constraints(sample)
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
    render = add_command(
        commands, "render", "pictures:render", "Render workflows with the embedded engine"
    )
    add_paths(render)
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
    add_json(render)

    score = add_command(commands, "score", "score:score", "Score pictures against a prompt")
    score.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or a folder of them")
    score.add_argument("--prompt", metavar="TEXT", required=True, help="what was asked for")
    score.add_argument(
        "--rubric", metavar="NAME", default="shapes", help="how to score (%(default)s)"
    )
    add_json(score)


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
    add_header(show)
    add_json(show)
    snapshot = actions.add_parser(
        "snapshot", help="save one as .json or .json.gz", description="Save one."
    )
    add_catalogue(snapshot)
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
    add_header(diff)
    add_json(diff)

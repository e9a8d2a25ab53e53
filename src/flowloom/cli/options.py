"""What the options of several commands have in common. Standard library only."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

CATALOGUE_HELP = (
    "catalogue: a ComfyUI server (http://HOST:PORT), a .json or .json.gz file (saved, or an "
    "object_info answer), or the name of a shipped one: embedded, or in data/catalogues"
)
PATH_HELP = (
    "a workflow (.json, in API format or the editor's), a ComfyUI PNG, a .jsonl of workflows, or a "
    "folder of these"
)


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


def add_command(commands, name: str, handler: str, summary: str, more: str = "") -> Parser:
    """Add a command; `handler` is `module:function` within `flowloom.cli`."""
    parser = commands.add_parser(name, help=summary, description=f"{summary}.{more}")
    parser.set_defaults(handler=handler)
    return parser


def add_json(parser: Parser) -> None:
    """Add `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, nothing else"
    )


def add_catalogue(parser: Parser, required: bool = True) -> None:
    """Add `--catalogue`, and what reading one from a server takes."""
    parser.add_argument("--catalogue", metavar="FILE|URL", required=required, help=CATALOGUE_HELP)
    add_header(parser)


def add_header(parser: Parser) -> None:
    """Add `--header`."""
    parser.add_argument(
        "--header",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="header sent to a server, such as a proxy's Authorization; repeatable",
    )


def add_constraints(parser: Parser) -> None:
    """Add `--require` and `--forbid`."""
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


def add_paths(parser: Parser) -> None:
    """Add the workflows to read."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATH_HELP)


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

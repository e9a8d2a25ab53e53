"""Inputs of a node as its class takes them: literals coerced and checked, links typed.

Coerced as the server does it ("3" is 3, 3.7 is 3 for an INT); what the server lets pass and cannot
run is refused: numbers that are not finite, texts without end, names that lead out of a folder.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowloom.render.files import check_name
from flowloom.workflow import Catalogue, InputSpec, Link, Node, NodeSpec

MAX_TEXT_LENGTH = 4096
"""Characters of one text; a model reads its first 16 tokens anyway."""
_FILE_NAMES = ("filename_prefix",)


class Parameter(NamedTuple):
    """One input of a node's function."""

    spec: InputSpec
    required: bool
    """Whether the function has no default for it."""


@functools.cache
def parameters(class_type: str, function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The inputs that a class's function takes; the first one is not an input."""
    specs = {spec.name: spec for spec in node_spec(class_type).inputs}
    taken = list(inspect.signature(function).parameters.values())[1:]
    return tuple(Parameter(specs[p.name], p.default is p.empty) for p in taken)


def node_spec(class_type: str) -> NodeSpec:
    """Facts of a class of the embedded catalogue."""
    return Catalogue.load("embedded").nodes[class_type]


def value_of(node: Node, parameter: Parameter) -> Any:
    """An input's literal or link; None where it is left to its default.

    Raises:
        ValueError: It is missing, or not what the class takes.
    """
    spec = parameter.spec
    if spec.name not in node.inputs:
        if parameter.required:
            raise ValueError(f"{spec.name}: input is missing")
        return None
    value = node.inputs[spec.name]
    if type(value) is Link:
        return value
    if spec.is_link:
        raise ValueError(f"{spec.name}: got {type(value).__name__}, expected a link to {spec.type}")
    try:
        return _literal(spec, value)
    except ValueError as error:
        raise ValueError(f"{spec.name}: {error}") from error


def _literal(spec: InputSpec, value: Any) -> str | int | float | bool:
    if spec.type in ("INT", "FLOAT"):
        return _number(spec, value)
    if spec.type == "BOOLEAN":
        return bool(value)
    if not isinstance(value, str):
        raise ValueError(f"got {_shown(value)}, expected a text")
    if len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"got {len(value)} characters, expected at most {MAX_TEXT_LENGTH}")
    if spec.folder is not None or spec.name in _FILE_NAMES:
        return check_name(value) if value or spec.folder else value
    if spec.options is not None and value not in spec.options:
        expected = ", ".join(map(str, spec.options))
        raise ValueError(f"got {_shown(value)}, expected one of {expected}")
    return value


def _number(spec: InputSpec, value: Any) -> int | float:
    kind = "an integer" if spec.type == "INT" else "a number"
    low = -math.inf if spec.min is None else spec.min
    high = math.inf if spec.max is None else spec.max
    expected = f"expected {kind} from {low:g} to {high:g}"
    try:
        if isinstance(value, str):
            number: int | float = int(value) if spec.type == "INT" else float(value)
        elif isinstance(value, (int, float)):
            number = value if math.isfinite(value) else math.nan
            number = int(number) if spec.type == "INT" else float(number)
        else:
            raise ValueError("no number")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"got {_shown(value)}, {expected}") from error
    if not low <= number <= high or not math.isfinite(number):
        raise ValueError(f"got {_shown(value)}, {expected}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

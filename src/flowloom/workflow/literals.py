"""Literal values of inputs: what a server takes, in a fast form and in words.

`quick_test` answers only "certainly fine"; `literal_faults` says what is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flowloom.workflow.catalogue import Catalogue, InputSpec
from flowloom.workflow.inputs import CHOICE, LITERAL_TYPES, MATCH
from flowloom.workflow.object_info import INPUT_FOLDER

ERROR, WARNING = "error", "warning"
WRAPPED = "__value__"
_NUMBERS: dict[str, Callable[[Any], int | float]] = {"INT": int, "FLOAT": float}
# Values of one input that are remembered as fine, and how far steps are told apart in a float.
_MEMO, _STEPPED = 4096, 1e12
_NUMBER_IN_TEXT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.I)
# Where a picture's name may say that it lies: the folders that a catalogue does not list.
_ELSEWHERE = (" [output]", " [temp]")


class Fault(NamedTuple):
    """What is wrong with a value."""

    type: str
    message: str
    suggestion: str = ""
    severity: str = ERROR
    fixes: tuple[Any, ...] = ()
    near: bool = False
    """Whether the fixes are to be looked up among the options."""


def unwrapped(value: Any) -> Any:
    """The literal itself: a list is written as ``{"__value__": [...]}``, lest it be a link."""
    if isinstance(value, dict) and len(value) == 1 and WRAPPED in value:
        return value[WRAPPED]
    return value


def takes_any(item: InputSpec) -> bool:
    """Whether an input's type says nothing about a literal given to it."""
    return item.type == "*" or item.type.startswith("COMFY_")


def quick_test(item: InputSpec, catalogue: Catalogue) -> Callable[[Any], bool]:
    """A test of whether a literal certainly has no fault; a value it refuses may be fine too."""
    if item.widget:
        return lambda value: isinstance(value, (str, int, float, bool))
    options = catalogue.options(item)
    if options is not None:
        known = frozenset(option for option in options if isinstance(option, str))
        return lambda value: type(value) is str and value in known
    if item.type == "STRING":
        return lambda value: type(value) is str
    if item.type == "BOOLEAN":
        return lambda value: type(value) is bool
    if item.type not in _NUMBERS:
        return lambda value: False
    fine: set[int | float] = set()
    kinds = (int,) if item.type == "INT" else (int, float)

    def number(value: Any) -> bool:
        if type(value) not in kinds:
            return False
        if value in fine:
            return True
        good = not any(_number_faults(item, value))
        if good and len(fine) < _MEMO:
            fine.add(value)
        return good

    return number


def literal_faults(item: InputSpec, value: Any, catalogue: Catalogue) -> Iterator[Fault]:
    """What is wrong with a literal (not a list) given to an input.

    Args:
        item: The input; a choice or a socket as well.
        value: Anything at all.
        catalogue: Names the files that an input may have.
    """
    value = unwrapped(value)
    options = catalogue.options(item)
    kinds = {item.type} if item.type in LITERAL_TYPES else set(item.type.split(","))
    if item.widget:
        if not isinstance(value, (str, int, float, list, tuple, dict)) and value is not None:
            yield Fault("invalid_input_type", f"got {shown(value)}, expected JSON")
    elif options is not None or item.type == CHOICE:
        yield from _option_faults(item, value, options or ())
    elif item.type in _NUMBERS:
        yield from _number_faults(item, value)
    elif item.type == "STRING" and not isinstance(value, str):
        yield _coerced(item, value, (int, float), "a string")
    elif item.type == "BOOLEAN" and not isinstance(value, bool):
        kind = "true or false; any non-empty text is true"
        yield _coerced(item, value, (int, float, str), kind)
    elif item.type not in LITERAL_TYPES and not _fits(kinds, value):
        mild = takes_any(item) and not (value is None and item.required)
        message = f"got {shown(value)}, expected a link to an output of type {item.type}"
        yield Fault("literal_for_link", message, "", WARNING if mild else ERROR)


def _fits(kinds: set[str], value: Any) -> bool:
    """Whether a literal is of one of the types that a socket takes."""
    if isinstance(value, bool):
        return "BOOLEAN" in kinds
    if isinstance(value, str):
        return not kinds.isdisjoint(("STRING", "COMBO"))
    if isinstance(value, int):
        return not kinds.isdisjoint(("INT", "FLOAT"))
    return isinstance(value, float) and math.isfinite(value) and "FLOAT" in kinds


def _coerced(item: InputSpec, value: Any, kinds: tuple[type, ...], expected: str) -> Fault:
    message = f"got {shown(value)}, expected {expected}"
    if not isinstance(value, kinds):
        return Fault("invalid_input_type", message, *_default(item))
    fix = shown(value) if item.type == "STRING" else bool(value)
    return Fault("coerced_value", message, "", WARNING, (fix,))


def _option_faults(item: InputSpec, value: Any, options: tuple[Any, ...]) -> Iterator[Fault]:
    if item.multiselect and isinstance(value, (list, tuple)):
        for one in value[:100]:
            if not _is_option(one, options):
                message = f"{shown(one)} is not among the options"
                kept = [entry for entry in value if _is_option(entry, options)]
                yield Fault("value_not_in_list", message, fixes=({WRAPPED: kept},))
        return
    if item.folder is not None and isinstance(value, str):
        if value.removesuffix(" [input]") in options:
            return
        if item.upload and value.endswith(_ELSEWHERE):
            message = f"{shown(value)} lies in a folder that a catalogue does not list"
            yield Fault("custom_validation_failed", message, "", WARNING)
            return
    if not _is_option(value, options):
        where = f"installed in {item.folder}" if item.folder else "among the options"
        missing = item.upload or str(item.folder).startswith(INPUT_FOLDER)
        kind = "custom_validation_failed" if missing else "value_not_in_list"
        yield Fault(kind, f"{shown(value)} is not {where}", near=True)


def _is_option(value: Any, options: tuple[Any, ...]) -> bool:
    if isinstance(value, str):
        return value in options
    if not isinstance(value, (int, float)):
        return False
    kinds = (bool,) if isinstance(value, bool) else (int, float)
    return any(type(option) in kinds and value == option for option in options)


def _number_faults(item: InputSpec, value: Any) -> Iterator[Fault]:
    cast, number = _NUMBERS[item.type], _cast(item.type, value)
    if number is None:
        message = f"got {shown(value)}, expected {item.type}"
        found = _NUMBER_IN_TEXT.search(value[:200]) if isinstance(value, str) else None
        written = None if found is None else _cast("FLOAT", found.group())
        if written is None:
            yield Fault("invalid_input_type", message, *_default(item))
        else:
            fix = _nearest(item, written)
            yield Fault("invalid_input_type", message, f"use {shown(fix)}", fixes=(fix,))
        return
    if isinstance(value, (bool, str)) or number != value:
        given = f"the text {shown(value)!r}" if isinstance(value, str) else shown(value)
        read = f"{given} is read as {shown(number)}"
        yield Fault("coerced_value", read, "", WARNING, (_nearest(item, number),))
    low, high = _bound(item.min), _bound(item.max)
    if low is not None and number < low:
        fix = _nearest(item, number)
        message = f"{shown(number)} is below the least value {item.min}"
        yield Fault("value_smaller_than_min", message, f"use {fix}", fixes=(fix,))
    elif high is not None and number > high:
        fix = _nearest(item, number)
        message = f"{shown(number)} is above the greatest value {item.max}"
        yield Fault("value_bigger_than_max", message, f"use {fix}", fixes=(fix,))
    elif _bound(item.step) and abs(number) < _STEPPED:
        start = low or 0
        steps = (number - start) / item.step  # type: ignore[operator]
        if math.isfinite(steps) and abs(steps - round(steps)) > 1e-6 * max(1.0, abs(steps)):
            fix = cast(_nearest(item, number))
            message = f"{shown(number)} is not a step of {item.step} from {start}"
            yield Fault("off_step", message, f"nearest is {fix}", WARNING, (fix,))


def _cast(kind: str, value: Any) -> int | float | None:
    """The finite number that a server reads, or None."""
    if not isinstance(value, (int, float, str)):
        return None
    try:
        number = _NUMBERS[kind](value)
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        # Beyond a float, an integer is finite all the same.
        return value if kind == "INT" and isinstance(value, int) else None


def _bound(value: Any) -> int | float | None:
    """A bound or a step as a catalogue gives it; None where that is no number."""
    usable = type(value) in (int, float) and not math.isnan(value)
    return value if usable else None


def _nearest(item: InputSpec, number: int | float) -> int | float:
    """The legal number nearest to a number."""
    low, high, step = _bound(item.min), _bound(item.max), _bound(item.step)
    if low is not None and number <= low:
        nearest = low
    elif high is not None and number >= high:
        nearest = high
    else:
        nearest = number
    start = low or 0
    if step and step > 0 and abs(nearest) < _STEPPED and math.isfinite(start):
        steps = round((nearest - start) / step)
        if high is not None and start + steps * step > high * (1 + 1e-12) + 1e-12:
            steps -= 1
        nearest = round(start + steps * step, 10)
    if item.type == "INT" and not isinstance(nearest, int):
        return int(nearest) if math.isfinite(nearest) else 0
    return float(nearest) if item.type == "FLOAT" and abs(nearest) < 1e300 else nearest


def _default(item: InputSpec) -> tuple[str, str, tuple[Any, ...]]:
    """Suggestion, severity and fixes of a value that cannot be read at all."""
    if item.default is None:
        return "", ERROR, ()
    return f"the default is {shown(item.default)}", ERROR, (item.default,)


def kind_name(value: Any) -> str:
    """Name of a value's type as in JSON."""
    return "null" if value is None else type(value).__name__


def shown(value: Any) -> str:
    """At most 80 characters of a value, whatever it is, in one line that can be printed."""
    if isinstance(value, str):
        text = value if len(value) <= 80 else value[:77] + "..."
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) <= 4:
        inner = ("..." if isinstance(v, (list, tuple, dict)) else shown(v) for v in value)
        return f"[{', '.join(inner)}]"
    if isinstance(value, (list, tuple, dict, bytes)):
        return f"{kind_name(value)} of {len(value)}"
    return kind_name(value)


def accepts(wanted: str, received: str) -> bool:
    """The server's type rule: equal, "*", overlapping sets, or a type that matches any."""
    if wanted == received or "*" in (wanted, received) or MATCH in (wanted, received):
        return True
    return not set(wanted.split(",")).isdisjoint(received.split(","))

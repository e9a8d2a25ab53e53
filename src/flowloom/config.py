"""Configurations: frozen dataclasses, overridden field by field, written as JSON.

A stage's configuration is one frozen keyword-only dataclass (`flowloom.<package>.config`). A recipe
is a function that returns a complete set of them (`flowloom.recipes`). Overrides come from the
command line or the pipeline as nested dictionaries or `field=value` strings, and from nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


def check(holds: bool, field: str, got: object, expected: str) -> None:
    """Raise the one error a bad field gives; for use in `__post_init__`.

    Raises:
        ValueError: If `holds` is false: names field, value and bound.
    """
    if not holds:
        raise ValueError(f"{field}: got {got!r}, expected {expected}")


def override(config: ConfigT, changes: Mapping[str, Any], where: str = "") -> ConfigT:
    """Return `config` with fields replaced, nested as in `config.json`.

    Args:
        config: A frozen dataclass.
        changes: Field name to value; a nested dataclass takes a mapping, and where a field may be
            one of several, the first one that has all these names and allows what is given for
            those of its fields that are a choice of words.
        where: Dotted prefix named in errors.

    Raises:
        ValueError: On an unknown field or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(type(config))
    values, derived = {}, {}
    for name, value in changes.items():
        path = f"{where}{name}"
        if name not in fields:
            raise ValueError(f"{path}: unknown field, expected one of {', '.join(sorted(fields))}")
        current = getattr(config, name)
        if not fields[name].init:
            derived[name] = value
        elif dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            start = _variant(current, hints[name], value)
            values[name] = override(start, value, f"{path}.")
        else:
            values[name] = _coerce(value, hints[name], path)
    result = dataclasses.replace(config, **values)  # type: ignore[type-var]
    for name, value in derived.items():
        # It follows from other fields, and a `config.json` has it too.
        got = getattr(result, name)
        check(got == value, f"{where}{name}", value, f"{got!r}, which follows from other fields")
    return result


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `["lr=1e-3", "data.batch_size=16"]` into a nested dictionary.

    Values are read as JSON where that is possible and as strings where not.

    Raises:
        ValueError: If an assignment has no `=`.
    """
    nested: dict[str, Any] = {}
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted:
            raise ValueError(f"--set: got {assignment!r}, expected field=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        target = nested
        *parents, leaf = dotted.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return nested


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _variant(current: Any, hint: Any, changes: Mapping[str, Any]) -> Any:
    """What a mapping changes: the current value, unless it only fits another type of the union.

    That one starts from its defaults.
    """
    options: list[Any] = [type(current), *typing.get_args(hint)]
    for option in options:
        if _fits(option, changes):
            return current if type(current) is option else option()
    return current


def _fits(option: Any, changes: Mapping[str, Any]) -> bool:
    """Whether a type is a dataclass with all these names, and these words where it has a choice."""
    if not dataclasses.is_dataclass(option):
        return False
    known = {field.name for field in dataclasses.fields(option)}
    hints = typing.get_type_hints(option)
    return known >= changes.keys() and all(
        value in typing.get_args(hints[name])
        for name, value in changes.items()
        if typing.get_origin(hints[name]) is typing.Literal
    )


def _built(kind: Any, changes: Mapping[str, Any], path: str) -> Any:
    """A dataclass from a mapping; fields not in it keep their defaults."""
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [f.name for f in dataclasses.fields(kind) if (f.default, f.default_factory) == missing]
    for name in needed:
        check(name in changes, f"{path}.{name}", None, "a value")
    hints = typing.get_type_hints(kind)
    first = {name: _coerce(changes[name], hints[name], f"{path}.{name}") for name in needed}
    rest = {name: value for name, value in changes.items() if name not in needed}
    return override(kind(**first), rest, f"{path}.")


def _coerce(value: Any, hint: Any, path: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        if type(value) in nested:
            return value
        if nested and isinstance(value, Mapping):
            fitting = [option for option in nested if _fits(option, value)]
            return _coerce(value, (fitting or nested)[0], path)
        plain = [option for option in options if option not in (*nested, type(None))]
        check(len(plain) == 1, path, value, "a mapping of fields")
        return _coerce(value, plain[0], path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        check(isinstance(value, Mapping), path, value, "a mapping of fields")
        return _built(hint, value, path)
    if origin is typing.Literal:
        check(value in options, path, value, f"one of {options}")
        return value
    if origin is tuple:
        check(isinstance(value, (list, tuple)), path, value, "a list")
        inner = options[0] if options else Any
        return tuple(_coerce(item, inner, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is int:
        # KFP hands 3.0 where 3 was meant.
        integral = isinstance(value, (int, float)) and not isinstance(value, bool)
        check(integral and float(value).is_integer(), path, value, "an integer")
        return int(value)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        check(number, path, value, "a number")
        return float(value)
    if hint in (bool, str):
        check(isinstance(value, hint), path, value, f"a {hint.__name__}")
    return value

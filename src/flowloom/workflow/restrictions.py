"""What is said of a restriction that names nothing: its likely spelling, or what could be named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from flowloom.workflow.literals import shown

_MOST = 8


def unknown_value(what: str, key: str, value: Any, names: Iterable[str], values: Sequence) -> str:
    """For `require` and `forbid`: what is wrong with "key=value".

    Args:
        what: "require" or "forbid".
        key: Input, with or without its class.
        value: What it should be, or not be.
        names: Inputs that there are.
        values: What an input of this name can be; none if there is no such input.
    """
    if not values:
        bare = key.rpartition(".")[2]
        listed = did_you_mean(bare, names) or ", expected an input of the catalogue's classes"
        return f"{what}: got {shown(f'{key}={value}')!r} with no such input{listed}"
    known = list(dict.fromkeys(values))
    near = did_you_mean(str(value), map(str, known)) if isinstance(value, str) else ""
    if not near:
        if not isinstance(value, bool) and isinstance(value, (int, float)):
            known.sort(key=lambda v: abs(v - value) if isinstance(v, (int, float)) else 0)
        some = ", ".join(shown(v) for v in known[:_MOST])
        near = f", expected one of {some}{', ...' if len(known) > _MOST else ''}"
    return f"{what}: got {shown(f'{key}={value}')!r} with no such value{near}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Say ", did you mean X?", or nothing where no name is like this one."""
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_lower, 1, 0.6)
    return f", did you mean {by_lower[close[0]]}?" if close else ""

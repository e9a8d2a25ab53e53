"""Cron expressions as Kubeflow Pipelines reads them: six fields, seconds first.

The server takes five fields too, but reads them as seconds to month: daily at three would become
every minute of an hour. So five are completed here, and what it would refuse late is refused early.
"""

import re

FIELDS = {
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "day of month": (1, 31),
    "month": (1, 12),
    "day of week": (0, 6),
}
"""Fields in their order, and the bounds of their values; a week begins on Sunday."""

NAMED = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "day of week": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def six_fields(expression: str) -> str:
    """The expression with seconds first; five fields start at second 0.

    Raises:
        ValueError: If the server would not take it, or if it never comes to pass.
    """
    texts = expression.split()
    if len(texts) == len(FIELDS) - 1:
        texts = ["0", *texts]
    if len(texts) != len(FIELDS):
        raise ValueError(
            f"cron: got {expression!r}, expected 5 fields (minute, hour, day of month, month, day "
            "of week) or 6 (second first)"
        )
    values = {
        name: _values(name, text, expression) for (name, text) in zip(FIELDS, texts, strict=True)
    }
    days, months = values["day of month"], values["month"]
    every_week_day = texts[-1][0] in "*?"  # else a day of either kind will do
    if every_week_day and all(min(days) > MONTH_DAYS[month - 1] for month in months):
        raise ValueError(f"cron: got {expression!r}, expected a day that its months have")
    return " ".join(texts)


def _values(name: str, text: str, expression: str) -> set[int]:
    """The values that a field allows."""
    low, high = FIELDS[name]
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step_text = part.partition("/")
        step = int(step_text) if step_text.isascii() and step_text.isdecimal() else 0
        if slash and not step:
            _refuse(name, expression, f"a step of 1 or more in {part!r}")
        if span in ("*", "?"):
            first, last = low, high
        else:
            ends = [_number(name, end) for end in span.split("-")]
            if len(ends) > 2 or any(end is None for end in ends):
                _refuse(name, expression, f"numbers, `*`, `a-b`, `/step`; not {part!r}")
            first, last = ends[0], ends[-1]
            if slash and len(ends) == 1:
                last = high  # 5/10: from 5 on
            if not low <= first <= last <= high:
                _refuse(name, expression, f"{low} to {high}, rising; not {part!r}")
        found |= set(range(first, last + 1, step or 1))
    return found


def _number(name: str, text: str):
    """The value of a number or of a name such as `mon`; None if it is neither."""
    if re.fullmatch(r"[0-9]{1,2}", text):
        return int(text)
    names = NAMED.get(name, [])
    if text.lower() not in names:
        return None
    return names.index(text.lower()) + FIELDS[name][0]


def _refuse(name: str, expression: str, expected: str) -> None:
    raise ValueError(f"cron: {name} of {expression!r}: expected {expected}")

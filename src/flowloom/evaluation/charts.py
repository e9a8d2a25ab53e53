"""Charts as inline SVG text. Colours come from the page's CSS, so they follow light and dark."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of an interval chart."""

    label: str
    """What it is of."""
    value: float
    """The point."""
    low: float
    """Lower end of the whisker."""
    high: float
    """Upper end of the whisker."""
    accent: bool = False
    """Whether it is the one the page is about."""


def interval_chart(rows: Sequence[Bar], zero: bool = False, unit: str = "") -> str:
    """Points with whiskers, one row each, on one axis.

    Args:
        rows: Top to bottom.
        zero: Whether 0 is marked, and always on the axis: for differences.
        unit: What the axis is labelled with.
    """
    left, right, width, step, top = 190, 70, 760, 30, 8
    low = min([row.low for row in rows] + ([0.0] if zero else []))
    high = max([row.high for row in rows] + ([0.0] if zero else []))
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    height = top + step * len(rows) + 34
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return left + (value - low) / span * (width - left - right)

    parts = [_open(width, height)]
    bottom = top + step * len(rows)
    for tick in ticks:
        parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 16, _label(tick, ticks), "tick", "middle"))
    if zero:
        parts.append(_line(x(0.0), top, x(0.0), bottom, "zero"))
    if unit:
        parts.append(_text((left + width - right) / 2, bottom + 31, unit, "tick", "middle"))
    for index, row in enumerate(rows):
        y = top + step * index + step / 2
        kind = "accent" if row.accent else "plain"
        parts.append(_text(left - 12, y + 4, row.label, f"label {kind}", "end"))
        parts.append(_line(x(row.low), y, x(row.high), y, f"whisker {kind}"))
        parts.append(f'<circle cx="{x(row.value):.1f}" cy="{y:.1f}" r="5" class="dot {kind}"/>')
        sign = "+" if zero and row.value >= 0 else ""
        value = f"{sign}{row.value:.3f}"
        parts.append(_text(width - right + 12, y + 4, value, f"value {kind}", "start"))
    return "".join([*parts, "</svg>"])


def line_chart(
    series: dict[str, Sequence[tuple[float, float]]], x_label: str, width: int = 360
) -> str:
    """Curves over a common axis, named in a legend below the picture.

    Args:
        series: Name to points (x, y); points that are not finite are left out.
        x_label: What the horizontal axis counts.
        width: Of the picture, in pixels.
    """
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return ""
    left, right, top, inner = 52, 12, 8, 150
    xs = [x for points in clean.values() for x, _ in points]
    ys = [y for points in clean.values() for _, y in points]
    ticks = _ticks(min(ys), max(ys))
    y_low, y_high = min(min(ys), ticks[0]), max(max(ys), ticks[-1])
    x_low, x_high = min(xs), max(xs)
    height = top + inner + 36 + (16 * len(clean) if len(clean) > 1 else 0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return left + across * (width - left - right), top + (1 - up) * inner

    parts = [_open(width, height)]
    for tick in ticks:
        y = place(x_low, tick)[1]
        parts.append(_line(left, y, width - right, y, "grid"))
        parts.append(_text(left - 8, y + 4, _label(tick, ticks), "tick", "end"))
    bottom = top + inner
    parts.append(_text(left, bottom + 16, f"{x_low:g}", "tick", "start"))
    parts.append(_text(width - right, bottom + 16, f"{x_high:g}", "tick", "end"))
    parts.append(_text((left + width - right) / 2, bottom + 16, x_label, "tick", "middle"))
    for index, (name, points) in enumerate(clean.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" class="curve c{index % 4}"/>')
        if len(clean) > 1:
            y = bottom + 36 + 16 * index
            parts.append(_line(left, y - 4, left + 18, y - 4, f"curve c{index % 4}"))
            parts.append(_text(left + 26, y, name, "tick", "start"))
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from at most `low` to at least `high`."""
    span = high - low
    if not span > 0:
        pad = abs(low) * 0.1 or 1.0
        low, high, span = low - pad, high + pad, 2 * pad
    raw = span / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _label(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    return f"{tick + 0.0:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _open(width: float, height: float) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img">'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} class="{kind}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{html.escape(text)}</text>'

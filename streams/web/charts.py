"""Lines for small SVG charts: pure functions from values to coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

WIDTH, HEIGHT = 240.0, 48.0


@dataclass(frozen=True, slots=True)
class Sparkline:
    """points: of a polyline in a box of WIDTH x HEIGHT, empty for fewer than two values."""

    label: str
    now: float
    highest: float
    points: str
    area: str


def sparkline(label: str, values: Sequence[tuple[float, float]], span: float) -> Sparkline:
    """values: (time, value), oldest first; the box shows the last `span` units of time."""
    if not values:
        return Sparkline(label, 0, 0, "", "")
    end = values[-1][0]
    highest = max(value for _, value in values)
    places = [
        (WIDTH * (1 - (end - at) / span), HEIGHT - 1 - (HEIGHT - 4) * (value / highest if highest else 0))
        for at, value in values
        if end - at <= span
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    area = f"{places[0][0]:.1f},{HEIGHT} {points} {places[-1][0]:.1f},{HEIGHT}"
    return Sparkline(label, values[-1][1], highest, points if len(places) > 1 else "", area if len(places) > 1 else "")


@dataclass(frozen=True, slots=True)
class Tick:
    """A label on an axis."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class ValueChart:
    """Daily values in a box of width x height; provisional_from: where the dates begin that are not right yet."""

    width: float
    height: float
    line: str
    provisional_line: str
    cost: str
    provisional_from: float | None
    xs: list[Tick]
    ys: list[Tick]


def value_chart(
    days: Sequence[tuple[date, float | None, float, bool]], width: float = 860, height: float = 260
) -> ValueChart | None:
    """days: (date, market value or None, cost basis, provisional), in order. None for fewer than two days."""
    if len(days) < 2:
        return None
    known = [value for _, value, _, _ in days if value is not None] + [cost for _, _, cost, _ in days]
    low, high = min(known), max(known)
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad
    left, bottom = 84.0, 28.0

    def x(index: int) -> float:
        return left + (width - left - 12) * index / (len(days) - 1)

    def y(value: float) -> float:
        return 10 + (height - bottom - 10) * (high - value) / (high - low)

    places = [(x(n), y(day[1]), day[3]) for n, day in enumerate(days) if day[1] is not None]
    right = [(across, down) for across, down, provisional in places if not provisional]
    begins = next((n for n, day in enumerate(days) if day[3]), None)
    waiting = [(across, down) for across, down, provisional in places if provisional]
    if right and waiting:
        waiting.insert(0, right[-1])
    step = -(-len(days) // 6)
    return ValueChart(
        width=width,
        height=height,
        line=_points(right),
        provisional_line=_points(waiting),
        cost=_points([(x(n), y(cost)) for n, (_, _, cost, _) in enumerate(days)]),
        provisional_from=None if begins is None else x(max(0, begins - 1) if right else begins),
        xs=[Tick(x(n), days[n][0].isoformat()) for n in range(0, len(days), step)],
        ys=[Tick(y(low + (high - low) * part / 4), _short(low + (high - low) * part / 4)) for part in range(5)],
    )


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _short(value: float) -> str:
    for size, unit in ((1e9, "bn"), (1e6, "m"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):,.1f} {unit}"
    return f"{value:,.2f}"

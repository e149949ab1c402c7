"""`python -m tests.bench.plots bench.json docs/plots`: the plots of docs/performance.md. `make bench` runs it.

What is shown is decided in figures.py; here it is drawn. The same file gives the same bytes: the ids in the SVG do not
depend on chance, and no date of drawing is written. Text stays text, in whatever font the reader has; the panel has a
colour of its own, so that it can be read on a light page and on a dark one. Needs matplotlib: `make peers`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tests.bench.figures import Bar, Curve, NotDrawableError, Stages, bars, curves, provenance, stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _PANEL, _GRID = "#1b2430", "#5b6673", "#fbfcfd", "#d8dde3"
_GOOD, _POOR, _WANTED = "#0b7a6b", "#b4552d", "#1b2430"
_CURVES = ("#0b7a6b", "#44598c", "#b4552d", "#7a4b8c")
_STYLE = {
    "svg.hashsalt": "tidemark",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],  # measured with the first, which comes with matplotlib
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _FAINT,
    "axes.facecolor": _PANEL,
    "figure.facecolor": _PANEL,
    "grid.color": _GRID,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
}
_WIDTH = 9.0  # inches
_LABELS, _MARGIN = 0.46, 0.015  # of the width
_LOWEST_SPAN = 1.6  # a growth of nothing fills less than the height


@click.command()
@click.argument("file", metavar="BENCH.JSON", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(file: Path, folder: Path) -> None:
    """Draw a run of all benchmarks: ratios.svg, growth.svg and late-price.svg in FOLDER, all or none."""
    try:
        run = json.loads(file.read_text())
        drawn = draw(run)
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}: `make bench` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{file}: not written by `make bench` ({error!r})") from error
    except NotDrawableError as error:
        raise click.ClickException(f"{file}: {error}: run `make bench` for all of them") from error
    except ImportError as error:
        raise click.ClickException(f"{error}: run `make peers`, and this with .venv-bench/bin/python") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        (folder / name).write_text(svg)
        click.echo(folder / name)


def draw(run: Mapping[str, Any]) -> dict[str, str]:
    """The plots by their file name. Raises NotDrawableError when a benchmark is missing."""
    lines = run["results"]
    shown = bars(lines), curves(lines), stages(lines)
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figures = {
            "ratios.svg": ("Ratios of paths to their baselines", _ratios(shown[0])),
            "growth.svg": ("Cost per row as tables and histories grow", _growth(shown[1])),
            "late-price.svg": ("Where the time of one late price goes", _late_price(shown[2])),
        }
        return {name: _svg(figure, title, provenance(run)) for name, (title, figure) in figures.items()}


def _ratios(shown: Sequence[Bar]) -> Figure:
    """From 1, where both are equally quick: to the right quicker than the baseline, to the left slower."""
    from matplotlib.transforms import blended_transform_factory

    rows = _rows(shown)
    figure, axes = _panel(0.36 * len(rows) + 1.1)
    across, across_all = axes.get_yaxis_transform(), blended_transform_factory(figure.transFigure, axes.transData)
    for row, bar in enumerate(rows):
        if isinstance(bar, str):
            axes.text(_MARGIN, row + 0.15, bar, transform=across_all, weight="bold", va="center")
            continue
        colour = _GOOD if bar.reached else _POOR
        axes.barh(row, bar.ratio - 1, left=1, height=0.5, color=colour)
        axes.plot([bar.lowest, bar.highest], [row, row], color=_INK, linewidth=1, solid_capstyle="butt")
        if bar.wanted is not None:
            axes.plot([bar.wanted] * 2, [row - 0.38, row + 0.38], color=_WANTED, linewidth=2.2)
        wanted = "" if bar.wanted is None else f"wanted {bar.wanted:.2g}"
        axes.text(1.02, row, _figure(bar.ratio), transform=across, va="center", weight="bold")
        axes.text(1.13, row, wanted, transform=across, va="center", color=_FAINT)
        _label(axes, row, bar.name, f"beside {bar.baseline}")
    axes.set_xscale("log")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1, color=_FAINT, linewidth=1)
    _ticks(axes, [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(t, shown)])
    axes.set_xlabel("times as quick as the baseline (thick mark: wanted; thin line: its rounds)", loc="right")
    return figure


def _rows(shown: Sequence[Bar]) -> list[Bar | str]:
    """A heading before the bars of each benchmark."""
    rows: list[Bar | str] = []
    for number, bar in enumerate(shown):
        if number == 0 or bar.bench != shown[number - 1].bench:
            rows.append(bar.bench)
        rows.append(bar)
    return rows


def _within(tick: float, shown: Sequence[Bar]) -> bool:
    ends = [end for bar in shown for end in (bar.lowest, bar.highest, bar.wanted or 1.0)]
    return min(ends) / 2.5 <= tick <= max(ends) * 2.5


def _growth(shown: Sequence[Curve]) -> Figure:
    """Side by side, since their sizes have nothing in common; their ratios have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 3.4))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.075, right=0.98, top=0.73, bottom=0.23, wspace=0.08)
    highest = max(_LOWEST_SPAN, *(ratio for curve in shown for rounds in curve.ratios for ratio in rounds))
    for axes, curve, colour in zip(panels, shown, _CURVES * len(shown), strict=False):
        _plain(axes)
        axes.grid(axis="y", linewidth=0.6)
        axes.axhline(curve.most, color=_WANTED, linewidth=1, linestyle="--")
        for size, rounds in zip(curve.sizes, curve.ratios, strict=True):
            axes.plot([size] * len(rounds), rounds, "o", color=colour, alpha=0.35, markersize=3.5, markeredgewidth=0)
        axes.plot(curve.sizes, curve.medians, "-o", color=colour, linewidth=1.6, markersize=5)
        for size, cost, median in zip(curve.sizes, curve.costs, curve.medians, strict=True):
            axes.annotate(_figure(cost), (size, median), (0, -14), textcoords="offset points", ha="center")
        axes.set_xscale("log")
        axes.margins(x=0.14)
        _ticks(axes, curve.sizes)
        axes.set_ylim(0, 1.1 * highest)
        axes.set_xlabel(curve.axis)
        axes.set_title(f"{curve.series}\n(at the points: {curve.unit})", fontsize=8.5, loc="left")
        axes.text(0.01, curve.most + 0.04, "wanted: at most", transform=axes.get_yaxis_transform(), color=_FAINT)
    panels[0].set_ylabel("beside the smallest size")
    return figure


def _late_price(shown: Stages) -> Figure:
    """Stage after stage, each from where the one before has ended."""
    figure, axes = _panel(0.3 * len(shown.stages) + 1.1)
    for row, stage in enumerate(shown.stages):
        end = stage.begins + stage.median
        axes.barh(row, stage.median, left=stage.begins, height=0.55, color=_GOOD)
        axes.plot([stage.begins + stage.low, stage.begins + stage.high], [row, row], color=_INK, linewidth=1)
        place = (max(end, stage.begins + stage.high), row)
        axes.annotate(_figure(stage.median), place, (5, 0), textcoords="offset points", va="center", weight="bold")
        axes.text(-0.02, row, stage.name, transform=axes.get_yaxis_transform(), ha="right", va="center")
    axes.set_xlim(0, 1.12 * max(stage.begins + max(stage.high, stage.median) for stage in shown.stages))
    axes.set_ylim(len(shown.stages) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    series = f"{shown.series}: {shown.total:.0f} ms, medians of {shown.count}"
    axes.set_xlabel(f"ms; {series}; thin line: 10 to 90 %", loc="right")
    return figure


# -- what all of them have ----------------------------------------------------------------------------------------


def _panel(height: float) -> tuple[Figure, Axes]:
    """One panel with room for labels on the left and figures on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((_LABELS, 0.65 / height, 0.85 - _LABELS, 1 - 1.05 / height))
    _plain(axes)
    axes.set_yticks([])
    return figure, axes


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, which="both")


def _label(axes: Axes, row: int, name: str, beside: str) -> None:
    across = axes.get_yaxis_transform()
    axes.text(-0.02, row - 0.17, name.replace("`", ""), transform=across, ha="right", va="center", fontsize=8.5)
    axes.text(-0.02, row + 0.23, beside, transform=across, ha="right", va="center", fontsize=7, color=_FAINT)


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """These and no others, written out."""
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.set_xticks([], minor=True)


def _svg(figure: Figure, title: str, below: str) -> str:
    """Stands alone: without the address of a document type, and with a name for those who do not see it."""
    figure.text(_MARGIN, 1 - 0.14 / figure.get_figheight(), title, fontsize=11, weight="bold", va="top")
    figure.text(1 - _MARGIN, 0.1 / figure.get_figheight(), below, fontsize=7, color=_FAINT, ha="right")
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{escape(title)}" ', svg, count=1)


if __name__ == "__main__":
    main()

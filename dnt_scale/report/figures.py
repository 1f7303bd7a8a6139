"""The pictures of a report: losses over what was seen, and final losses against a setting."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dnt_scale.record.plots import INK, save, smooth, style
from dnt_scale.report.groups import Group, label, text
from dnt_scale.report.runs import Floats, Run
from dnt_scale.report.sensitivity import TOLERANCE, Width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2a5caa", "#d1495b", "#2a9d8f", "#e39a2d", "#7b5ea7", "#5c8001", "#8d6a52", "#4ba3c3")
LOW, HIGH = "#a9c8ee", "#0f2f66"  # of a setting that is a number: light is small
REST = "#c9c9c9"  # of all but the best, where they are many
BEST = 8
LEGEND_CHARS = 30  # a line: what there is room for beside the picture
SMOOTH_SHARE = 0.05  # of the run: many lines are drawn behind each other
SKIPPED = 0.05  # of the run, at its start: it may leave the picture at the top
# How much of a fall is shown: in nats at least, and by how far the ends of runs are apart.
LEAST_SHOWN, ENDS_SHOWN = 0.5, 4


@dataclass(frozen=True)
class Line:
    """Final losses against a setting, all others being equal.

    name: the other settings that vary, in words.
    values: of the setting, ascending.
    mean, low, high: over seeds, nan where none came to its end.
    failed: whether a run of the value failed.
    """

    name: str
    values: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    failed: list[bool]
    width: Width | None


def draw_curves(groups: Sequence[Group], title: str, path: Path) -> Path:
    """Draw validation losses as lines over what was seen, with the smoothed training loss behind
    and a band from the lowest to the highest seed.
    """
    legend = "validation, mean and range of seeds; thin: training, smoothed"
    figure, axes = _canvas(title, legend)
    ranked = sorted(groups, key=lambda group: math.inf if group.mean is None else group.mean)
    coloured = ranked if len(groups) <= len(COLOURS) else ranked[:BEST]
    for group in reversed(ranked):
        colour = _colour(groups, coloured, group)
        front = group in coloured
        for run in group.runs:
            axes.plot(
                run.train[0],
                smooth(run.train[1], SMOOTH_SHARE),
                color=colour,
                lw=0.7,
                alpha=0.3,
                zorder=1,
            )
        ended = [run for run in group.runs if run.state != "failed"]
        for run in group.runs if not ended else [r for r in group.runs if r.state == "failed"]:
            axes.plot(*run.val, color=colour, lw=1, ls=":", zorder=2)
            axes.plot(run.val[0][-1:], run.val[1][-1:], color=colour, marker="x", ms=7, zorder=3)
        if not ended:
            continue
        counts, low, mean, high = _band(ended)
        if len(ended) > 1:
            axes.fill_between(counts, low, high, color=colour, alpha=0.22, lw=0, zorder=2)
        axes.plot(
            counts,
            mean,
            color=colour,
            lw=1.9 if front else 1,
            marker="o" if counts.size < 40 else None,
            ms=3.5,
            zorder=4 if front else 2,
        )
    unit = groups[0].runs[0].unit
    axes.set_xlabel(unit)
    axes.set_ylabel(f"validation loss (nats per {unit.removesuffix('s')})")
    _fit(axes, groups)
    _name_groups(axes, groups, coloured, len(ranked))
    style(axes)
    return save(figure, path)


def draw_against(lines: Sequence[Line], key: str, unit: str, title: str, path: Path) -> Path:
    """Draw final losses against a setting, with the range within the tolerance of the best."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    legend = f"mean and range of seeds; ring: the best; bar: within {TOLERANCE:g} nats of it"
    figure, axes = _canvas(title, legend)
    logarithmic = all(value > 0 for line in lines for value in line.values)
    if logarithmic:
        axes.set_xscale("log")
    known = [value for line in lines for value in [*line.low, *line.high] if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = max(0.02, 0.08 * (high - low))
    top = high + room
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        _draw_line(axes, line, colour, top)
        if line.width and logarithmic:
            _draw_width(axes, line.width, colour)
    axes.set_ylim(low - room, top + 0.6 * room)
    axes.set_xlabel(key)
    axes.set_ylabel(f"final validation loss (nats per {unit.removesuffix('s')})")
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9, labelcolor=INK
    )
    style(axes)
    ticks = sorted({value for line in lines for value in line.values})
    if logarithmic and len(ticks) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(float(value))))
    axes.margins(x=0.06)
    return save(figure, path)


def _draw_line(axes: Axes, line: Line, colour: str, top: float) -> None:
    values, mean = np.array(line.values), np.array(line.mean)
    there = np.isfinite(mean)
    below, above = mean - np.array(line.low), np.array(line.high) - mean
    name = line.name or "mean of seeds"
    if line.width:
        name += f"\n{line.width.words} within {TOLERANCE:g} nats"
    axes.errorbar(
        values[there],
        mean[there],
        yerr=[below[there], above[there]],
        color=colour,
        lw=1.9,
        elinewidth=1.2,
        capsize=3,
        marker="o",
        ms=5,
        label=name,
        zorder=3,
    )
    gone = values[np.array(line.failed)]
    axes.plot(gone, np.full(gone.size, top), color=colour, ls="", marker="x", ms=8, zorder=3)
    for value in gone:
        axes.annotate(
            "failed",
            (value, top),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=colour,
        )
    if line.width:
        axes.plot(
            [line.width.best],
            [line.width.loss],
            marker="o",
            ms=11,
            mfc="none",
            mec=colour,
            mew=1.4,
            zorder=4,
        )


def _draw_width(axes: Axes, width: Width, colour: str) -> None:
    """Draw the range as a bar at the height of the tolerance, open where the values end."""
    height = width.loss + TOLERANCE
    axes.plot([width.low, width.high], [height, height], color=colour, lw=5, alpha=0.25, zorder=2)
    for value, cut in ((width.low, width.low_cut), (width.high, width.high_cut)):
        if not cut:
            axes.plot([value], [height], color=colour, marker="|", ms=11, mew=1.6, zorder=3)


def _canvas(title: str, legend: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.115, 0.655, 0.775))
    axes.set_title(title, fontsize=13, fontweight="bold", loc="left", color=INK, pad=20)
    axes.text(0.0, 1.015, legend, transform=axes.transAxes, fontsize=9, color="#777777")
    return figure, axes


def _band(runs: Sequence[Run]) -> tuple[Floats, Floats, Floats, Floats]:
    """Return where all of the runs were validated, and their lowest, mean and highest loss there,
    each (points,).
    """
    counts = runs[0].val[0]
    for run in runs[1:]:
        counts = np.intersect1d(counts, run.val[0])
    table = np.stack([run.val[1][np.searchsorted(run.val[0], counts)] for run in runs])
    return counts, table.min(0), table.mean(0), table.max(0)


def _fit(axes: Axes, groups: Sequence[Group]) -> None:
    """Choose the heights that the picture shows: a first steep fall may leave it at the top."""
    runs = [run for group in groups for run in group.runs]
    last = max(run.units for run in runs)
    seen = np.concatenate(
        [losses[counts >= SKIPPED * last] for run in runs for counts, losses in [run.val]]
        + [run.val[1][-1:] for run in runs if run.state != "failed"]
    )
    if seen.size:
        ends = [run.val[1][-1] for run in runs if run.state == "finished" and run.val[0].size]
        apart = float(max(ends) - min(ends)) if ends else math.inf
        low = float(seen.min())
        high = min(float(seen.max()), low + max(LEAST_SHOWN, ENDS_SHOWN * apart))
        room = max(0.01, 0.06 * (high - low))
        axes.set_ylim(low - room, high + room)


def _colour(groups: Sequence[Group], coloured: Sequence[Group], group: Group) -> str:
    """Return a group's colour: by the value where one number varies, else one of a palette."""
    if group not in coloured:
        return REST
    keys = list(group.values)
    if (
        len(keys) == 1
        and len(groups) > 1
        and all(isinstance(each.values[keys[0]], int | float) for each in groups)
    ):
        return _between(list(groups).index(group) / (len(groups) - 1))
    return COLOURS[list(coloured).index(group)]


def _between(share: float) -> str:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("setting", [LOW, "#3f7fd1", HIGH])
    return str(to_hex(scale(share)))


def _name_groups(axes: Axes, groups: Sequence[Group], coloured: Sequence[Group], all_: int) -> None:
    """Put a legend beside the picture: the groups from the lowest loss up."""
    from matplotlib.lines import Line2D

    marks, names = [], []
    for group in coloured:
        end = f"{group.mean:.4f}" if group.mean is not None else group.runs[0].state
        marks.append(Line2D([], [], color=_colour(groups, coloured, group), lw=2.4))
        words = (label(group.values) or group.runs[0].name).splitlines()
        lines = [textwrap.fill(line, LEGEND_CHARS, break_on_hyphens=False) for line in words]
        names.append("\n".join([*lines, end]))
    if len(coloured) < all_:
        marks.append(Line2D([], [], color=REST, lw=2.4))
        names.append(f"{all_ - len(coloured)} others")
    axes.legend(
        marks,
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        labelspacing=0.7,
    )

"""Pictures of what `dnt diagnose` has found, runs side by side on the same scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnt_scale.record.plots import GRID, INK, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
Series = Mapping[str, Sequence[float | None]]

COLOURS = ("#2a5caa", "#d1495b", "#3a9d6e", "#e0a030", "#7b5ea7", "#5aa9c9", "#8a6d4b", "#c86fa8")
MARKERS = "osD^vP*X"
COLUMN, ROW = 3.3, 2.2  # inches of a panel
LEGEND = 1.5  # inches, to the right of the panels
TITLE = 38  # characters above a panel


def draw(
    folder: Path, reports: Sequence[Report], training: Sequence[Sequence[Report]]
) -> list[Path]:
    """Draw ``diagnose-*.png`` in a folder, which is made, and return their paths.

    Args:
        reports: of runs, as ``tools.diagnose`` makes them; each is a column of a picture.
        training: for each run the lines of its diagnostics.jsonl, empty where there are none.

    Raises:
        OSError: a file cannot be written.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():  # a matplotlibrc of the user's is for other plots
        matplotlib.rcdefaults()
        drawn = [save(_gradients(reports), folder / "diagnose-gradients.png")]
        if any(report.get("deciles") for report in reports):
            drawn.append(save(_deciles(reports), folder / "diagnose-loss.png"))
        if any(report["jacobians"] for report in reports):
            drawn.append(save(_jacobians(reports), folder / "diagnose-jacobians.png"))
        if any(training):
            drawn.append(save(_training(reports, training), folder / "diagnose-training.png"))
    return drawn


def save(figure: Figure, path: Path) -> Path:
    """Put a picture in place whole."""
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png")
    beside.replace(path)
    return path


def grid(rows: int, columns: int, wide: float = COLUMN, high: float = ROW) -> tuple[Figure, Any]:
    """Return a figure of panels, (rows, columns) of axes, whose rows share their scale.

    Args:
        wide: inches of a panel.
        high: the same.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    between = 0.75  # inches, of rows
    width, height = 0.95 + wide * columns + LEGEND, 1.1 + (high + between) * rows - between
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row")
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - (LEGEND + 0.1) / width,
        bottom=0.55 / height,
        top=1 - 0.55 / height,
        hspace=between / high,
        wspace=0.08,
    )
    return figure, axes


def titled(axes: Any, reports: Sequence[Report]) -> None:
    """Name the runs above their columns, long names without their middle."""
    for panel, report in zip(axes[0], reports, strict=True):
        run, setting = report["run"], report["setting"]
        if len(run) > TITLE:
            run = f"{run[: TITLE // 2]}…{run[-(TITLE // 2) :]}"
        step = f"{setting}, step {report['step']}" if setting else f"step {report['step']}"
        panel.set_title(f"{run}\n{step}", fontsize=9, loc="left", color=INK)


def legend(figure: Figure, panel: Axes) -> None:
    """Put the lines' names to the right of the panels."""
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="center right", frameon=False, fontsize=8)


def lines(
    panel: Axes, x: Sequence[float], series: Series, names: Sequence[str] = (), *, log: bool = True
) -> None:
    """Draw a line a name; what is not known is left out.

    Args:
        names: whose order decides the colours, where ``series`` has some of them only.
    """
    for name, values in series.items():
        number = list(names or series).index(name)
        known = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        table = np.array([pair for pair in known if math.isfinite(pair[1])], dtype=np.float64)
        panel.plot(
            *table.reshape(-1, 2).T,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            ms=3 if len(table) < 40 else 0,
            lw=1.2,
            label=name,
        )
    if log:
        panel.set_yscale("log")


def finish(axes: Any, labels: Sequence[str]) -> None:
    """Style all panels, mark their scales, and say what stands on the left of each row."""
    for row, label in zip(axes, labels, strict=True):
        for panel in row:
            style(panel)
            panel.tick_params(labelsize=8)
        row[0].set_ylabel(label, fontsize=9, color=INK)
        if row[0].get_yscale() == "log":
            mark_logarithms(row[0])


def mark_logarithms(panel: Axes) -> None:
    """Mark 1, 2, 5 and their tens on the left of a panel, of a wide scale powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = panel.get_ylim()
    if high < 6 * low:  # so that there is something to mark
        middle = math.sqrt(low * high)
        panel.set_ylim(middle / 2.5, middle * 2.5)
    decades = math.log10(high / low)
    base, subs = (
        (100.0, (1.0,)) if decades > 6 else (10.0, (1.0,) if decades > 2 else (1.0, 2.0, 5.0))
    )
    panel.yaxis.set_major_locator(LogLocator(base=base, subs=subs))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _gradients(reports: Sequence[Report]) -> Figure:
    figure, axes = grid(4, len(reports))
    for column, report in enumerate(reports):
        _histograms(axes[0, column], report["histograms"])
        kinds = kinds_by_depth(report)
        depth = range(len(report["block_grad_rms"]))
        for row, (measure, usual) in enumerate(
            (("kurtosis", 3.0), ("q999_q50", 4.88), ("rms", None)), start=1
        ):
            panel = axes[row, column]
            series = {kind: [each[measure] for each in own] for kind, own in kinds.items()}
            lines(panel, depth, series, list(report["histograms"]))
            if usual is not None:
                panel.axhline(usual, color=INK, lw=0.8, ls=":")
            whole_numbers(panel)
            panel.set_xlabel("block", fontsize=9)
    labels = ["density", "kurtosis", "q99.9 / q50", "RMS of the gradient"]
    finish(axes, labels)
    titled(axes, reports)
    legend(figure, axes[0, 0])
    return figure


def kinds_by_depth(report: Report) -> dict[str, list[Report]]:
    """Return the statistics of the matrices that all blocks have, by kind, in order of depth."""
    kinds: dict[str, list[Report]] = {}
    for each in report["tensors"].values():
        if each["matrix"]:
            kinds.setdefault(each["kind"], []).append(each)
    blocks = len(report["block_grad_rms"])
    return {kind: own for kind, own in kinds.items() if len(own) == blocks and own[0]["in_block"]}


def _histograms(panel: Axes, histograms: Mapping[str, Any]) -> None:
    """Draw the densities of |g| / RMS, and a normal distribution's."""
    for number, (kind, found) in enumerate(histograms.items()):
        middles = np.array(found["middles"])
        density = np.array(found["density"])
        known = density > 0
        panel.plot(
            middles[known],
            density[known],
            color=COLOURS[number % len(COLOURS)],
            lw=1.2,
            label=kind,
            ls="-" if number < len(COLOURS) else "--",
        )
    x = np.logspace(-2, math.log10(6), 200)
    normal = np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)
    panel.plot(x, normal, color=INK, lw=1, ls=":", label="normal")
    panel.set(xscale="log", yscale="log", xlim=(1e-2, 3e2), ylim=(1e-9, 30))
    panel.set_xlabel("|gradient entry| / RMS of its tensor", fontsize=9)


def _deciles(reports: Sequence[Report]) -> Figure:
    figure, axes = grid(1, 1, 5.5, 3.0)
    panel = axes[0, 0]
    known = [report for report in reports if report.get("deciles")]
    series = {label_of(report): [each["loss"] for each in report["deciles"]] for report in known}
    lines(panel, range(1, len(known[0]["deciles"]) + 1), series, log=False)
    panel.set_xlabel(
        "tenth of the text by how frequent its tokens are: 1 the most frequent, 10 the rare ones",
        fontsize=9,
    )
    finish(axes, ["loss (nats per token)"])
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    whole_numbers(panel)
    legend(figure, panel)
    return figure


def label_of(report: Report) -> str:
    """Return a run's name, short enough for a legend."""
    name = str(report["run"])
    return name if len(name) <= 18 else f"{name[:15]}..."


def _jacobians(reports: Sequence[Report]) -> Figure:
    figure, axes = grid(1, len(reports), high=3.0)
    for panel, report in zip(axes[0], reports, strict=True):
        found = report["jacobians"]
        layers = [each["layer"] for each in found]
        last = [each["tokens"][-1] for each in found]
        low, high = ([each[name] for each in last] for name in ("smallest", "largest"))
        if None not in low:
            panel.fill_between(layers, low, high, color=GRID, lw=0)
        names = ("largest", "median", "smallest")
        lines(panel, layers, {f"{name}, a token": [each[name] for each in last] for name in names})
        rows = [each["row_largest"] for each in found]
        panel.plot(layers, rows, color=INK, lw=1, ls="--", label="largest, the row")
        panel.axhline(1.0, color=INK, lw=0.8, ls=":")
        panel.set_xlabel("block", fontsize=9)
        whole_numbers(panel)
    finish(axes, ["singular values of d output / d input"])
    titled(axes, reports)
    legend(figure, axes[0, 0])
    return figure


def _training(reports: Sequence[Report], training: Sequence[Sequence[Report]]) -> Figure:
    figure, axes = grid(4, len(reports))
    for column, (report, measured) in enumerate(zip(reports, training, strict=True)):
        steps = [line["step"] for line in measured]
        kinds = list(report["histograms"])
        kind_of = {name: each["kind"] for name, each in report["tensors"].items()}
        for row, measure in enumerate(("grad_kurtosis", "update_ratio", "angle")):
            of_steps = [medians(line, kind_of, measure) for line in measured]
            series = {kind: [found.get(kind) for found in of_steps] for kind in kinds}
            lines(axes[row, column], steps, series)
        spreads = [spread_of(line.get("block_grad_rms") or []) for line in measured]
        lines(axes[3, column], steps, {"blocks": spreads})
        axes[3, column].set_xlabel("step", fontsize=9)
        for panel in axes[:, column]:
            whole_numbers(panel, 5)
    finish(
        axes,
        [
            "kurtosis of gradients",
            "|update| / |weights|",
            "rotation (radians)",
            "RMS spread of blocks",
        ],
    )
    titled(axes, reports)
    legend(figure, axes[0, 0])
    return figure


def medians(line: Report, kind_of: Mapping[str, str], measure: str) -> dict[str, float]:
    """Return the median of a measure over the tensors of each kind, where it is known."""
    values: dict[str, list[float]] = {}
    for name, each in line["tensors"].items():
        if each.get(measure) is not None and name in kind_of:
            values.setdefault(kind_of[name], []).append(each[measure])
    return {kind: float(np.median(own)) for kind, own in values.items()}


def spread_of(values: Sequence[float | None]) -> float | None:
    """Return the largest over the smallest; None where one is not known."""
    known = [value for value in values if value]
    return max(known) / min(known) if known and len(known) == len(values) else None


def whole_numbers(panel: Axes, most: int = 10) -> None:
    """Mark whole numbers only below a panel."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=most))

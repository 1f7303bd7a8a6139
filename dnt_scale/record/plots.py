"""Pictures of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dnt_scale.record.metrics_file import METRICS, unit_of, whole_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

RAW, TRAIN, VAL, INK, GRID = "#b9cdea", "#2a5caa", "#d1495b", "#333333", "#e4e4e4"
SMOOTH_SHARE = 0.015  # of the run, the widest half window of the smoothed line
LONG_RUN = 5000  # points; above it the first 2 % of the run may leave the picture
MAX_RAW_POINTS = 4000
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def plot_run(run_dir: Path, path: Path | None = None) -> Path:
    """Draw ``RUN/plots/loss.png``, or ``path``, from ``RUN/metrics.jsonl`` and return its path.

    Losses over what the rows are counted in, of text tokens (steps on the upper axis); below,
    learning rate, gradient norm and speed. The file is replaced in one piece. Raises ValueError
    when there is no loss to draw, OSError when a file cannot be read or written.
    """
    import matplotlib

    # a matplotlibrc of the user's, perhaps in the working folder, is for other plots
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        return _draw(run_dir, path or run_dir / "plots" / "loss.png")


def _draw(run_dir: Path, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = whole_lines(run_dir / METRICS)
    unit = unit_of(records)
    train, val = series(records, "train/loss", unit), series(records, "val/loss", unit)
    if not train[0].size and not val[0].size:
        raise ValueError(
            f"{run_dir / 'metrics.jsonl'} holds no loss yet: nothing to draw; train some steps "
            "first"
        )
    panels = [(*panel, series(records, panel[0], unit)) for panel in _panels(unit)]
    panels = [panel for panel in panels if panel[-1][0].size]

    width, height = (9, 6.6 if panels else 5)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2 if panels else 1,
        max(1, len(panels)),
        height_ratios=[3.2, 1] if panels else [1],
        # Margins in inches: a layout engine draws everything twice to find about the same places.
        left=0.75 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.75 / height,
        hspace=0.35,
        wspace=0.25,
    )
    axes = figure.add_subplot(grid[0, :])
    _draw_losses(axes, train, val, _last_validation(records))
    axes.set_xlabel(unit)
    axes.set_ylabel(f"loss (nats per {unit.removesuffix('s')})")
    _add_steps(axes, records, unit)
    axes.set_title(run_dir.absolute().name, fontsize=13, fontweight="bold", loc="left", color=INK)
    for column, (_, label, logarithmic, points) in enumerate(panels):
        below = figure.add_subplot(grid[1, column])
        _draw_panel(below, *points, label, logarithmic)
        below.set_xlabel(unit, fontsize=9)
        below.set_xlim(axes.get_xlim())

    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a picture as PNG, in one piece. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png", pil_kwargs={"compress_level": 3})
    beside.replace(path)
    return path


def _panels(unit: str) -> list[tuple[str, str, bool]]:
    """Return the small pictures: metric, label, whether it is logarithmic. Those that a run has not
    measured are left out.
    """
    return [
        ("val/top1", "validation top-1", False),
        ("lr", "learning rate", False),
        ("grad_norm", "gradient norm", True),
        (f"{unit}_per_s", f"speed ({unit}/s)", False),
    ]


def _last_validation(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the measures of the last validation beside its loss."""
    last: dict[str, Any] = next(
        (record for record in reversed(records) if record.get("val/loss") is not None), {}
    )
    names = [
        name
        for name in last
        if name.startswith("val/") and name.count("/") == 1 and name != "val/loss"
    ]
    return {
        name.removeprefix("val/").replace("_", " "): last[name]
        for name in names
        if last[name] is not None
    }


def series(records: list[dict[str, Any]], name: str, unit: str) -> tuple[Floats, Floats]:
    """Return the count of units and the value of one metric, where it was measured and finite."""
    pairs = [
        (r[unit], r[name]) for r in records if r.get(name) is not None and r.get(unit) is not None
    ]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(values: Floats, share: float = SMOOTH_SHARE) -> Floats:
    """A centred mean, which does not lag; its window grows with the step, since the loss falls
    fastest at first.
    """
    at = np.arange(values.size)
    half = np.minimum(values.size * share, at * 0.1).astype(np.int64)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, end = at - half, np.minimum(at + half + 1, values.size)
    found: Floats = (total[end] - total[first]) / (end - first)
    return found


def _draw_losses(
    axes: Axes, train: tuple[Floats, Floats], val: tuple[Floats, Floats], measures: dict[str, float]
) -> None:
    counts, losses = train
    seen = val[1]
    if counts.size:
        every = max(1, counts.size // MAX_RAW_POINTS)
        line = smooth(losses)
        axes.plot(counts[::every], losses[::every], color=RAW, lw=0.7, label="train, each step")
        axes.plot(counts, line, color=TRAIN, lw=1.8, label="train, smoothed")
        if counts.size > LONG_RUN:
            start = counts.size // 50
            line, seen = line[start:], seen[val[0] >= counts[start]]
        # From the smoothed line, so that a spike or two do not flatten everything else.
        seen = np.concatenate([seen, line])
    low, high = seen.min(), seen.max()
    room = max(0.01, 0.06 * (high - low))
    axes.set_ylim(low - room, high + room)
    if val[0].size:
        axes.plot(
            *val,
            color=VAL,
            lw=1.2,
            marker="o",
            ms=4 if val[0].size < 60 else 2,
            label="validation",
            zorder=3,
        )
        last_count, last = val[0][-1], val[1][-1]
        axes.annotate(
            "\n".join(
                [
                    f"validation {last:.3f}",
                    *(f"{name} {value:.4g}" for name, value in measures.items()),
                ]
            ),
            (last_count, last),
            xytext=(0, 44),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=VAL,
            fontsize=10,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": VAL, "lw": 0.8, "relpos": (1, 0), "shrinkB": 4},
        )
    axes.legend(frameon=False, loc="upper right")
    style(axes)


def _add_steps(axes: Axes, records: list[dict[str, Any]], unit: str) -> None:
    """Add a second scale for steps, where every step has the same number of units."""
    done = [(r["step"], r[unit]) for r in records if r.get("step") and r.get(unit)]
    if not done:
        return
    per_step = done[-1][1] / done[-1][0]
    if any(abs(counts - step * per_step) > per_step for step, counts in done):
        return

    def to_steps(counts: ArrayLike) -> Floats:
        steps: Floats = np.asarray(counts, dtype=np.float64) / per_step
        return steps

    def to_counts(steps: ArrayLike) -> Floats:
        counts: Floats = np.asarray(steps, dtype=np.float64) * per_step
        return counts

    upper = axes.secondary_xaxis("top", functions=(to_steps, to_counts))
    upper.set_xlabel("steps", color=INK)
    upper.tick_params(colors=INK, labelsize=9)
    upper.spines["top"].set_visible(False)


def _draw_panel(axes: Axes, counts: Floats, values: Floats, label: str, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    every = max(1, counts.size // MAX_RAW_POINTS)
    axes.plot(counts[::every], values[::every], color=TRAIN, lw=1)
    axes.set_title(label, fontsize=10, loc="left", color=INK)
    if logarithmic and (values > 0).all() and values.max() > 5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    style(axes)
    axes.tick_params(labelsize=8)


def style(axes: Axes) -> None:
    """Make axes look as all of ours do."""
    from matplotlib.ticker import FuncFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    if axes.get_yscale() == "linear" and axes.get_ylim()[1] >= 2000:
        axes.yaxis.set_major_formatter(FuncFormatter(short))


def short(value: float, _: object = None) -> str:
    """A number with a suffix: 1500000 is 1.5M."""
    for size, suffix in UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"

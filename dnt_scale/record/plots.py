"""Pictures of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

RAW, TRAIN, VAL, INK, GRID = "#b9cdea", "#2a5caa", "#d1495b", "#333333", "#e4e4e4"
SMOOTH_SHARE = 0.015  # of the run, the widest half window of the smoothed line
LONG_RUN = 5000  # points; above it the first 2 % of the run may leave the picture
MAX_RAW_POINTS = 4000
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
PANELS = (
    # metric, label, unit, logarithmic
    ("lr", "learning rate", "", False),
    ("grad_norm", "gradient norm", "", True),
    ("tokens_per_s", "speed", "tokens/s", False),
)


def plot_run(run_dir: Path) -> Path:
    """Draw ``RUN/plots/loss.png`` from ``RUN/metrics.jsonl`` and return its path.

    Losses in nats per token over tokens (steps on the upper axis); below, learning rate, gradient norm and speed.
    The file is replaced in one piece. Raises ValueError when there is no loss to draw, OSError when a file cannot be
    read or written.
    """
    import matplotlib

    with matplotlib.rc_context():  # a matplotlibrc of the user's, perhaps in the working folder, is for other plots
        matplotlib.rcdefaults()
        return _draw(run_dir)


def _draw(run_dir: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = _records(run_dir / "metrics.jsonl")
    train, val = _series(records, "train/loss"), _series(records, "val/loss")
    if not train[0].size and not val[0].size:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds no loss yet: nothing to draw; train some steps first")
    panels = [(*panel, _series(records, panel[0])) for panel in PANELS]
    panels = [panel for panel in panels if panel[-1][0].size]

    figure = Figure(figsize=(9, 6.6 if panels else 5), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if panels else 1, max(1, len(panels)), height_ratios=[3.2, 1] if panels else [1])
    axes = figure.add_subplot(grid[0, :])
    _draw_losses(axes, train, val)
    _add_steps(axes, records)
    axes.set_title(run_dir.absolute().name, fontsize=13, fontweight="bold", loc="left", color=INK)
    for column, (_, label, unit, logarithmic, (tokens, values)) in enumerate(panels):
        below = figure.add_subplot(grid[1, column])
        _draw_panel(below, tokens, values, label, unit, logarithmic)
        below.set_xlim(axes.get_xlim())

    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(".loss.png.tmp")
    figure.savefig(beside, format="png")
    beside.replace(path)
    return path


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(orjson.loads(line))
        except ValueError:  # a line that training is writing just now
            continue
    return records


def _series(records: list[dict[str, Any]], name: str) -> tuple[Floats, Floats]:
    """Tokens and values of one metric, where it was measured and finite."""
    pairs = [(r["tokens"], r[name]) for r in records if r.get(name) is not None and r.get("tokens") is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smooth(values: Floats) -> Floats:
    """A centred mean, which does not lag; its window grows with the step, since the loss falls fastest at first."""
    at = np.arange(values.size)
    half = np.minimum(values.size * SMOOTH_SHARE, at * 0.1).astype(np.int64)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, end = at - half, np.minimum(at + half + 1, values.size)
    smooth: Floats = (total[end] - total[first]) / (end - first)
    return smooth


def _draw_losses(axes: Axes, train: tuple[Floats, Floats], val: tuple[Floats, Floats]) -> None:
    tokens, losses = train
    seen = val[1]
    if tokens.size:
        every = max(1, tokens.size // MAX_RAW_POINTS)
        smooth = _smooth(losses)
        axes.plot(tokens[::every], losses[::every], color=RAW, lw=0.7, label="train, each step")
        axes.plot(tokens, smooth, color=TRAIN, lw=1.8, label="train, smoothed")
        if tokens.size > LONG_RUN:
            start = tokens.size // 50
            smooth, seen = smooth[start:], seen[val[0] >= tokens[start]]
        # From the smoothed line, so that a spike or two do not flatten everything else.
        seen = np.concatenate([seen, smooth])
    low, high = seen.min(), seen.max()
    room = max(0.01, 0.06 * (high - low))
    axes.set_ylim(low - room, high + room)
    if val[0].size:
        axes.plot(*val, color=VAL, lw=1.2, marker="o", ms=4 if val[0].size < 60 else 2, label="validation", zorder=3)
        last_tokens, last = val[0][-1], val[1][-1]
        axes.annotate(
            f"validation {last:.3f}\nperplexity {np.exp(min(last, 700.0)):.4g}",
            (last_tokens, last),
            xytext=(0, 44),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=VAL,
            fontsize=10,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": VAL, "lw": 0.8, "relpos": (1, 0), "shrinkB": 4},
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="upper right")
    _style(axes)


def _add_steps(axes: Axes, records: list[dict[str, Any]]) -> None:
    """A second scale for steps, where every step has the same number of tokens."""
    done = [(r["step"], r["tokens"]) for r in records if r.get("step") and r.get("tokens")]
    if not done:
        return
    per_step = done[-1][1] / done[-1][0]
    if any(abs(tokens - step * per_step) > per_step for step, tokens in done):
        return

    def to_steps(tokens: ArrayLike) -> Floats:
        steps: Floats = np.asarray(tokens, dtype=np.float64) / per_step
        return steps

    def to_tokens(steps: ArrayLike) -> Floats:
        tokens: Floats = np.asarray(steps, dtype=np.float64) * per_step
        return tokens

    upper = axes.secondary_xaxis("top", functions=(to_steps, to_tokens))
    upper.set_xlabel("steps", color=INK)
    upper.tick_params(colors=INK, labelsize=9)
    upper.spines["top"].set_visible(False)


def _draw_panel(axes: Axes, tokens: Floats, values: Floats, label: str, unit: str, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    every = max(1, tokens.size // MAX_RAW_POINTS)
    axes.plot(tokens[::every], values[::every], color=TRAIN, lw=1)
    axes.set_title(f"{label} ({unit})" if unit else label, fontsize=10, loc="left", color=INK)
    axes.set_xlabel("tokens", fontsize=9)
    if logarithmic and (values > 0).all() and values.max() > 5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    _style(axes)
    axes.tick_params(labelsize=8)


def _style(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    if axes.get_yscale() == "linear" and axes.get_ylim()[1] >= 2000:
        axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: object = None) -> str:
    """A number with a suffix: 1500000 is 1.5M."""
    for size, suffix in UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"

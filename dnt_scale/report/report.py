"""A report of runs: report.md, report.html, report.json and pictures, the same bytes for the same
runs."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dnt_scale.record.files import replace_file, write_json
from dnt_scale.record.plots import plot_run
from dnt_scale.report.figures import Line, draw_against, draw_curves
from dnt_scale.report.groups import Group, axis, grouped, label, short_names, text
from dnt_scale.report.runs import read_runs
from dnt_scale.report.sensitivity import TOLERANCE, sensitivity


@dataclass(frozen=True)
class Table:
    """Cells as text; numbers are the columns on the right."""

    headers: list[str]
    rows: list[list[str]]
    best: int | None  # the row of the lowest loss
    numbers: int  # how many columns, from the right


@dataclass(frozen=True)
class Report:
    title: str
    groups: list[Group]
    against: str | None  # the setting that losses are drawn against
    lines: list[Line]
    table: Table


def make_report(words: Sequence[str], against: str | None, title: str | None) -> Report:
    """Read runs and compare them.

    Raises:
        ConfigError: a run cannot be read, or ``against`` is no number that varies.
    """
    groups = grouped(read_runs(words))
    key = axis(groups, against)
    lines = against_setting(groups, key) if key else []
    name = title or ", ".join(Path(word).absolute().name for word in words)
    return Report(name, groups, key, lines, table_of(groups))


def against_setting(groups: Sequence[Group], key: str) -> list[Line]:
    """Return the final losses against a setting, a line for each combination of the others."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        others = {name: value for name, value in group.values.items() if name != key}
        found.setdefault(label(others), []).append(group)
    return [_line(name, each, key) for name, each in found.items()]


def _line(name: str, groups: Sequence[Group], key: str) -> Line:
    # A value of which runs were only stopped tells nothing; one of which a run failed tells enough.
    known = sorted(
        (group for group in groups if group.losses or group.failed),
        key=lambda group: float(str(group.values[key])),
    )
    values = [float(str(group.values[key])) for group in known]
    nan = math.nan
    mean = [nan if group.mean is None else group.mean for group in known]
    judged = [math.inf if group.failed else mean[at] for at, group in enumerate(known)]
    positive = all(value > 0 for value in values)
    return Line(
        name=name,
        values=values,
        mean=mean,
        low=[min(group.losses, default=nan) for group in known],
        high=[max(group.losses, default=nan) for group in known],
        failed=[bool(group.failed) for group in known],
        width=sensitivity(values, judged) if positive and len(values) > 1 else None,
    )


def table_of(groups: Sequence[Group]) -> Table:
    """Return the groups with what they led to."""
    names = short_names(list(groups[0].values))
    unit = groups[0].runs[0].unit
    rows = []
    for group in groups:
        whole, all_ = len(group.losses), len(group.runs)
        count = f"{all_}" if whole == all_ else f"{whole} of {all_}"
        if group.failed:
            count += f", {group.failed} failed"
        mean = "-" if group.mean is None else f"{group.mean:.4f}"
        spread = f"{min(group.losses):.4f} to {max(group.losses):.4f}" if whole > 1 else "-"
        rows.append(
            [
                *([text(value) for value in group.values.values()] or [group.runs[0].name]),
                count,
                mean,
                spread,
                f"{max(run.units for run in group.runs):,}",
                f"{statistics.fmean(run.seconds for run in group.runs):.1f}",
            ]
        )
    means = [math.inf if group.mean is None else group.mean for group in groups]
    best = means.index(min(means)) if min(means) < math.inf else None
    headers = [*(names.values() or ["run"]), "seeds", "final val/loss", "range", unit, "seconds"]
    return Table(headers, rows, best if len(rows) > 1 else None, 5)


def width_sentences(report: Report) -> list[str]:
    """Return what is to be said of each line's sensitivity."""
    said = []
    for line in report.lines:
        if (width := line.width) is None:
            continue
        ends = [
            name for name, cut in (("lowest", width.low_cut), ("highest", width.high_cut)) if cut
        ]
        cut = f"; the {' and the '.join(ends)} value tried cuts it off" if ends else ""
        said.append(
            f"{line.name + ': ' if line.name else ''}best at {text(width.best)} "
            f"({width.loss:.4f}); within {TOLERANCE:g} nats from {width.low:.3g} to "
            f"{width.high:.3g}, a factor of {width.words.replace('x ', '')}{cut}"
        )
    return said


# --- written --------------------------------------------------------------------------------------


def write_report(report: Report, out: Path) -> list[Path]:
    """Write the report's files into ``out``, which is made, and return their paths.

    Raises:
        OSError: one cannot be written.
    """
    import matplotlib

    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        runs = [run for group in report.groups for run in group.runs]
        if len(runs) == 1:
            pictures["Loss"] = plot_run(runs[0].folder, out / "loss.png")
        else:
            pictures["Loss"] = draw_curves(report.groups, report.title, out / "loss.png")
        if report.against and any(len(line.values) > 1 for line in report.lines):
            unit = runs[0].unit
            pictures[f"Final loss against {report.against}"] = draw_against(
                report.lines, report.against, unit, report.title, out / "against.png"
            )
    files = [out / name for name in ("report.md", "report.html", "report.json")]
    replace_file(files[0], markdown(report, pictures).encode())
    replace_file(files[1], html(report, pictures).encode())
    write_json(files[2], as_data(report))
    return [*files, *pictures.values()]


def markdown(report: Report, pictures: dict[str, Path]) -> str:
    table = report.table
    lines = [f"# {report.title}", ""]
    for name, path in pictures.items():
        lines += [f"![{name}]({path.name})", ""]
    lines += [f"- {sentence}" for sentence in width_sentences(report)] + [""] * bool(report.lines)
    rule = ["---"] * (len(table.headers) - table.numbers) + ["---:"] * table.numbers
    cells = [
        [f"**{cell}**" if number == table.best else cell for cell in row]
        for number, row in enumerate(table.rows)
    ]
    lines += ["| " + " | ".join(row) + " |" for row in [table.headers, rule, *cells]]
    return "\n".join(lines) + "\n"


def html(report: Report, pictures: dict[str, Path]) -> str:
    """Return the page, with its pictures inside."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    inside = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    return templates.get_template("page.html.j2").render(
        report=report, pictures=inside, sentences=width_sentences(report)
    )


def as_data(report: Report) -> dict[str, Any]:
    """Return all numbers of the report; what is not finite is null."""
    return {
        "title": report.title,
        "groups": [
            {
                "settings": group.values,
                "mean": group.mean,
                "min": min(group.losses, default=None),
                "max": max(group.losses, default=None),
                "std": statistics.stdev(group.losses) if len(group.losses) > 1 else None,
                "runs": [
                    {
                        "folder": str(run.folder),
                        "seed": run.settings.get("run.seed"),
                        "state": run.state,
                        "loss": run.loss,
                        "steps": run.steps,
                        run.unit: run.units,
                        "seconds": round(run.seconds, 3),
                    }
                    for run in group.runs
                ],
            }
            for group in report.groups
        ],
        "against": report.against,
        "tolerance": TOLERANCE,
        "lines": [
            {
                **asdict(line),
                "width": line.width and {**asdict(line.width), "factor": line.width.factor},
            }
            for line in report.lines
        ],
    }

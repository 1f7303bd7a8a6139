"""What a run is going to do, stage by stage, as a table: `dnt train --print-plan`."""

from pathlib import Path

from rich.table import Table

from dnt_scale.config import RunConfig
from dnt_scale.train.recorded import rates
from dnt_scale.train.stages import Stage, Stages


def stage_table(run: RunConfig, stages: Stages) -> Table:
    """Return a line for each stage: its steps (from 1), its units, what it reads, the rows of a
    step and what each counts, and the learning rate from its first to its last step.
    """
    unit = stages.source.unit.name
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", overflow="fold")
    for name in ("steps", unit):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("data", overflow="fold")
    for name in (f"rows x {unit}", "learning rate"):
        table.add_column(name, justify="right", no_wrap=True)
    units = stages.a_rows
    before: Stage | None = None
    for number, stage in enumerate(stages, 1):
        span = stage.span
        same = before is not None and stage.source is before.source
        first, last = (f"{rates(run, step, *units)['']:.4g}" for step in (span.begin, span.end - 1))
        table.add_row(
            f"{number} {span.name}".strip(),
            f"{span.begin + 1:,} - {span.end:,}",
            f"{span.units_at(span.end) - span.units:,}",
            "as before" if same else "\n".join(_sets(stage)),
            f"{span.global_batch:,} x {span.a_row:,}",
            first if first == last else f"{first} to {last}",
        )
        before = stage
    return table


def _sets(stage: Stage) -> list[str]:
    """Return a line on each set that a stage reads."""
    if mixed := [found for found in stage.run.data.sets() if found.name]:
        return [f"{found.weight:.3g} {found.name} {_near(found.path)}" for found in mixed]
    return [_near(part.place) for part in stage.source.parts()]


def _near(place: Path | str) -> str:
    """Return a path as it is written from the working folder, where it lies below."""
    if isinstance(place, Path) and place.is_relative_to(Path.cwd()):
        return str(place.relative_to(Path.cwd()))
    return str(place)

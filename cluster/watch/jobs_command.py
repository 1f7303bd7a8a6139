"""`dnt jobs`: all runs and what they are doing, or one run and the chain of its attempts."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster import run_record, sweep_jobs
from cluster.run_record import RecordError
from cluster.watch import run_state
from cluster.watch.find_runs import RUNS, find_runs, short_name
from cluster.watch.run_state import RunStatus, SlurmQuery
from data_prep.words import clock
from dnt_scale import config
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.record.goodput import Goodput, breakdown, table
from dnt_scale.record.metrics_file import last_metrics, unit_of
from dnt_scale.record.timeline import Event
from dnt_scale.sweep.sweep_file import Sweep, read_sweep

WATCH_EVERY_S = 2.0
SPEED_STEPS = 20
# Until then a job's own last processes may still be telling MLflow.
QUIET_S = 60.0
COLOURS = {
    "running": "green",
    "finished": "cyan",
    "crashed": "red",
    "refused": "red",
    "killed": "red",
}


# --- what there is to say of a run ----------------------------------------------------------------


@dataclass(frozen=True)
class AttemptView:
    name: str  # JOB.RESTART; of a job that has not started, JOB
    nodes: list[str]
    began: float | None  # seconds since 1970
    state: str  # how it ended, else what it is doing
    why: str
    next: str  # requeued, resubmitted, none; "": it has not ended
    blamed: list[str]


@dataclass(frozen=True)
class RunSummary:
    """A run as `dnt jobs` shows it. None: not known."""

    folder: Path
    name: str
    state: str
    why: str
    nodes: str
    live: bool
    jobs: list[str] = field(default_factory=list)
    step: int | None = None
    total_steps: int | None = None
    checkpoint: int | None = None  # the step of the newest
    loss: float | None = None
    val_loss: float | None = None
    unit: str = "tokens"  # what its data are counted in
    units_per_s: float | None = None
    left_s: float | None = None  # at the pace of the last steps, while it runs
    goodput: float | None = None
    # Where the time went, see dnt_scale.record.goodput.
    seconds: dict[str, float] = field(default_factory=dict)
    mlflow: str | None = None  # the status it was told last
    left_out: list[str] = field(default_factory=list)  # nodes that failed too often
    attempts: list[AttemptView] = field(default_factory=list)


@dataclass(frozen=True)
class RunView:
    run: RunSummary
    status: RunStatus
    goodput: Goodput
    last_event: float  # when the timeline last said something


def read_view(run_dir: Path, query: SlurmQuery) -> RunView:
    """Find out all about a run. Raises RecordError where its run.json cannot be read."""
    submission = run_record.read_submission(run_dir, of_any_owner=True)
    found, events = run_state.read_status(run_dir, submission, query)
    spent = breakdown(events, time.time())
    lines = last_metrics(run_dir)
    steps = [line for line in lines if "train/loss" in line]
    unit = unit_of(lines)
    speeds = [line[f"{unit}_per_s"] for line in steps[-SPEED_STEPS:]]
    resolved = read_config(run_dir)
    told = max((event["time"] for event in events), default=0.0)
    total = total_steps(resolved, lines, events)
    run = RunSummary(
        folder=run_dir,
        name=submission.name,
        state=found.state,
        why=found.why,
        nodes=found.nodes,
        live=found.live,
        jobs=submission.jobs,
        step=lines[-1]["step"] if lines else None,
        total_steps=total,
        checkpoint=run_record.newest_checkpoint(submission),
        loss=steps[-1]["train/loss"] if steps else None,
        val_loss=next((line["val/loss"] for line in reversed(lines) if "val/loss" in line), None),
        unit=unit,
        units_per_s=median(speeds) if speeds else None,
        left_s=seconds_left(steps, total, unit, events)
        if found.state == "running" and time.time() - told < run_state.SILENT_S
        else None,
        goodput=spent.total.goodput if spent.total.training else None,
        seconds={"queued": spent.queue, **asdict(spent.total)},
        mlflow=run_state.read_mlflow_status(run_dir),
        left_out=submission.excluded,
        attempts=list_attempts(events, found, submission.jobs),
    )
    return RunView(run, found, spent, told)


def list_attempts(events: list[Event], found: RunStatus, jobs: list[str]) -> list[AttemptView]:
    """Return each start of each job, oldest first, and the job that waits for its first or next
    one."""
    chain: dict[str, AttemptView] = {}
    for event in events:
        name = event["attempt"]
        if event["event"] == "allocated":
            now = (found.state, found.why) if name == found.attempt else ("ending", "")
            chain[name] = AttemptView(name, event["nodes"], event["started"], *now, "", [])
        elif event["event"] == "ended":
            nodes, began = (chain[name].nodes, chain[name].began) if name in chain else ([], None)
            chain[name] = AttemptView(
                name, nodes, began, event["status"], event["reason"], event["next"], event["blamed"]
            )
    if found.live and jobs and (found.attempt not in chain or chain[found.attempt].next):
        name = jobs[-1] if found.attempt in chain else found.attempt or jobs[-1]
        nodes = [found.nodes] if found.nodes else []
        chain["now"] = AttemptView(name, nodes, None, found.state, found.why, "", [])
    return list(chain.values())


def read_config(run_dir: Path) -> RunConfig | None:
    """Read the run's configuration; None where this version of dnt, or this user, cannot read
    it."""
    try:
        return config.from_yaml(run_record.config_file(run_dir))
    except (ConfigError, OSError):
        return None


def total_steps(
    run: RunConfig | None,
    lines: list[dict[str, Any]],
    events: list[Event] = [],  # noqa: B006
) -> int | None:
    """Return how many steps the run is to have; None before the first where its configuration gives
    tokens."""
    if run is None:
        return None
    if run.train.steps is not None:
        return run.train.steps
    ready = run_record.last_event(events, "ready")
    if ready and "of" in ready:
        return int(ready["of"]["step"])
    unit = unit_of(lines)
    a_step = next((line[unit] / line["step"] for line in reversed(lines) if line["step"]), None)
    if a_step is None or run.train.stages:
        return None
    return run.total_steps(round(a_step / run.train.global_batch))


def seconds_left(
    steps: list[dict[str, Any]], total: int | None, unit: str, events: list[Event]
) -> float | None:
    """Return the seconds left at the mean pace of the newest attempt's last steps, validations and
    checkpoints included: in units, for stages of a run differ in what a step is."""
    ready = run_record.last_event(events, "ready")
    paced = [line for line in steps if ready and line["time"] >= ready["time"]]
    if total is None or ready is None or len(paced) < 2:
        return None
    first, last = paced[0], paced[-1]
    of = ready.get("of", {"step": total})  # of an older dnt it tells no units
    of = of if of["step"] == total else {"step": total}
    count = unit if unit in of else "step"
    return float(
        (of[count] - last[count]) * (last["time"] - first["time"]) / (last[count] - first[count])
    )


# --- shown ----------------------------------------------------------------------------------------


def main(words: list[str], *, watch: bool, as_json: bool) -> int:
    """Run `dnt jobs` and return the exit status.

    Raises:
        RecordError: there is no such run.
    """
    console = Console(highlight=False)
    if watch:
        return watch_runs(words, console)
    views, problems = read_views(words)
    if as_json:
        content = {"runs": [asdict(each.run) for each in views], "problems": problems}
        sys.stdout.buffer.write(
            orjson.dumps(content, default=str, option=orjson.OPT_INDENT_2) + b"\n"
        )
    else:
        console.print(format_page(views, problems, words))
    correct_mlflow(views, set())
    return 0


def watch_runs(words: list[str], console: Console) -> int:
    """Show the page anew every two seconds until Ctrl-C."""
    mended: set[tuple[Path, str]] = set()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            views, problems = read_views(words)
            clock = Text(f"{datetime.now():%H:%M:%S}; Ctrl-C ends this", style="dim")
            shown = Group(format_page(views, problems, words), clock)
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:  # a pipe: one page after another
                console.print(shown)
            correct_mlflow(views, mended)
            time.sleep(WATCH_EVERY_S)
    return 0


def read_views(words: list[str]) -> tuple[list[RunView], list[str]]:
    """Return the runs, live ones first, then the newest; and what kept us from knowing more, a line
    each."""
    query, views, problems = SlurmQuery(), [], []
    for run_dir in find_runs(words):
        try:
            views.append(read_view(run_dir, query))
        except RecordError as error:  # one damaged run hides no other
            problems.append(str(error))
    if query.problem:
        problems.append(f"only the run folders were asked, whose word may be old: {query.problem}")
    return sorted(views, key=lambda each: (not each.run.live, -each.last_event)), problems


def correct_mlflow(views: list[RunView], tried: set[tuple[Path, str]]) -> None:
    """Let MLflow have the true status of runs where nothing goes on, up to the first where it does
    not answer."""
    for each in views:
        key = (each.run.folder, each.run.state)
        if key not in tried and time.time() - each.last_event > QUIET_S:
            tried.add(key)
            if not run_state.correct_mlflow(each.run.folder, each.status):
                return
    for folder in sweep_jobs.sweeps_of(
        each.run.folder for each in views if run_state.is_ours(each.run.folder)
    ):
        over = (folder, sweep_jobs.outcome(folder) or "")
        if over[1] and over not in tried:
            tried.add(over)
            sweep_jobs.finalize_sweep(folder)


def format_page(views: list[RunView], problems: list[str], words: list[str]) -> Group:
    parts: list[Table | Text] = []
    if len(views) == 1 and words:
        parts += format_one_run(views[0])
    elif views:
        parts.append(format_all_runs(views))
        if words:
            parts += format_results([each.run for each in views])
    elif not problems:
        parts.append(Text(f"no run in {RUNS.absolute()} was submitted; `dnt submit` does"))
    parts += [Text(problem, style="yellow") for problem in problems]
    return Group(*parts)


def format_all_runs(views: list[RunView]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("run", no_wrap=True)
    for name in ("state", "job"):
        shown.add_column(name, overflow="fold")
    units = {each.run.unit for each in views}
    speed = f"{units.pop()}/s" if len(units) == 1 else "speed"
    for name in ("step", "loss", speed, "goodput"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in views:
        run = each.run
        shown.add_row(
            short_name(run.folder),
            format_state(run.state if run.state == "finished" else each.status.text, run.state),
            (run.jobs[-1] if run.jobs else "") + format_starts(run),
            "\n".join(part for part in (format_steps(run), format_time_left(run)) if part),
            format_number(run.loss, ".4f"),
            format_rate(run.units_per_s) if speed != "speed" else format_speed(run),
            format_number(run.goodput, ".1%"),
        )
    return shown


def format_one_run(view: RunView) -> list[Table | Text]:
    run = view.run
    first = Text(f"{run.name}: ").append_text(format_state(view.status.text, run.state))
    facts = [
        f"step {format_steps(run)}" if run.step is not None else "no step yet",
        f"loss {run.loss:.4f}" if run.loss is not None else "",
        format_speed(run),
        format_time_left(run),
        f"newest checkpoint {run.checkpoint:,}" if run.checkpoint is not None else "",
        f"MLflow {run.mlflow}" if run.mlflow else "",
    ]
    line = ", ".join(fact.replace(" ", "\u00a0") for fact in facts if fact)  # wraps between facts
    lines: list[Table | Text] = [Text(line), Text()]
    if run.attempts:
        lines += [format_attempts(run.attempts), Text()]
    if view.goodput.attempts:
        lines += [table(view.goodput), Text()]
    if run.left_out:
        lines.append(Text(f"left out, for they failed too often: {' '.join(run.left_out)}"))
    if not run.live and run.state != "finished":
        lines.append(Text(f"`dnt resubmit {short_name(run.folder)}` goes on with it"))
    lines.append(
        Text(f"logs: `dnt logs {short_name(run.folder)}`, of rank K with --rank K", style="dim")
    )
    return [first, *lines]


def format_attempts(found: list[AttemptView]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("attempt", "nodes", "began", "state", "next", "at fault"):
        shown.add_column(name, overflow="fold")
    for attempt in found:
        shown.add_row(
            attempt.name,
            " ".join(attempt.nodes),
            f"{datetime.fromtimestamp(attempt.began):%m-%d %H:%M:%S}" if attempt.began else "-",
            format_state(
                attempt.state + (f": {attempt.why}" if attempt.why else ""), attempt.state
            ),
            {"none": "-"}.get(attempt.next, attempt.next),
            " ".join(attempt.blamed),
        )
    return shown


def format_state(words: str, state: str) -> Text:
    """Return words that begin with a state, in its colour."""
    text = Text(words)
    text.stylize(COLOURS.get(state, ""), 0, len(state))
    return text


def format_starts(run: RunSummary) -> str:
    count = sum(attempt.began is not None for attempt in run.attempts)
    return f"\n{count} starts" if count > 1 else ""


def format_steps(run: RunSummary) -> str:
    if run.step is None:
        return "-"
    if not run.total_steps:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.total_steps:,} ({run.step / run.total_steps:.0%})"


def format_time_left(run: RunSummary) -> str:
    return "" if run.left_s is None else f"{clock(run.left_s)} left"


def format_number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def format_rate(value: float | None) -> str:
    """Return a number in three digits: 950, 12.3k, 1.20M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value is not None and value >= size:
            return f"{value / size:.3g}{unit}"
    return format_number(value, ".0f")


def format_speed(run: RunSummary) -> str:
    return "" if run.units_per_s is None else f"{format_rate(run.units_per_s)} {run.unit}/s"


def format_results(runs: Sequence[RunSummary]) -> list[Table]:
    """Return for each sweep among the runs what its values led to so far, the lowest validation
    loss first.

    Raises:
        ConfigError: a sweep.json cannot be read.
    """
    found = sweep_jobs.sweeps_of(run.folder for run in runs)
    return [
        _format_sweep(read_sweep(folder), [run for run in runs if run.folder.parent == folder])
        for folder in found
    ]


def _format_sweep(sweep: Sweep, runs: Sequence[RunSummary]) -> Table:
    values = {run.name: run.values for run in sweep.runs}
    fields = list(sweep.runs[0].values)
    table = Table(
        title=f"\n{sweep.name}, lowest val/loss first",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("run", *fields):
        table.add_column(name, overflow="fold")
    for name in ("step", "train/loss", "val/loss"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state")
    for run in sorted(runs, key=lambda run: (run.val_loss is None, run.val_loss or 0.0)):
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (run.loss, run.val_loss))
        step = "-" if run.step is None else f"{run.step:,}"
        table.add_row(
            run.name, *(values[run.name][field] for field in fields), step, *losses, run.state
        )
    return table

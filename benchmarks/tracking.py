"""What tracking costs a training loop, and how soon all of it is in MLflow: on SQLite, PostgreSQL
and a server.

    python -m benchmarks.tracking
    python -m benchmarks.tracking --stores sqlite --steps 2000

A step is --step-ms milliseconds of matrix products on one thread, so another core is free, as on
any node with GPUs. A real MLflow store takes --metrics metrics of each. Every tenth of a second,
steps that are logged take turns with the same steps that are not, during which the sender is
stopped (SIGSTOP): --steps of either. The cost is the median over blocks of four seconds of logged /
not logged - 1, with its standard error, once by the clock and once by the loop's own CPU time,
which a machine that is busy with other things disturbs less. Beside it, the seconds spent in
Tracker.log as a share of steps of 50 ms.

A sample of system metrics, which another thread takes every ten seconds, is measured on its own.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import torch
from rich.console import Console
from rich.table import Table

from dnt_scale.record import system_metrics
from dnt_scale.record.files import git_commit
from dnt_scale.record.sender_files import unsent_lines
from dnt_scale.record.tracker import Tracker
from testbed.ports import free_port
from testbed.stores import (
    mlflow_server,
    no_postgres,
    points,
    postgres,
    sqlite_store,
)

STORES = ("sqlite", "postgresql", "server")
STEP_S = 0.05  # of a small model on one GPU
TURN_S = 0.1
BLOCK_S = 2.0  # of either kind: some rounds of the sender
WANTED = 0.01  # of the loop, at most
ARRIVES_IN_S = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--metrics", type=int, default=20)
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/tracking-DEVICE.json)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = f"{os.cpu_count()}-core CPU"
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": device,
        "mlflow": mlflow.__version__,
        "steps": options.steps,
        "metrics": options.metrics,
        "step_ms": options.step_ms,
        "load_before": os.getloadavg()[0],
        "stores": [],
    }
    for name in options.stores:
        if name == "postgresql" and (why := no_postgres()):
            print(f"PostgreSQL left out: {why}")
            continue
        with tempfile.TemporaryDirectory() as folder, store(name, Path(folder)) as (uri, login):
            os.environ |= login
            result["stores"].append(
                {"store": name, **measured(Path(folder) / "runs" / name, uri, options)}
            )
    result["system_sample_ms"] = system_sample_ms()
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"tracking-{device.replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


@contextlib.contextmanager
def store(name: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A new store's URI, and the variables with its login."""
    if name == "postgresql":
        with postgres() as found:
            yield found
        return
    uri = sqlite_store(folder / "mlflow.db")
    if name == "sqlite":
        yield uri, {}
        return
    with mlflow_server(uri, folder / "artifacts", free_port()) as server:
        yield server, {}


def step_of(seconds: float) -> Any:
    """A function that takes about ``seconds`` of one thread."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)

    def products(number: int) -> float:
        started = time.perf_counter()
        for _ in range(number):
            torch.mm(a, b)
        return time.perf_counter() - started

    products(100)
    number = max(1, round(100 * seconds / statistics.median(products(100) for _ in range(20))))
    return lambda: products(number)


def measured(run_dir: Path, uri: str, options: argparse.Namespace) -> dict[str, Any]:
    step_work = step_of(options.step_ms / 1000)
    values = {f"metric/{number}": 1.0 / (number + 3) for number in range(options.metrics)}
    tracker = Tracker.start(
        run_dir,
        uri=uri,
        experiment="benchmark",
        run_name=run_dir.name,
        run_id=run_dir.name,
        params={},
        tags={},
        enabled=True,
        resume_step=0,
    )
    sender = tracker.senders[0].process
    assert sender is not None
    turn, block = (max(1, round(length / (options.step_ms / 1000))) for length in (TURN_S, BLOCK_S))
    # wall and CPU seconds of each block
    spent: dict[bool, list[list[float]]] = {True: [], False: []}
    in_log: list[float] = []
    order = [True, False]
    for first in range(1, options.steps + 1, turn):
        steps = range(first, min(first + turn, options.steps + 1))
        if (first - 1) // turn % (block // turn) == 0:
            spent[True].append([0.0, 0.0])
            spent[False].append([0.0, 0.0])
        for logged in order:
            sender.send_signal(signal.SIGCONT if logged else signal.SIGSTOP)
            wall, cpu = time.perf_counter(), time.thread_time()
            for step in steps:
                step_work()
                if logged:
                    before = time.perf_counter()
                    tracker.log({"step": step, "time": time.time(), **values})
                    in_log.append(time.perf_counter() - before)
            spent[logged][-1][0] += time.perf_counter() - wall
            spent[logged][-1][1] += time.thread_time() - cpu
        order.reverse()  # whoever went second goes first
    sender.send_signal(signal.SIGCONT)
    behind = unsent_lines(run_dir)
    ended = time.perf_counter()
    tracker.finish("FINISHED", ARRIVES_IN_S)
    arrived = time.perf_counter() - ended
    check(uri, run_dir.name, values, options.steps)
    wall_ratios, cpu_ratios = (
        [on[clock] / off[clock] for on, off in zip(spent[True], spent[False], strict=True)]
        for clock in (0, 1)
    )
    return {
        "step_ms": 1000 * sum(wall for wall, _ in spent[False]) / options.steps,
        "cost_by_clock": statistics.median(wall_ratios) - 1,
        "cost_by_clock_error": error_of_median(wall_ratios),
        "cost_by_cpu_time": statistics.median(cpu_ratios) - 1,
        "cost_by_cpu_time_error": error_of_median(cpu_ratios),
        "blocks": len(wall_ratios),
        "log_us_median": 1e6 * statistics.median(in_log),
        "log_us_mean": 1e6 * statistics.mean(in_log),
        "log_us_longest": 1e6 * max(in_log),
        "log_of_a_50_ms_step": statistics.mean(in_log) / STEP_S,
        "steps_behind_at_the_end": behind,
        "all_arrived_after_s": arrived,
    }


def error_of_median(values: list[float]) -> float:
    """The standard error of the median of values that scatter normally but for a few; NaN of
    fewer than two.
    """
    if len(values) < 2:
        return math.nan
    low, _, high = statistics.quantiles(values, n=4)
    return 1.253 * (high - low) / 1.349 / math.sqrt(len(values))


def check(uri: str, run: str, values: dict[str, float], steps: int) -> None:
    """Each metric has each step once, in order, with its value."""
    for name, value in values.items():
        found = points(uri, run, name)
        assert len(found) == steps and found[0] == (1, value), f"{name}: {len(found)} points"
        assert all(
            after[0] == before[0] + 1 and after[1] == value for before, after in pairwise(found)
        ), name


def system_sample_ms() -> float:
    """One sample of this host, with the line written: median milliseconds of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "logs", "system", "node.jsonl")
        taken = []
        for number in range(100):
            started = time.perf_counter()
            system_metrics._append(file, number, system_metrics._host(Path(folder)))
            taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['device']}, MLflow {result['mlflow']}, {result['date']}, {result['commit'][:12]}"
    )
    table = Table(title=f"{title}: {result['steps']:,} steps of {result['metrics']} metrics")
    columns = (
        "store",
        "step ms",
        "cost by clock",
        "by CPU time",
        "wanted",
        "log() us",
        "of 50 ms",
        "behind",
        "all in s",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["stores"]:
        table.add_row(
            row["store"],
            f"{row['step_ms']:.1f}",
            f"{row['cost_by_clock']:+.2%} ± {row['cost_by_clock_error']:.2%}",
            f"{row['cost_by_cpu_time']:+.2%} ± {row['cost_by_cpu_time_error']:.2%}",
            f"< {WANTED:.0%}",
            f"{row['log_us_median']:.1f}",
            f"{row['log_of_a_50_ms_step']:.3%}",
            f"{row['steps_behind_at_the_end']:,}",
            f"{row['all_arrived_after_s']:.1f}",
        )
    Console(width=110).print(table)
    print(f"a sample of system metrics: {result['system_sample_ms']:.2f} ms, every ten seconds")


if __name__ == "__main__":
    main()

"""What a save costs: its bandwidth beside `dd` with fsync, and the steps it runs beside, against
steps without one.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --model dnt_124m --mb 2000 --folder /scratch

Bandwidth: `dd if=/dev/zero bs=8M conv=fsync` of --mb megabytes and saves of as many, by 1 and by 2
ranks, take turns in the same folder; medians. A save is timed from the call until the checkpoint is
in place on all ranks, its files fsynced and hashed; "verified" saves also read back from the disk
and compare, as every save of a run does. The first save also allocates its host memory.

Steps: a real training, on 1 and on 2 ranks, saves every --every steps in the background. A step
lasts from one line of metrics.jsonl to the next, the copy into host memory included; those that a
save covers by half at least are "during".
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dnt_scale.checkpoint import Saver, State
from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.distributed import process_group
from dnt_scale.record.files import git_commit
from testbed.run import synthetic_set

WARM_UP_STEPS = 4
WANTED_BANDWIDTH = 0.7  # of dd's, at least
WANTED_STEP = 1.3  # of a normal step, at most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the temporary folder's)"
    )
    parser.add_argument("--mb", type=int, default=800, help="megabytes of a save beside dd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--model", default="dnt_124m", help="trained on rows of 64 tokens of a small vocabulary"
    )
    parser.add_argument("--layers", type=int, default=6, help="of that model")
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--every", type=int, default=16, help="steps between saves")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: benchmarks/results/checkpoint-DEVICE.json)",
    )
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        save_in_turns_with_dd(options.folder, options.mb * 1_000_000, options.rounds)
        return

    device = (
        torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()}-core CPU"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        data = synthetic_set(Path(name, "set"))
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "commit": git_commit(),
            "device": device,
            "torch": torch.__version__,
            "mb": options.mb,
            "model": f"{options.model}, {options.layers} layers",
            "bandwidth": [bandwidth(Path(name, f"saves-{n}"), n, options) for n in (1, 2)],
            "steps": [steps(Path(name, f"run-{n}"), n, data, options) for n in (1, 2)],
        }
    show(result)
    out = (
        options.out
        or Path(__file__).parent / "results" / f"checkpoint-{device.replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def on_ranks(number: int, *command: str) -> str:
    """The output of `python -m COMMAND` on ranks that share the cores."""
    threads = max(1, (os.cpu_count() or 1) // number)
    launch = [
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={number}",
        "--standalone",
        "-m",
        *command,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(
        [sys.executable, *launch], check=True, stdout=subprocess.PIPE, text=True, env=env
    ).stdout


def bandwidth(folder: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the seconds that dd and saves by ``number`` ranks take."""
    folder.mkdir()
    measured = (
        "--as-rank",
        "--folder",
        str(folder),
        "--mb",
        str(options.mb),
        "--rounds",
        str(options.rounds),
    )
    found: dict[str, list[float]] = json.loads(on_ranks(number, "benchmarks.checkpoint", *measured))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {"ranks": number, **medians, "of_dd": medians["dd"] / medians["save"], "all": found}


class Unverified(Saver):
    """Leaves out reading back, to be compared with dd."""

    def _read_back(self, *arguments: object) -> None:
        pass


def save_in_turns_with_dd(folder: Path, size: int, rounds: int) -> None:
    """On every rank; rank 0 prints the seconds of each save and each dd."""
    ranks = process_group.start()
    shape = (size // 4 // 16 // 4096, 4096)
    share = shape[0] // ranks.world_size
    shards = [
        TensorShard(
            f"model.{n}",
            shape,
            (ranks.rank * share, 0),
            torch.randn(share, shape[1], device=ranks.device),
        )
        for n in range(16)
    ]
    seconds: dict[str, list[float]] = {"dd": [], "first": [], "save": [], "verified": []}
    savers = {
        False: Unverified(folder / "False", ranks, keep=9),
        True: Saver(folder / "True", ranks, keep=9, background=False),
    }
    for number in range(rounds + 1):
        if ranks.first and number:
            seconds["dd"].append(dd(folder / "dd", size))
        for verified, saver in savers.items():
            dist.barrier()
            started = time.perf_counter()
            saver.save(state_of(number, ranks.world_size), shards)
            saver.commit(wait=True)
            taken = time.perf_counter() - started
            if ranks.first:
                shutil.rmtree(folder / str(verified) / f"step-{number:08d}")
            if number or not verified:
                seconds["verified" if verified else "save" if number else "first"].append(taken)
    if ranks.first:
        print(json.dumps(seconds))
    process_group.stop()


def state_of(step: int, world_size: int) -> State:
    return State(
        step=step,
        consumed_rows=0,
        tokens=0,
        skipped=0,
        seed=0,
        run_id="",
        manifest_sha256="",
        tokenizer_sha256="",
        world_size=world_size,
        config={},
        files={},
    )


def dd(file: Path, size: int) -> float:
    command = [
        "dd",
        "if=/dev/zero",
        f"of={file}",
        "bs=8M",
        f"count={size}",
        "iflag=count_bytes",
        "conv=fsync",
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    taken = time.perf_counter() - started
    file.unlink()
    return taken


def steps(run_dir: Path, number: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the steps of a training that saves in the background."""
    overrides = [
        f"model={options.model}",
        f"model.layers={options.layers}",
        "model.vocab_size=512",
        "model.context=64",
        f"data.path={data}",
        "run.name=saving",
        f"run.dir={run_dir}",
        f"train.steps={options.steps}",
        f"train.global_batch={options.rows * number}",
        f"train.micro_batch={options.rows}",
        "train.dtype=fp32",
        "optim.schedule.warmup_steps=1",
        "eval.every=0",
        f"checkpoint.every={options.every}",
        f"checkpoint.keep={options.steps}",
        "tracking.enabled=false",
    ]
    on_ranks(number, "dnt_scale.train", *overrides)
    times = [
        json.loads(line)["time"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    during, normal, saves = [], [], []
    # no step follows the last
    *folders, last_folder = sorted((run_dir / "checkpoints").glob("step-*"))
    for folder in folders:
        saves.append((times[int(folder.name[5:]) - 1], (folder / "state.json").stat().st_mtime))
    for begin, end in list(pairwise(times))[WARM_UP_STEPS:]:
        covered = sum(max(0.0, min(end, last) - max(begin, first)) for first, last in saves)
        if covered >= (end - begin) / 2:
            during.append(end - begin)
        elif covered == 0:
            normal.append(end - begin)
    size = sum(file.stat().st_size for file in last_folder.glob("*.safetensors"))
    usual = statistics.median(normal)
    return {
        "ranks": number,
        "mb": size / 1e6,
        "normal": usual,
        "during": statistics.median(during),
        "ratio": statistics.median(during) / usual,
        "worst": max(during) / usual,
        "worst_normal": max(normal) / usual,
        "steps_a_save": len(during) / len(saves),
        "all": {"normal": normal, "during": during},
    }


def show(result: dict[str, Any]) -> None:
    title = (
        f"{result['device']}, torch {result['torch']}, {result['date']}, {result['commit'][:12]}"
    )
    table = Table(title=f"{title}: saves of {result['mb']} MB")
    for column in (
        "ranks",
        "dd MB/s",
        "save MB/s",
        "of dd",
        "wanted",
        "first save MB/s",
        "verified MB/s",
    ):
        table.add_column(column, justify="right")
    for row in result["bandwidth"]:
        dd_rate, save, first, verified = (
            result["mb"] / row[name] for name in ("dd", "save", "first", "verified")
        )
        numbers = (
            f"{dd_rate:,.0f}",
            f"{save:,.0f}",
            f"{row['of_dd']:.2f}",
            f">= {WANTED_BANDWIDTH}",
        )
        table.add_row(str(row["ranks"]), *numbers, f"{first:,.0f}", f"{verified:,.0f}")
    Console(width=110).print(table)
    table = Table(title=f"steps of {result['model']} while a save runs")
    for column in (
        "ranks",
        "MB",
        "normal s",
        "during s",
        "ratio",
        "wanted",
        "worst",
        "worst normal",
        "steps a save",
    ):
        table.add_column(column, justify="right")
    for row in result["steps"]:
        numbers = (
            f"{row['mb']:,.0f}",
            f"{row['normal']:.3f}",
            f"{row['during']:.3f}",
            f"{row['ratio']:.2f}",
        )
        more = (f"{row['worst']:.2f}", f"{row['worst_normal']:.2f}", f"{row['steps_a_save']:.1f}")
        table.add_row(str(row["ranks"]), *numbers, f"<= {WANTED_STEP}", *more)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

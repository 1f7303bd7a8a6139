"""The loss of a language model with and without its logits: time and memory of loss and backward.

    python -m benchmarks.cross_entropy

From what the last norm gives and the head's weight to the loss and the gradients of both: all
logits at once (`testbed/plain_cross_entropy.py`), the training loss of DNT
(`model/linear_cross_entropy.py`), and torch's own in pieces where torch has one that takes the
case. Time: seconds of one thread's processor time, which other work on the machine does not
lengthen; the ways take turns, in rounds, and what is compared is the median over rounds of the
ratio within a round. Memory: of one step in a fresh process, the peak (VmHWM) less what was
resident before; the gradients are in it, the weight is not. bf16 is left out where the processor
does not multiply it.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dnt_scale.distributed.compute_dtype import bf16_cost, faster
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.linear_cross_entropy import linear_cross_entropy
from dnt_scale.record.files import git_commit
from testbed.peak import peak_kb
from testbed.plain_cross_entropy import plain_cross_entropy

PLAIN, OURS, TORCHS = "all logits", "in pieces", "torch's own"
WANTED_TIME, WANTED_MEMORY = 1.05, 0.25  # of all logits', at most


class Case(NamedTuple):
    vocab: int
    width: int
    tokens: int
    dtype: str = "fp32"
    padding: int = 0
    logit_cap: float | None = None
    z_loss: float = 0.0


LARGE = [
    Case(50_304, 768, 2048),
    Case(50_257, 768, 2048, padding=47, logit_cap=30.0, z_loss=1e-4),
    Case(50_304, 768, 2048, "bf16"),
]
SMALL = [
    Case(16_384, 256, 2048),
    Case(4096, 192, 2048),
    Case(2048, 256, 2048),
    Case(2048, 64, 4096),
    Case(2048, 64, 256),
]
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="of small cases; a quarter of large")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: benchmarks/results/cross_entropy-DEVICE.json)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    native = faster(bf16_cost(torch.device("cpu"))) == "bf16"
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "cases": [
            measure(case, rounds)
            for cases, rounds in ((LARGE, max(1, options.rounds // 4)), (SMALL, options.rounds))
            for case in cases
            if native or case.dtype != "bf16"
        ],
        "wanted_time_at_most": WANTED_TIME,
        "wanted_memory_at_most": WANTED_MEMORY,
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent
        / "results"
        / f"cross_entropy-{result['device'].replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return seconds and bytes of each way, and each way's as a share of all logits'."""
    steps = ways(case)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in ways(case._replace(tokens=8)).values():
        step()  # loads what the first call loads
    for number in range(rounds):
        first = number % len(steps)  # another one begins: what ran before has filled the cache
        for name in [*steps][first:] + [*steps][:first]:
            started = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - started)
    print(", ".join(f"{key} {value}" for key, value in case._asdict().items() if value), flush=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        taken = {name: fresh.apply(bytes_taken, (case, name)) for name in steps}
    return case._asdict() | {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "of_all_logits": {
            name: statistics.median(a / b for a, b in zip(found, seconds[PLAIN], strict=True))
            for name, found in seconds.items()
        },
        "bytes": taken,
        "bytes_of_all_logits": {name: found / taken[PLAIN] for name, found in taken.items()},
    }


def bytes_taken(case: Case, name: str) -> int:
    torch.set_num_threads(1)
    ways(case._replace(tokens=8, vocab=64, padding=0))[name]()  # loads what the first call loads
    step = ways(case)[name]
    before = psutil.Process().memory_info().rss
    kept = step()
    taken = 1024 * peak_kb() - before
    del kept
    return taken


def ways(case: Case) -> dict[str, Step]:
    """Return the ways from activations to gradients, which each returns."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    generator = torch.Generator().manual_seed(1)
    # in place and in their dtype, so that making them is not the peak
    x_ND = torch.randn(case.tokens, case.width, dtype=dtype, generator=generator)
    head_RD = torch.randn(case.vocab + case.padding, case.width, dtype=dtype, generator=generator)
    head_RD.div_(case.width**0.5)
    targets_N = torch.randint(case.vocab, (case.tokens,), generator=generator)
    weights = [x_ND.requires_grad_(), head_RD.requires_grad_()]

    def step(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss() * (1 / case.tokens), weights)

    def ours_or_plain(function: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        return function(x_ND, head_RD, targets_N, case.vocab, case.logit_cap, case.z_loss)[0]

    found = {
        PLAIN: partial(step, partial(ours_or_plain, plain_cross_entropy)),
        OURS: partial(step, partial(ours_or_plain, linear_cross_entropy)),
    }
    # since torch 2.13; it has no padding, cap or z-loss
    if hasattr(F, "linear_cross_entropy") and case == Case(*case[:4]):
        options = torch.nn.LinearCrossEntropyOptions()
        own = partial(
            F.linear_cross_entropy,
            *(x_ND, head_RD, targets_N),
            reduction="sum",
            ignore_index=IGNORED,
            options=options,
        )
        found[TORCHS] = partial(step, own)
    return found


def show(result: dict[str, Any]) -> None:
    title = (
        f"loss and gradients, one thread\n{result['device']}, torch {result['torch']}, "
        f"{result['date']}, {result['commit'][:12]}, load {result['load']:.0f}"
    )
    table = Table(title=title)
    for column in ("vocabulary", "width", "tokens", "dtype", "with", "way"):
        table.add_column(column, justify="right")
    for column in ("seconds", "over all\nlogits'", "wanted,\nat most"):
        table.add_column(column, justify="right")
    for column in ("peak,\nMB", "over all\nlogits'", "wanted,\nat most"):
        table.add_column(column, justify="right")
    for row in result["cases"]:
        more = {"padding": row["padding"], "cap": row["logit_cap"], "z-loss": row["z_loss"]}
        large = row["vocab"] > 50_000
        for name, seconds in row["seconds"].items():
            wanted = name == OURS
            table.add_row(
                *(f"{row[key]:,}" for key in ("vocab", "width", "tokens")),
                row["dtype"],
                "\n".join(key for key, value in more.items() if value),
                name,
                f"{seconds:.3g}",
                f"{row['of_all_logits'][name]:.2f}",
                f"{WANTED_TIME}" if wanted else "",
                f"{row['bytes'][name] / 1e6:.1f}",
                f"{row['bytes_of_all_logits'][name]:.2f}",
                f"{WANTED_MEMORY}" if wanted and large else "",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

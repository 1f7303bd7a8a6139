"""Attention inside documents on the CPU: its speed and its memory beside those of no mask at all
and of a mask of T x T.

    python -m benchmarks.document_masks

Forward and backward of attention alone, fp32, with what is made once for all blocks: the pieces, or
the mask. Speed: of one row of 2,048 tokens, 4 heads of 64, in seconds of one thread's processor
time, which other work on the machine does not lengthen. The three take turns, in rounds; what is
compared is the median over rounds of the ratio within a round. Memory: of one row of 8,192 tokens,
2 heads of 64, in a fresh process each: the peak (VmHWM) less what was resident before.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dnt_scale.model.documents import attention, find_documents
from dnt_scale.record.files import git_commit
from testbed.dense_mask import dense_mask
from testbed.peak import peak_kb

SPEED, MEMORY = (2048, 4, 64), (8192, 2, 64)  # tokens, heads, width of a head
WANTED_SPEED = 0.8  # of no mask's, at least
WANTED_MEMORY = 1 / 8  # of the dense mask's, at most
EOS, SEED = 0, 1
OURS, PLAIN, DENSE = "inside documents", "no mask", "dense mask"
FEW_HUNDRED = "documents of about 300"
LAYOUTS = {  # the mean length of documents, log-normal; or where they begin
    FEW_HUNDRED: 300,
    "of about 100": 100,
    "of about 20": 20,
    "each token a document": 1,
    "one document": [0],
    "a rest, then a long one": [100],
}
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: benchmarks/results/document_masks-DEVICE.json)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "speed": [speed(layout, options.rounds) for layout in LAYOUTS],
        "memory": [memory(layout) for layout in (FEW_HUNDRED, "each token a document")],
        "wanted_speed_at_least": WANTED_SPEED,
        "wanted_memory_at_most": WANTED_MEMORY,
    }
    show(result)
    out = (
        options.out
        or Path(__file__).parent
        / "results"
        / f"document_masks-{result['device'].replace(' ', '-')}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


def speed(layout: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of each way, and ours as a share of no mask's speed."""
    steps, documents = ways(layout, *SPEED)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for number in range(rounds):
        first = number % len(steps)  # another one begins: what ran before has filled the cache
        for name in [*steps][first:] + [*steps][:first]:
            started = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - started)
    return {
        "layout": layout,
        "documents": documents,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "of_no_mask": {
            name: statistics.median(a / b for a, b in zip(seconds[PLAIN], found, strict=True))
            for name, found in seconds.items()
        },
    }


def memory(layout: str) -> dict[str, Any]:
    """Return the bytes of each way, and ours as a share of the dense mask's."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        taken = {name: fresh.apply(bytes_taken, (layout, name)) for name in (OURS, PLAIN, DENSE)}
    return {"layout": layout, "bytes": taken, "of_dense": taken[OURS] / taken[DENSE]}


def bytes_taken(layout: str, name: str) -> int:
    torch.set_num_threads(1)
    ways(layout, 256, *MEMORY[1:])[0][name]()  # loads what the first call loads
    steps, _ = ways(layout, *MEMORY)
    before = psutil.Process().memory_info().rss
    steps[name]()
    return 1024 * peak_kb() - before


def ways(layout: str, length: int, heads: int, width: int) -> tuple[dict[str, Step], int]:
    """Return forward and backward of each way, and how many documents the row has."""
    tokens_BT = torch.full((1, length), EOS + 1)
    tokens_BT[0, begins(LAYOUTS[layout], length)] = EOS
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, length, heads, width)
    qkv = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, heads, length, width, generator=generator)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, find_documents(tokens_BT, EOS, q.dtype), causal=True)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begin_BT = find_documents(tokens_BT, EOS, q.dtype).begin_BT
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(begin_BT, q.dtype))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, None, causal=True)

    def step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
        return lambda: torch.autograd.grad(
            function(*(x.transpose(1, 2) for x in qkv)), qkv, gradient
        )

    count = int((tokens_BT[:, 1:] == EOS).sum()) + 1
    return {OURS: step(ours), PLAIN: step(plain), DENSE: step(dense)}, count


def begins(layout: int | list[int], length: int) -> list[int]:
    """Return where documents begin in a row that begins in the middle of one."""
    if isinstance(layout, list):
        return layout
    if layout == 1:
        return list(range(length))
    generator = torch.Generator().manual_seed(SEED)
    spread = 0.8  # of the lengths' logarithm
    found = [layout // 2]
    while found[-1] < length:
        z = float(torch.randn((), generator=generator))
        found.append(found[-1] + max(1, round(layout * math.exp(spread * z - spread**2 / 2))))
    return [begin for begin in found if begin < length]


def show(result: dict[str, Any]) -> None:
    length, heads, width = SPEED
    title = (
        f"attention alone, forward and backward, {length:,} tokens, {heads} heads of {width}, "
        f"fp32, one thread\n{result['device']}, torch {result['torch']}, {result['date']}, "
        f"{result['commit'][:12]}"
    )
    table = Table(title=title)
    for column in ("row", "documents", *(f"{name}\nms" for name in (OURS, PLAIN, DENSE))):
        table.add_column(column, justify="right")
    for column in ("speed over\nno mask's", "wanted,\nat least", "dense\nmask's"):
        table.add_column(column, justify="right")
    for row in result["speed"]:
        milliseconds = (f"{1e3 * row['seconds'][name]:.1f}" for name in (OURS, PLAIN, DENSE))
        table.add_row(
            row["layout"],
            f"{row['documents']:,}",
            *milliseconds,
            f"{row['of_no_mask'][OURS]:.2f}",
            f"{WANTED_SPEED}",
            f"{row['of_no_mask'][DENSE]:.2f}",
        )
    Console(width=130).print(table)
    length, heads, width = MEMORY
    table = Table(title=f"peak of the same, {length:,} tokens, {heads} heads of {width}")
    for column in ("row", *(f"{name}\nMB" for name in (OURS, PLAIN, DENSE))):
        table.add_column(column, justify="right")
    for column in ("over dense\nmask's", "wanted,\nat most"):
        table.add_column(column, justify="right")
    for row in result["memory"]:
        table.add_row(
            row["layout"],
            *(f"{row['bytes'][name] / 1e6:.1f}" for name in (OURS, PLAIN, DENSE)),
            f"{row['of_dense']:.3f}",
            f"{WANTED_MEMORY:.3f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

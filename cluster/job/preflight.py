"""What is looked at on the nodes once the ranks have met and before they train, in a few seconds:
:func:`check`.

A node that is bad is named and ends all ranks with status 1, so that the next attempt may leave it
out; what the user has to mend ends them with status 2. All ranks decide alike, from what all have
found.
"""

import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.cluster_config import ClusterConfig
from data_prep.files import free_bytes
from data_prep.words import megabytes
from dnt_scale import checkpoint
from dnt_scale.checkpoint.replicas import checksums
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.costs.memory_plan import checkpoint_bytes
from dnt_scale.distributed import compute_dtype
from dnt_scale.distributed.agree import highest, on_first
from dnt_scale.distributed.errors import AgreedError, AgreedFault
from dnt_scale.distributed.heartbeat import beat
from dnt_scale.distributed.host import host
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.record import timeline

T = TypeVar("T")

SIDE = {"cpu": 512, "cuda": 4096}  # rows of the square matrices that are multiplied
REDUCED_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
EXCHANGED_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# A product is timed again and again for this long, for a GPU's clocks rise.
TIMING_S = 0.2
SLOW = 0.5  # what is below this share of the median is slow
# So much of a GPU's memory may be taken without another job on it.
OTHERS_BYTES, OTHERS_SHARE = (
    2e9,
    0.05,
)
CLOCKS_S = 5.0  # clocks that are further apart than this are told of
SEEN_S = 5.0  # a file has to be seen on every node by then

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NodeReport:
    """What a rank has found by itself."""

    host: str
    device: str  # equal ones are to give equal bits
    faults: Sequence[str]  # in words
    blind: str  # why the run folder is not rank 0's, in words
    tflops: float
    checksum: int  # made of the bits of the product that was timed


def check(
    ranks: Ranks, run: RunConfig, cluster: ClusterConfig, multiply: Multiply = torch.mm
) -> None:
    """Check devices, arithmetic, network, clocks and disks; rank 0 says in one line what was found.
    A collective.

    Args:
        multiply: what makes the products that are checked.

    Raises:
        AgreedFault: on every rank; a node is bad. The timeline has its name in an event ``lost``.
        AgreedError: on every rank; no room for checkpoints, or a run folder that cannot be written
            or is not shared.
    """
    beat("preflight: disks, devices and arithmetic")
    free = on_first(ranks, lambda: check_free_space(run))
    mark = on_first(ranks, lambda: leave_mark(run))
    dtype = compute_dtype.for_preflight(run, ranks)
    found = gather(ranks, inspect_rank(ranks, run.run.dir / "logs" / mark.name, dtype, multiply))
    if ranks.first:
        mark.unlink(missing_ok=True)
    hosts = [one.host for one in found]
    check_shared(ranks, run, mark.parents[1], found)
    faults, warnings = compare_reports(found, may_be_shared=ranks.device.type == "cpu")
    if faults:
        fail(ranks, run, "; ".join(faults.values()), sorted(faults))

    beat("preflight: network and clocks")
    gb_s, clocks = measure_network(ranks)
    if gb_s < cluster.min_bandwidth_gb_s:
        slow, how = find_slow_nodes(ranks, hosts)
        fail(
            ranks,
            run,
            f"an all-reduce over {ranks.world_size} rank{'s' * (ranks.world_size > 1)} moves "
            f"{gb_s:.3g} GB/s, less than cluster.min_bandwidth_gb_s "
            f"({cluster.min_bandwidth_gb_s:g}); {how}",
            slow,
        )
    usual = statistics.median_low(clocks)
    apart = {
        host: clock - usual
        for host, clock in zip(hosts, clocks, strict=True)
        if abs(clock - usual) > CLOCKS_S
    }
    warnings += [
        f"the clock of {host} is {abs(by):.0f} s {'ahead' if by > 0 else 'behind'}"
        for host, by in apart.items()
    ]
    if ranks.first:
        for warning in warnings:
            print(f"preflight: warning: {warning}", file=sys.stderr)
        print(
            f"preflight: {format_summary(found, gb_s, clocks, free)}", file=sys.stderr, flush=True
        )


def gather(ranks: Ranks, mine: T) -> list[T]:
    """Return what every rank has, by rank. A collective."""
    every = [mine] * ranks.world_size
    dist.all_gather_object(every, mine)
    return every


def fail(ranks: Ranks, run: RunConfig, what: str, hosts: Sequence[str]) -> NoReturn:
    """Tell the timeline which hosts are bad, and end all ranks. Raises AgreedFault, always."""
    them = "it" if len(hosts) == 1 else "them"
    message = f"preflight: {what}" + (
        f"; to leave {them} out, cluster.exclude=[{','.join(hosts)}]" if hosts else ""
    )
    if ranks.first:
        with suppress(OSError):
            timeline.append(
                run.run.dir,
                "lost",
                attempt=timeline.this_attempt(),
                message=message,
                hosts=list(hosts),
            )
    raise AgreedFault(message)


def format_summary(
    found: Sequence[NodeReport], gb_s: float, clocks: Sequence[float], free: int | None
) -> str:
    slowest = min(found, key=lambda one: one.tflops)
    hosts = {one.host for one in found}
    parts = [
        f"{len(found)} rank{'s' * (len(found) > 1)} on {len(hosts)} node{'s' * (len(hosts) > 1)}",
        f"matmul right, {statistics.median(one.tflops for one in found):.3g} TFLOP/s median "
        f"(slowest {slowest.host} {slowest.tflops:.3g})",
    ]
    if len(found) > 1:
        parts += [
            f"all-reduce {gb_s:.3g} GB/s",
            f"clocks within {1000 * (max(clocks) - min(clocks)):.0f} ms",
        ]
    if free is not None:
        parts.append(f"{megabytes(free)} free")
    return "; ".join(parts)


# --- disks ----------------------------------------------------------------------------------------


def check_free_space(run: RunConfig) -> int | None:
    """Return the bytes that are free where checkpoints are to lie; None at a URL.

    Raises:
        ConfigError: less than the first two take, or the next one where there is one already.
    """
    place = run.checkpoints
    if not isinstance(place, Path):
        return None
    free = free_bytes(place)
    count = 1 if checkpoint.newest(place) else 2
    if free < (needed := count * checkpoint_bytes(run)):
        raise ConfigError(
            f"{'run.dir' if run.checkpoint.dir is None else 'checkpoint.dir'}: {place} has room "
            f"for {megabytes(free)}, but {count} checkpoint{'s' * (count > 1)} "
            f"take{'s' * (count == 1)} {megabytes(needed)}; free some, or give another"
        )
    return free


def leave_mark(run: RunConfig) -> Path:
    """Write a file into the run folder's logs/ that the other ranks are to see; it holds its own
    name.

    Raises:
        ConfigError: nothing can be written there.
    """
    logs = run.run.dir.absolute() / "logs"
    mark = logs / f".preflight-{uuid.uuid4().hex}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for left in logs.glob(".preflight-*"):  # what a kill has left
            left.unlink(missing_ok=True)
        mark.write_text(mark.name)
    except OSError as error:
        raise ConfigError(
            f"run.dir: nothing can be written to {logs} on {host()} ({error.strerror or error}); "
            "give another"
        ) from None
    return mark


def why_not_shared(ranks: Ranks, mark: Path) -> str:
    """Return why this rank cannot read rank 0's mark, or write beside it; empty where it can."""
    deadline = time.monotonic() + SEEN_S
    while not holds_its_name(mark):  # not yet: a file system of several machines takes its time
        if time.monotonic() > deadline:
            return "does not see what rank 0 wrote there"
        time.sleep(0.05)
    mine = mark.with_name(f"{mark.name}-{ranks.rank}")
    try:
        mine.write_text(mark.name)
        mine.unlink()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def holds_its_name(mark: Path) -> bool:
    try:
        return mark.read_text() == mark.name
    except OSError:
        return False


def check_shared(ranks: Ranks, run: RunConfig, folder: Path, found: Sequence[NodeReport]) -> None:
    """Check that all ranks see one run folder, which is ``folder`` to rank 0.

    Raises:
        AgreedFault: less than half of the nodes do not.
        AgreedError: half of them or more.
    """
    blind = {
        one.host: f"rank {rank} ({one.host}) {one.blind}"
        for rank, one in enumerate(found)
        if one.blind
    }
    if not blind:
        return
    what = f"run.dir: {folder} is not the same folder on all nodes: {'; '.join(blind.values())}"
    if 2 * len(blind) < len({one.host for one in found}):
        fail(ranks, run, what, sorted(blind))
    raise AgreedError(f"{what}; give a path that the nodes share")


# --- devices and arithmetic -----------------------------------------------------------------------


def inspect_rank(ranks: Ranks, mark: Path, dtype: torch.dtype, multiply: Multiply) -> NodeReport:
    """Report what this rank finds of its node, without the others."""
    faults = []
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        faults.append(
            f"has no room for 1 MB in {os.environ.get('TMPDIR', '/tmp')} ({error.strerror})"
        )
    device, tflops, checksum = ranks.device.type, 0.0, 0
    try:
        device = device_name(ranks.device)
        faults += memory_taken(ranks.device)
        tflops, checksum, wrong = check_product(ranks.device, dtype, multiply)
        faults += wrong
    except RuntimeError as error:  # torch's word for whatever a device reports
        faults.append(f"has a device that fails: {str(error).splitlines()[0]}")
    return NodeReport(host(), device, faults, why_not_shared(ranks, mark), tflops, checksum)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def memory_taken(device: torch.device) -> list[str]:
    """Say, where it is so, that other processes hold a good part of the device's memory."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)  # and what CUDA itself takes of it
    if others <= max(OTHERS_BYTES, OTHERS_SHARE * total):
        return []
    return [f"has {megabytes(others)} of {device}'s {megabytes(total)} taken by other processes"]


def check_product(
    device: torch.device, dtype: torch.dtype, multiply: Multiply
) -> tuple[float, int, list[str]]:
    """Return the TFLOP/s of a product in ``dtype``, the checksum of its bits, and what is wrong
    with it, in words.

    One in fp32 is checked first, whatever the dtype.

    The matrices hold integers so small that every sum of products is an integer below 2^24: exact
    in fp32, whatever the order. So the fp32 product is known, and is checked on the host: C w = A
    (B w), in float64 exact as well.
    """
    side = SIDE[device.type]
    # bf16 holds such a number, and (largest / 2)^2 side < 2^24.
    largest = min(255, math.isqrt(3 * (1 << 24) // side))
    seed = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-largest, largest + 1, (side, side), generator=seed).float() for _ in range(2)
    )
    w = torch.arange(1, side + 1, dtype=torch.float64)
    exact = a.double() @ (b.double() @ w)

    fp32 = multiply(a.to(device), b.to(device)).cpu()
    wrong = int((fp32.double() @ w != exact).sum())
    faults = [f"gets {wrong} of {side} rows of an fp32 product wrong"] if wrong else []

    a, b = a.to(device, dtype), b.to(device, dtype)
    timed = multiply(a, b)
    error = float((timed.float().cpu() - fp32).abs().max() / fp32.abs().max())
    if not wrong and not error < 2**-7:  # NaN is not either
        faults.append(
            f"gets a {str(dtype)[6:]} product wrong by {error:.2g} of its largest element"
        )

    count, best, deadline = (
        (10 if device.type == "cuda" else 1),
        math.inf,
        time.monotonic() + TIMING_S,
    )
    while best == math.inf or time.monotonic() < deadline:
        started = time.perf_counter()
        for _ in range(count):
            multiply(a, b)
        wait_for_device(device)
        best = min(best, (time.perf_counter() - started) / count)
    return 2 * side**3 / best / 1e12, checksums([timed])[0], faults


def compare_reports(
    found: Sequence[NodeReport], *, may_be_shared: bool
) -> tuple[dict[str, str], list[str]]:
    """Return faults by host, and warnings, in words: what each rank has found, and how it compares
    with those of the same device.

    Args:
        may_be_shared: other jobs may run on the device, so that a slow one is no fault.
    """
    bad = [(rank, fault) for rank, one in enumerate(found) for fault in one.faults]
    slow = []
    for device in {one.device: None for one in found}:
        peers = [rank for rank, one in enumerate(found) if one.device == device and not one.faults]
        if not peers:
            continue
        (usual, count), *_ = Counter(found[rank].checksum for rank in peers).most_common()
        odd = [rank for rank in peers if found[rank].checksum != usual or 2 * count <= len(peers)]
        if count < len(peers):
            bad += [
                (rank, f"has other bits in a product than its peers ({device})") for rank in odd
            ]
        median = statistics.median(found[rank].tflops for rank in peers)
        slow += [
            (rank, f"multiplies at {found[rank].tflops:.3g} TFLOP/s, the median is {median:.3g}")
            for rank in peers
            if found[rank].tflops < SLOW * median
        ]
    said = [f"rank {rank} ({found[rank].host}) {what}" for rank, what in slow]
    if not may_be_shared:
        bad, said = bad + slow, []
    faults: dict[str, str] = {}
    for rank, what in bad:
        host = found[rank].host
        faults[host] = "; ".join(
            [*([faults[host]] if host in faults else []), f"rank {rank} ({host}) {what}"]
        )
    return faults, said


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- network and clocks ---------------------------------------------------------------------------


def measure_network(ranks: Ranks) -> tuple[float, list[float]]:
    """Return the bus bandwidth of an all-reduce in GB/s, and every rank's clock at one moment, in
    seconds since 1970. A collective.

    Bus bandwidth is that of nccl-tests: 2 (N - 1) / N bytes over the seconds that N ranks take,
    what a ring puts on every link; the best of four, of the slowest rank. Infinite for one rank.
    """
    data = torch.ones(REDUCED_BYTES[ranks.device.type] // 4, device=ranks.device)
    best = math.inf
    for _ in range(4):
        highest(0)  # all ranks begin together
        started = time.perf_counter()
        dist.all_reduce(data)
        wait_for_device(ranks.device)
        best = min(best, time.perf_counter() - started)
    highest(0)
    found = gather(ranks, (best, time.time()))
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * REDUCED_BYTES[ranks.device.type]
    return (moved / max(seconds for seconds, _ in found) / 1e9 if moved else math.inf), [
        clock for _, clock in found
    ]


def find_slow_nodes(ranks: Ranks, hosts: Sequence[str]) -> tuple[list[str], str]:
    """Return which nodes are slow, and how that is known, in words. A collective.

    Nodes in a ring exchange data with one neighbour and then with the other. The neighbours of a
    slow one have another. Of two nodes both may be; where more are all alike none is: the network
    is slow, or was never as fast as was asked.

    Args:
        hosts: by rank.
    """
    nodes = list(dict.fromkeys(hosts))
    if len(nodes) < 3:
        return nodes, f"which of {', '.join(nodes)} is slow cannot be told" if len(
            nodes
        ) > 1 else f"{nodes[0]} is alone"
    members = [[rank for rank, host in enumerate(hosts) if host == node] for node in nodes]
    here, count = nodes.index(hosts[ranks.rank]), len(nodes)
    place = members[here].index(ranks.rank)
    # Edge e joins node e and the next one; a node has one edge a turn.
    turns = [edge % 2 for edge in range(count)]
    turns[-1] = 2 if count % 2 else 1
    speeds = []
    for turn in range(max(turns) + 1):
        neighbours = {here: (here + 1) % count, (here - 1) % count: (here - 1) % count}  # by edge
        there = [members[node] for edge, node in neighbours.items() if turns[edge] == turn]
        speeds.append(
            measure_exchange(ranks, there[0][place] if there and place < len(there[0]) else None)
        )
    every = gather(ranks, speeds)
    best = {
        node: max(sum(every[rank][turn] for rank in of) for turn in range(len(speeds)))
        for node, of in zip(nodes, members, strict=True)
    }
    median = statistics.median(best.values())
    slow = [node for node in nodes if best[node] < SLOW * median]
    if not slow:
        how = f"all of {', '.join(nodes)} are alike; look at the network, or ask for less than that"
        return [], how
    told = " and ".join(
        f"{node} exchanges {best[node]:.3g} GB/s with its neighbours" for node in slow
    )
    return slow, f"{told}, the median is {median:.3g}"


def measure_exchange(ranks: Ranks, partner: int | None) -> float:
    """Return the GB/s that this rank sends to its partner while it receives as much, the better of
    two. A collective."""
    mine = torch.ones(EXCHANGED_BYTES[ranks.device.type] // 4, device=ranks.device)
    theirs, best = torch.empty_like(mine), 0.0
    for _ in range(2):
        highest(0)
        if partner is None:
            continue
        started = time.perf_counter()
        both = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        wait_for_device(ranks.device)
        best = max(best, EXCHANGED_BYTES[ranks.device.type] / (time.perf_counter() - started) / 1e9)
    return best

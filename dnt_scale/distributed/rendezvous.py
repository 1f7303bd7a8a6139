"""How the ranks of a run find each other: through a store on rank 0 at MASTER_ADDR:MASTER_PORT, or
torchrun's own.

What env:// of torch.distributed does, but that whoever waits says for which ranks, Ctrl-C ends the
waiting at once, and a rank that does not fit (a number twice, another WORLD_SIZE) is refused
instead of met.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dnt_scale.distributed.host import has_ended, machine, start_ticks

SAY_S = 3.0  # until somebody is told who is waited for
AGAIN_S = 60.0  # until that is told again, if they are others by then
CONNECT_S = 20.0  # for the handshake with a store that is there


class NotMet(Exception):
    """The ranks could not meet; the message says why, in words."""


def meet(rank: int, world_size: int, timeout: timedelta) -> PrefixStore:
    """A store that all ranks share, once all are there.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing or wrong, or this rank does not fit to
            those that are there.
        NotMet: they are not all there within ``timeout``, or the address is of no use.
    """
    host, port = address()
    wait = Wait(rank, world_size, f"{host}:{port}", timeout.total_seconds())
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    resolve(host, wait)
    if not serve:
        reach(host, port, wait)
    store = connect(host, port, serve=serve)
    store.set_timeout(timeout)
    # the store of torchrun outlives a start of its ranks
    here = PrefixStore(f"dnt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        arrive(here, rank, world_size)
        wait.until(
            lambda: here.check(["all"]) or everybody(here, rank, world_size),
            lambda: missing(here, world_size),
        )
    except BaseException:
        if not serve:  # that it may come again
            with suppress(dist.DistError, RuntimeError):
                here.delete_key(f"rank/{rank}")
        raise
    return PrefixStore("group", here)


def address() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT. Raises ValueError."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"{name} is not set: it takes the address and a free port of rank 0's machine; "
                f"{alone()}"
            )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"MASTER_PORT is {port!r}, expected a number from 1 to 65535")
    return host, int(port)


def alone() -> str:
    """How this process becomes a world of one, in words."""
    names = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names.append("SLURM_STEP_NUM_TASKS")
    return f"to run alone, `unset {' '.join(names)}`"


class Wait:
    """Waits for a condition, and says meanwhile for whom."""

    def __init__(self, rank: int, world_size: int, where: str, seconds: float) -> None:
        self._rank, self._world_size, self._where, self._seconds = rank, world_size, where, seconds
        self._until = time.monotonic() + seconds
        self._say = time.monotonic() + SAY_S
        self._said: list[int] = []

    def until(
        self,
        met: Callable[[], bool],
        missing: Callable[[], list[int]],
        why: Callable[[], str] = str,
    ) -> None:
        """Wait for ``met``. Raises NotMet when the time is over.

        Args:
            missing: the ranks that are waited for.
            why: what is known about the reason.
        """
        pause = 0.01
        while not met():
            if time.monotonic() > self._until:
                raise NotMet(
                    why() or f"{in_words(missing())} did not come within {span(self._seconds)}"
                )
            if time.monotonic() > self._say:
                self._tell(missing(), why())
            time.sleep(pause)
            pause = min(0.25, 1.5 * pause)

    def _tell(self, ranks: list[int], why: str) -> None:
        self._say = time.monotonic() + AGAIN_S
        # one of those who are there is enough
        if (
            not ranks
            or ranks == self._said
            or (min(ranks) and min({*range(self._world_size)} - {*ranks}) < self._rank)
        ):
            return
        self._said = ranks
        who = f"rank {self._rank}: " if self._rank else ""
        line = f"{who}waiting for {in_words(ranks)} of {self._world_size} at {self._where}"
        line += f" ({why})" if why else ""
        line += f", up to {span(self._seconds)}"
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            shell = "started in a shell of srun? " if "WORLD_SIZE" not in os.environ else ""
            line += f"; {shell}{alone()}"
        print(line, file=sys.stderr, flush=True)


def span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def in_words(ranks: list[int]) -> str:
    *most, last = [str(rank) for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    if more:
        return f"ranks {', '.join([*most, last])}{more}"
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def resolve(host: str, wait: Wait) -> None:
    """Wait until the name is known, which in a cluster that starts may take a while."""

    why = ""

    def known() -> bool:
        nonlocal why
        try:
            socket.getaddrinfo(host, None)
            return True
        except (OSError, UnicodeError) as error:
            why = (
                f"MASTER_ADDR {host} is no name that is known here: "
                f"{getattr(error, 'strerror', None) or error}"
            )
            return False

    wait.until(known, lambda: [0], lambda: why)


def reach(host: str, port: int, wait: Wait) -> None:
    """Wait until somebody listens there."""

    why = ""

    def listens() -> bool:
        nonlocal why
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return True
        except OSError as error:
            why = error.strerror or str(error)
            return False

    wait.until(listens, lambda: [0], lambda: why.lower())


def connect(host: str, port: int, *, serve: bool) -> TCPStore:
    """The store, in which nobody is yet. Made on a thread: torch hears no Ctrl-C, and another
    program may not answer.

    Raises:
        NotMet: the port is taken, or what is there is no store.
    """
    made: list[TCPStore] = []
    failed: list[str] = []

    def make() -> None:
        try:
            made.append(
                TCPStore(
                    host,
                    port,
                    is_master=serve,
                    timeout=timedelta(seconds=CONNECT_S),
                    wait_for_workers=False,
                    multi_tenant=serve,
                )
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            failed.append(str(error).splitlines()[0])

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    until = time.monotonic() + 2 * CONNECT_S
    while thread.is_alive() and time.monotonic() < until:
        thread.join(0.1)
    if made:
        return made[0]
    raise NotMet(failed[0] if failed else "what answers there is another program")


def arrive(store: PrefixStore, rank: int, world_size: int) -> None:
    """Tell that this rank is here. Raises ValueError where it does not fit to those that are
    there.
    """
    process = {"pid": os.getpid(), "started": start_ticks(os.getpid()), "machine": machine()}
    ranks = {"rank": rank, "host": socket.gethostname(), **process}
    first = json.loads(store.compare_set("world", "", json.dumps({**ranks, "size": world_size})))
    if first["size"] != world_size:
        raise ValueError(
            f"WORLD_SIZE is {world_size} on rank {rank}, but {first['size']} on rank "
            f"{first['rank']} "
            f"({first['host']}); start every rank with the same one"
        )
    key = f"rank/{rank}"
    other = json.loads(store.compare_set(key, "", json.dumps(ranks)))
    if other == ranks:
        return
    if not has_ended(other["pid"], other["started"], other["machine"]):
        raise ValueError(
            f"rank {rank} is here already, as process {other['pid']} on {other['host']}; give "
            "every process a RANK of its own, or end them all and start them again"
        )
    store.set(key, json.dumps(ranks))


def missing(store: PrefixStore, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"rank/{rank}"])]


def everybody(store: PrefixStore, rank: int, world_size: int) -> bool:
    """Whether all are there; rank 0 looks, and tells the others."""
    if rank or not store.check([f"rank/{other}" for other in range(world_size)]):
        return False
    store.set("all", "")
    return True

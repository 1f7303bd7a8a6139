"""A hang ends all ranks, with one message that names the rank at fault.

``with watching(ranks, hang_s):`` runs two threads beside the main one, which says where it is with
``beat("step 118")``:

- the pulse tells the others, through a TCPStore connection of its own (a client that waits, as the
  main thread's may, lets nobody else in), how far the main thread is and that this process lives,
  and reads the same of them. There are no collectives in it: these are what hangs;
- the judge never waits for anything. It blames a process that is gone, one that gives no sign of
  life (stopped, or its node is down), and else the rank that is furthest behind, once that has not
  moved for ``hang_s``. Ranks are compared by the collectives they have entered: whoever waits
  inside one is ahead of whom it waits for.

The first verdict stands in the store and ends everyone, with status 1 or that of the rank that
failed by itself; without a store each rank ends on its own. Ages are measured by the judge's own
clock, which stands still while its process does, so that a run that was stopped and continued
(Ctrl-Z, a laptop's lid) blames nobody.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import orjson
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dnt_scale.distributed.agree import on_first, together
from dnt_scale.distributed.errors import AgreedError, exit_status, lost_peer, out_of_memory
from dnt_scale.distributed.heartbeat import main_thread
from dnt_scale.distributed.host import has_ended, host, machine, start_ticks
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.distributed.this_process import collectives_entered, flush, line_of, say

STATUS = 1  # that a hang or a death ends with
TICK_S = 1.0  # longest time between two looks; a tenth of hang_s where that is less
SUSPECT_S = 10.0  # without a sign of life, once a collective has failed because somebody ended
SILENT = "gave no sign of life for {:.0f} s (last heard of at {}): stopped, or the node is down"
GRACE_S = 1.0  # that a fault on another rank than 0 waits for the same one on rank 0
PRINT_S = 0.3  # that rank 0 has to print something
FAREWELL_S = 3.0  # that the process with the store stays for the others to read why

Tell = Callable[[str, Sequence[str]], None]


@dataclass(frozen=True)
class Pulse:
    """What a rank tells of itself."""

    number: int  # of this pulse: grows while the process lives
    collectives: int  # entered by the process, on all its groups
    beats: int
    moves: int
    where: str  # of the last beat
    line: str  # of our code that the main thread is in
    left: bool  # on its own accord: no more signs of life are to be expected
    host: str
    machine: str  # where process numbers mean the same
    pid: int
    started: int  # in clock ticks since boot: another process may get its number; 0: not known

    @property
    def progress(self) -> tuple[int, int]:
        return self.collectives, self.beats


@dataclass
class LastPulse:
    """The last pulse of a rank, and when on the judge's clock it lived and moved last."""

    pulse: Pulse
    lived: float
    moved: float


@dataclass(frozen=True)
class Verdict:
    message: str
    lost: Sequence[int]  # ranks at fault that do not end by themselves
    # of all ranks at fault; of none, when a rank could say itself why it ended
    hosts: Sequence[str]
    printer: int  # the rank that prints the message
    readers: int  # ranks that are there to read it
    status: int = STATUS  # that all end with


class Watchdog:
    """See ``watching``, which is the way to have one."""

    def __init__(self, ranks: Ranks, hang_s: float, tell: Tell | None) -> None:
        self.ranks = ranks
        self.tell = tell
        self.hang_s = hang_s
        self.tick = min(TICK_S, hang_s / 10)
        # all ranks' reading of all ranks is the work of one store: the more there are, the rarer
        self.read_every = min(hang_s / 10, max(self.tick, ranks.world_size / 20))
        self.thread_id = threading.get_ident()
        self.host, self.machine, self.pid = host(), machine(), os.getpid()
        self.started = start_ticks(self.pid)
        self.number = 0
        self.clock = 0.0  # the judge's
        # when on that clock the store answered last, and when all were read last
        self.contact = self.read = 0.0
        self.behind: list[int] = []  # the ranks that are furthest behind
        self.since = 0.0  # when on the judge's clock it became these
        self.left = False
        self.reason: str | None = None  # why this rank ends by itself
        self.status = STATUS  # that it then ends with
        self.verdict: Verdict | None = None  # the judge's
        self.died: list[int] = []  # on this machine
        self.fast = False  # read all at every tick
        self.suspecting = False
        self.quiet = False  # judge no more
        self.told = threading.Event()  # the store holds that this rank left, or why
        self.wake, self.stopping = threading.Event(), threading.Event()
        self.ending = threading.Lock()
        self.seen = {ranks.rank: LastPulse(self._pulse(), 0.0, 0.0)}
        self.store: PrefixStore | None = None
        if ranks.world_size > 1:
            # a store may outlive a run
            name = on_first(ranks, lambda: f"watchdog/{os.getpid()}/{time.time_ns()}")
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = store = PrefixStore(
                name, TCPStore(address, port, is_master=False, wait_for_workers=False)
            )
            together(ranks, lambda: store.set(str(ranks.rank), encode(self._pulse())))
            self.seen = {
                rank: LastPulse(pulse, 0.0, 0.0) for rank, pulse in enumerate(self._read_all(store))
            }
        self.judge = threading.Thread(target=self._judge_on, name="judge", daemon=True)
        self.pulse = threading.Thread(target=self._pulse_on, name="pulse", daemon=True)
        self.judge.start()
        if self.store:
            self.pulse.start()

    # --- the pulse

    def _pulse(self) -> Pulse:
        self.number += 1
        return Pulse(
            self.number,
            collectives_entered(),
            main_thread.beats,
            main_thread.moves,
            main_thread.where,
            line_of(self.thread_id),
            self.left,
            self.host,
            self.machine,
            self.pid,
            self.started,
        )

    def _pulse_on(self) -> None:
        assert self.store
        try:
            while not self.stopping.is_set() and self._exchange(self.store):
                self.wake.wait(self.tick)
                self.wake.clear()
        except (dist.DistError, RuntimeError):
            pass  # the process with the store is gone; the judge finds whose that was
        self.told.set()

    def _exchange(self, store: PrefixStore) -> bool:
        """Tell and read, once; whether there is more to come."""
        reason, verdict, left = self.reason, self.verdict, self.left
        if reason is not None:
            what = f"ended at {main_thread.where}: {reason}"
            verdict = Verdict(
                f"{self._name(self.ranks.rank)} {what}",
                [],
                [],
                0,
                len(self._present()),
                self.status,
            )
        if verdict:  # the first one stands
            store.compare_set("ended", "", encode(verdict))
        # who is gone is looked at before it is read whether it had left
        dead = [rank for rank, seen in self.seen.items() if self._gone(seen.pulse)]
        store.set(str(self.ranks.rank), encode(self._pulse()))
        if store.check(["ended"]):
            self._end(Verdict(**orjson.loads(store.get("ended"))), store)
            return False
        if (
            self.fast
            or self.suspecting
            or dead
            or self.clock - self.read >= self.read_every - self.tick / 2
        ):
            for rank, pulse in enumerate(self._read_all(store)):
                self._notice(rank, pulse)
            self.read = self.clock
            self.died = [rank for rank in dead if not self.seen[rank].pulse.left]
        self.contact = self.clock
        if left:
            self.told.set()
        return True

    def _read_all(self, store: PrefixStore) -> list[Pulse]:
        return [
            Pulse(**orjson.loads(text))
            for text in store.multi_get([str(r) for r in range(self.ranks.world_size)])
        ]

    def _notice(self, rank: int, pulse: Pulse) -> None:
        before = self.seen[rank]
        if (pulse.progress, pulse.moves) != (before.pulse.progress, before.pulse.moves):
            self.seen[rank] = LastPulse(pulse, self.clock, self.clock)
        elif pulse.number != before.pulse.number:
            self.seen[rank] = LastPulse(pulse, self.clock, before.moved)

    def _gone(self, pulse: Pulse) -> bool:
        here = pulse.machine == self.machine and not pulse.left  # Most of many ranks are elsewhere.
        return here and has_ended(pulse.pid, pulse.started, pulse.machine)

    # --- the judge

    def _judge_on(self) -> None:
        before = time.monotonic()
        while not self.stopping.wait(self.tick):
            now = time.monotonic()
            self.clock += min(now - before, 2 * self.tick)
            before = now
            if self.store is None:
                self._notice(self.ranks.rank, self._pulse())
                self.read = self.clock
            if self.verdict is None and not self.quiet and (verdict := self._judge()):
                self.verdict = verdict
                self.wake.set()
                # the pulse tells the others and ends us; it may be stuck in a store that does not
                # answer
                if self.store is None or not self.stopping.wait(2 * self.tick):
                    self._end(verdict, None)

    def _judge(self) -> Verdict | None:
        alive_s = min(SUSPECT_S, self.hang_s) if self.suspecting else self.hang_s
        alone_s = self.clock - self.contact if self.store else 0.0
        died = [0] if alone_s >= self.tick and self._gone(self.seen[0].pulse) else self.died
        if died:
            return self._verdict(
                died, f"died (last heard of at {self.seen[died[0]].pulse.where})", died
            )
        if alone_s >= alive_s:
            whose = (
                "or the torchrun of its node "
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                else ""
            )
            return self._verdict(
                [0], f"{whose}{SILENT.format(alone_s, self.seen[0].pulse.where)}", [0]
            )
        silent = [
            rank
            for rank, seen in self.seen.items()
            if not seen.pulse.left and self.read - seen.lived >= alive_s
        ]
        if silent:
            seen = self.seen[silent[0]]
            return self._verdict(
                silent, SILENT.format(self.read - seen.lived, seen.pulse.where), silent
            )
        return self._furthest_behind()

    def _furthest_behind(self) -> Verdict | None:
        least = min(seen.pulse.progress for seen in self.seen.values())
        behind = [rank for rank, seen in self.seen.items() if seen.pulse.progress == least]
        behind = [rank for rank in behind if not self.seen[rank].pulse.left] or behind
        if behind != self.behind:  # who was ahead has waited till now: its own age says nothing
            self.behind, self.since = behind, self.read
        age = self.read - max(self.since, *(self.seen[rank].moved for rank in behind))
        if age < self.hang_s:
            return None
        pulse = self.seen[behind[0]].pulse
        has, it, first = ("has", "it", "it") if len(behind) == 1 else ("have", "them", "the first")
        if pulse.left:
            return self._verdict(behind, f"left {age:.0f} s ago, and the others wait for {it}")
        others = f"; the others wait for {it}" if len(behind) < self.ranks.world_size else ""
        return self._verdict(
            behind,
            f"{has} not moved since {pulse.where}, {age:.0f} s ago ({first} is in "
            f"{pulse.line}){others}",
        )

    def _verdict(self, culprits: list[int], what: str, lost: Sequence[int] = ()) -> Verdict:
        names = " and ".join([self._name(rank) for rank in culprits[:4]])
        names += f" and {len(culprits) - 4} more" if len(culprits) > 4 else ""
        hosts = sorted({self.seen[rank].pulse.host for rank in culprits})
        able = self._present() - set(lost)
        return Verdict(
            f"{names} {what}", lost, hosts, min(able, default=self.ranks.rank), len(able)
        )

    def _present(self) -> set[int]:
        return {
            rank
            for rank, seen in self.seen.items()
            if not seen.pulse.left and not self._gone(seen.pulse)
        }

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self.seen[rank].pulse.host})"

    # --- the end

    def _end(self, verdict: Verdict, store: PrefixStore | None) -> None:
        """End this process, unless its main thread is about to do so."""
        with self.ending:
            if self.reason is None:
                for rank in verdict.lost:
                    self._kill(self.seen[rank].pulse)
                if self.ranks.rank == verdict.printer:
                    advice = (
                        "; the same command goes on from the newest checkpoint"
                        if verdict.hosts
                        else ""
                    )
                    say(f"error: {verdict.message}; all ranks end{advice}\n")
                    if self.tell:
                        self.tell(verdict.message, verdict.hosts)
            if store:
                with suppress(dist.DistError, RuntimeError):
                    self._take_leave(store, verdict.readers)
            if self.reason is None:
                flush()
                os._exit(verdict.status)

    def _take_leave(self, store: PrefixStore, expected: int) -> None:
        """Rank 0 may hold the store, so it goes last."""
        readers = store.add("readers", 1)
        deadline = time.monotonic() + FAREWELL_S
        while self.ranks.first and readers < expected and time.monotonic() < deadline:
            time.sleep(0.02)
            readers = store.add("readers", 0)

    def _kill(self, pulse: Pulse) -> None:
        """A stopped process of this machine would outlive the rest: under a plain launch nobody
        else ends it.
        """
        if pulse.machine != self.machine or not pulse.started or pulse.left:
            return
        with suppress(OSError):
            handle = os.pidfd_open(pulse.pid)
            try:
                if start_ticks(pulse.pid) == pulse.started:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)

    # --- the main thread

    def ended(self, reason: str, status: int) -> None:
        """Tell why this rank ends by itself, and with what status.

        What is wrong on all ranks is for rank 0 to report, as if it were alone: the others let it
        go first, and end here once it has.
        """
        if not self.ranks.first:
            time.sleep(GRACE_S)
        with self.ending:
            self.reason, self.status = reason, status
        self._tell()

    def suspect(self) -> None:
        """Wait for the judge to find whose end made a collective fail; it then ends this
        process.
        """
        self.suspecting = True
        deadline = time.monotonic() + min(SUSPECT_S, self.hang_s) + 5 * self.tick
        while time.monotonic() < deadline and not any(
            seen.pulse.left for seen in self.seen.values()
        ):
            time.sleep(self.tick / 5)

    def stop(self) -> None:
        """Leave, all being well; rank 0 stays till all have left, who would take the end of its
        store for a death.
        """
        self._leave()
        while self.ranks.first and not self._all_left():
            self._look()
        self._close()

    def abandon(self, *, for_first: bool = False) -> None:
        """Leave, whatever the others do. With ``for_first`` they let rank 0 go first, which prints
        what all raised: torchrun sends it SIGTERM as soon as another ends."""
        self.quiet = True
        self._leave()
        deadline = time.monotonic() + min(FAREWELL_S, 2 * self.read_every)
        while (
            self.ranks.first
            and not for_first
            and not self._all_left()
            and time.monotonic() < deadline
        ):
            self._look()  # that they know it before the store ends
        if for_first and not self.ranks.first:
            while (
                self.pulse.is_alive()
                and not self.seen[0].pulse.left
                and time.monotonic() < deadline
            ):
                self._look()
            time.sleep(PRINT_S)
        self._close()

    def _leave(self) -> None:
        self.left = self.fast = True
        self._tell()

    def _all_left(self) -> bool:
        return not self.pulse.is_alive() or all(seen.pulse.left for seen in self.seen.values())

    def _look(self) -> None:
        self.wake.set()
        time.sleep(self.tick / 20)

    def _close(self) -> None:
        self.stopping.set()
        self.wake.set()
        for thread in (self.judge, self.pulse):
            if thread.is_alive():
                thread.join(FAREWELL_S)

    def _tell(self) -> None:
        self.told.clear()
        self.wake.set()
        if self.pulse.is_alive():
            self.told.wait(FAREWELL_S)


@contextmanager
def watching(ranks: Ranks, hang_s: float, tell: Tell | None = None) -> Iterator[None]:
    """Watch over all ranks for the length of a block. A collective at its start; every rank enters
    and leaves it.

    An exception that leaves the block on one rank only (anything but AgreedError) ends the others
    at once, who name it.

    Args:
        hang_s: time without a ``beat``, a move or a collective, in seconds, after which the process
            ends with status 1.
        tell: called once, on one rank, with the message and the hosts of the ranks that died, hung
            or went silent.
    """
    watch = Watchdog(ranks, hang_s, tell)
    try:
        yield
    except AgreedError:
        watch.abandon(for_first=True)
        raise
    except KeyboardInterrupt:  # the others are interrupted too
        watch.abandon()
        raise
    except BaseException as error:
        if isinstance(error, RuntimeError) and lost_peer(error):
            watch.suspect()
        else:
            watch.ended(reason_of(error), exit_status(error))
        watch.abandon()
        raise
    watch.stop()


def reason_of(error: BaseException) -> str:
    if out_of_memory(error):
        return "out of memory"
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def encode(what: Pulse | Verdict) -> str:
    return orjson.dumps(asdict(what)).decode()

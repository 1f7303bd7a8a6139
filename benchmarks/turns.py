"""Processes that train by turns, so that a machine's load falls on all of them alike, and where
the seconds of a step go.

The bench writes a line to a process, which does a turn of some steps and answers with a line of
what it measured; meanwhile the others wait. `Turns` is the process's end, `Contender` the bench's.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from testbed.peak import peak_kb

PIPES = "DNT_BENCH_PIPES"  # the numbers of the two ends that a process has, to read and to write
PHASES = ("data wait", "forward", "loss", "backward", "optimizer", "communication", "host")

Measured = dict[str, Any]


def wait_for_device() -> None:
    """Return once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Phases:
    """Seconds in each part of a step, without those of the parts within it.

    While ``on``, the host waits for the device at both ends of a part: then the device's time
    counts where it belongs, and a step takes longer.
    """

    def __init__(self) -> None:
        self.on = False
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of each part that is open: seconds of those within it

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's seconds as ``name``."""
        if not self.on:
            yield
            return
        wait_for_device()
        started = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            wait_for_device()
            spent = time.perf_counter() - started
            self.seconds[name] += spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Count what ``owner.function`` takes as ``name``, from now on."""
        watched: Callable[..., Any] = getattr(owner, function)

        @wraps(watched)
        def timed(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return watched(*given, **named)

        setattr(owner, function, timed)


class Turns:
    """The end of a process that trains: ``begin`` before each step, ``end`` after it."""

    def __init__(self, steps: int, phases: Phases) -> None:
        self.steps = steps  # of a turn
        self.phases = phases
        read, write = (int(number) for number in os.environ[PIPES].split(","))
        self._orders, self._answers = os.fdopen(read), os.fdopen(write, "w")
        self._done = 0
        self._started = (0.0, 0.0)

    def begin(self) -> None:
        """Wait for a turn, where the last one is over."""
        if self._done % self.steps:
            return
        order = self._orders.readline().strip()
        if not order:
            sys.exit("the bench has ended")
        self.phases.on = order == "split"
        self.phases.seconds.clear()
        wait_for_device()
        self._started = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """Answer, where this was the turn's last step."""
        self._done += 1
        if self._done % self.steps:
            return
        wait_for_device()
        clocks = (time.perf_counter(), time.process_time())
        wall, cpu = (
            (now - then) / self.steps for now, then in zip(clocks, self._started, strict=True)
        )
        measured: Measured = {"wall_s": wall, "cpu_s": cpu, "memory_gb": peak_memory()}
        if self.phases.on:
            split = {name: seconds / self.steps for name, seconds in self.phases.seconds.items()}
            split["host"] = wall - sum(split.values())
            measured["split_s"] = split
        self._answers.write(json.dumps(measured) + "\n")
        self._answers.flush()


def peak_memory() -> float:
    """Return the most GB (1e9 bytes) that were allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_kb() * 1024 / 1e9


class Contender:
    """The bench's end of a process that trains."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        orders, write = os.pipe()
        read, answers = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            pass_fds=(orders, answers),
            env={**os.environ, PIPES: f"{orders},{answers}"},
            stdout=subprocess.DEVNULL,  # its errors go to the terminal
        )
        os.close(orders)
        os.close(answers)
        self._orders, self._answers = os.fdopen(write, "w"), os.fdopen(read)

    def turn(self, order: str) -> Measured:
        """Let it do a turn, ``go`` or ``split``, and return what it measured.

        Raises:
            RuntimeError: it has ended.
        """
        try:
            self._orders.write(order + "\n")
            self._orders.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        measured: Measured = json.loads(answer)
        return measured

    def close(self) -> None:
        """End it, and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._orders.close()
        self._answers.close()

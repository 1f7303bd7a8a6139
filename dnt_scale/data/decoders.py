"""Processes that decode images for a rank, so that many cores serve one device.

A process is told of jobs through its standard input, a JSON line each, and answers with the rows as
they lie in memory. It ends when its input does: also where the rank was killed.
"""

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO, NoReturn

import numpy as np

from dnt_scale.data.image_reader import ImageReader, Job, Reading, Rows

HEADER = struct.Struct("<q")  # of an answer: its bytes; negative for what went wrong
IN_HAND = 2  # jobs that a process has at a time, so that it need not wait for the next
# a scheduler's signals reach every process of a job: these are the rank's to act on
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Decoders:
    """Rows of images, made by ``processes`` others, or with 0 of them by this one when they are
    asked for. Several threads may use it, each for jobs of its own.
    """

    def __init__(self, reading: Reading, processes: int) -> None:
        self.reading = reading
        self.here = None if processes else ImageReader(reading)
        self.closed = False
        self.damage: str | None = None  # what a process has ended with
        self.lock = Lock()
        self.waiting: deque[Job] = deque()
        self.done: dict[Job, Rows] = {}
        self.selector = selectors.DefaultSelector()
        self.in_hand: dict[int, deque[Job]] = {}  # by the process's number, first come
        self.processes = [_started(reading) for _ in range(processes)]
        for number, process in enumerate(self.processes):
            assert process.stdout
            self.selector.register(process.stdout, selectors.EVENT_READ, number)
            self.in_hand[number] = deque()

    def ask(self, job: Job) -> None:
        """Have a job done; ``get`` then gives its rows."""
        with self.lock:
            self.waiting.append(job)
            self._hand_out()

    def get(self, job: Job) -> Rows:
        """Return the rows of a job that was asked for.

        Raises:
            ValueError: an image is damaged; names it.
            OSError: a process has ended by itself.
        """
        with self.lock:
            if self.here:
                self.waiting.remove(job)
                return self.here.read(job)
            while job not in self.done:
                if self.damage:
                    raise ValueError(self.damage)
                for key, _ in self.selector.select():
                    self._take(key.data)
                self._hand_out()
            return self.done.pop(job)

    def close(self) -> None:
        """End the processes."""
        self.closed = True
        if self.here:
            self.here.close()
        for process in self.processes:
            process.kill()  # they hold nothing that could be left half done
            process.communicate()
        self.selector.close()

    def _hand_out(self) -> None:
        while self.waiting and self.in_hand:
            number = min(self.in_hand, key=lambda each: len(self.in_hand[each]))
            if len(self.in_hand[number]) >= IN_HAND:
                return
            job = self.waiting.popleft()
            self.in_hand[number].append(job)
            pipe = self.processes[number].stdin
            assert pipe
            with suppress(BrokenPipeError):  # whoever waits for an answer finds out why
                pipe.write(json.dumps(job).encode() + b"\n")
                pipe.flush()

    def _take(self, number: int) -> None:
        """Take an answer, which its process writes in one go."""
        [size] = HEADER.unpack(self._read(number, HEADER.size))
        raw = self._read(number, abs(size))
        if size < 0:
            self.damage = raw.decode()
            return
        self.done[self.in_hand[number].popleft()] = np.frombuffer(raw, self.reading.row_type)

    def _read(self, number: int, size: int) -> bytes:
        """Read so many bytes of an answer, and no more, for ``selector`` tells of what is left."""
        pipe = self.processes[number].stdout
        assert pipe
        raw = bytearray()
        while len(raw) < size:
            part = os.read(pipe.fileno(), size - len(raw))
            if not part:
                self._gone(number)
            raw += part
        return bytes(raw)

    def _gone(self, number: int) -> NoReturn:
        code = self.processes[number].wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise OSError(
            f"a process that decodes images ended ({how}); it may have run out of memory: lower "
            "data.workers"
        )


def _started(reading: Reading) -> "subprocess.Popen[bytes]":
    """Start a process out of this very copy of the packages, which takes nothing of the working
    folder.
    """
    code = (
        "import sys; packages = sys.argv.pop(1); sys.path.insert(0, packages); "
        "import dnt_scale, data_prep; sys.path.append(sys.path.pop(0)); "
        "from dnt_scale.data.decoders import serve; serve(sys.stdin.buffer, sys.stdout.buffer)"
    )
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # which the process inherits
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # the Ctrl-C that is meant for training misses it
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert process.stdin
    process.stdin.write(reading.to_json().encode() + b"\n")
    process.stdin.flush()
    return process


def serve(asked: IO[bytes], answers: IO[bytes]) -> NoReturn:
    """Answer jobs until there are no more, and end this process."""
    try:
        reader = ImageReader(Reading.from_json(asked.readline()))
        for line in asked:
            split, places = json.loads(line)
            rows = reader.read(Job(split, tuple(places)))
            answers.write(HEADER.pack(rows.nbytes) + rows.tobytes())
            answers.flush()
    except BrokenPipeError:
        pass  # the rank is gone
    except (ValueError, OSError) as error:
        message = str(error).encode()
        with suppress(BrokenPipeError):
            answers.write(HEADER.pack(-len(message)) + message)
            answers.flush()
    os._exit(0)  # Python would complain of an answer that nobody is there to take

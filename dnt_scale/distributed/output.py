"""Standard output and error that can neither end nor hold up what a command is there for:
:func:`guard`.

A terminal goes, the reader of a pipe ends or does not read, a redirected log fills the disk, Ctrl-S
stops the screen: what cannot be written is dropped. The exception is the output of a command that
only shows something: where nobody reads it (``dnt jobs | head``) the command ends, quietly.
"""

import atexit
import io
import os
import select
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TextIO

HELD_BYTES = 1 << 20  # for a reader that does not read now; what is beyond is dropped
PIECE_BYTES = 1 << 16
PATIENCE_S = 0.2  # that a write waits for one, until it is known not to read
LAST_S = 2.0  # that the end of the process does
LEAST_COLUMNS = 20
READER_GONE = 141  # 128 + SIGPIPE, as shells have it


class Output(io.RawIOBase):
    """Writes to a file descriptor. While ``shows`` an end of its reader ends the process; else
    nothing does.

    Bytes go through a thread, for a write to a terminal or a pipe may block for ever, and nothing
    tells beforehand.
    """

    def __init__(self, descriptor: int, *, shows: bool) -> None:
        self.shows = shows
        self._descriptor = descriptor
        self._process = os.getpid()
        self._waiting: deque[bytes] = deque()
        self._held = 0
        self._stuck = self._gone = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        data = bytes(data)
        if self.shows or os.getpid() != self._process:  # a fork has no thread
            self._show(data)
            return len(data)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._write_on, name=f"output {self._descriptor}", daemon=True
                )
                self._thread.start()
            # so that a long one goes to a reader that reads
            for at in range(0, len(data), PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                if self._held + len(piece) <= HELD_BYTES:
                    self._waiting.append(piece)
                    self._held += len(piece)
                    self._changed.notify_all()
                if not self._stuck:
                    self._stuck = not self._changed.wait_for(lambda: not self._held, PATIENCE_S)
        return len(data)

    def drain(self, seconds: float) -> None:
        """Wait until all is written, though no longer than that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held, seconds)

    def _show(self, data: bytes) -> None:
        if self._gone:
            return
        try:
            write_all(self._descriptor, data)
        except OSError as error:
            self._gone = True
            if not self.shows:
                return
            if isinstance(error, BrokenPipeError):
                raise SystemExit(READER_GONE) from None
            raise OSError(error.errno, f"standard output: {error.strerror}") from None

    def _write_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                data = self._waiting.popleft()
            with suppress(OSError):
                write_all(self._descriptor, data)
            with self._changed:
                self._held -= len(data)
                self._stuck = self._stuck and self._held > 0
                self._changed.notify_all()


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, also where another process made the terminal non-blocking. Raises
    OSError.
    """
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


_outputs: dict[str, Output] = {}


def guard(*, shows: bool = False) -> None:
    """Put these in the place of sys.stdout and sys.stderr; again, it changes what standard output
    is for.

    Characters that the terminal's encoding lacks come out as escapes. A descriptor that was closed
    (``>&-``) leads to nowhere from now on, so that no file of ours gets its number. COLUMNS=0,
    which some terminals set, does not mean that nothing is to be shown. Streams that somebody has
    put in place are left alone.

    Args:
        shows: the output is all that the command is for.
    """
    if (
        os.environ.get("COLUMNS", "80").isdigit()
        and int(os.environ.get("COLUMNS", "80")) < LEAST_COLUMNS
    ):
        del os.environ["COLUMNS"]
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for name, descriptor, ends in (("stdout", 1, shows), ("stderr", 2, False)):
        before: TextIO | None = getattr(sys, name)
        if isinstance(ours := getattr(before, "buffer", None), Output):
            ours.shows = ends
            continue
        if before is not getattr(sys, f"__{name}__"):
            continue
        encoding, errors = getattr(before, "encoding", "utf-8"), getattr(before, "errors", "strict")
        with suppress(OSError, AttributeError):
            before.flush()
        output = _outputs[name] = Output(descriptor, shows=ends)
        errors = "backslashreplace" if errors == "strict" else errors
        setattr(sys, name, io.TextIOWrapper(output, encoding, errors, write_through=True))
    atexit.unregister(drain)
    atexit.register(drain)


def drain(seconds: float = LAST_S) -> None:
    """Wait until what was printed is written, or ``seconds`` are over."""
    until = time.monotonic() + seconds
    for output in _outputs.values():
        output.drain(max(0.0, until - time.monotonic()))

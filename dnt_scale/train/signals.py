"""The signals that end a run at its next step, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the signals that end a run, for the loop to read; a second SIGINT interrupts at once.

    SIGHUP, which a terminal sends as it goes, is one of them, unless it was ignored when the
    process began (nohup). It may come more than once (from the kernel and from the shell), so from
    then on it is ignored for good.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    before = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    if hangs_up:
        signal.signal(signal.SIGHUP, receive)
    try:
        yield received
    finally:
        if hangs_up:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number, handler in before.items():
            signal.signal(number, handler)

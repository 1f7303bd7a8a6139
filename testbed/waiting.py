"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 300.0) -> None:
    """Wait for `condition`, looking often, but four fifths of the time leaving the processor to
    those it waits for. A busy machine needs five times as long as an idle one.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(max(0.001, 4 * (time.monotonic() - began)))

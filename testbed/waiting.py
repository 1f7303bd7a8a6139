"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 300.0, every: float = 0.02) -> None:
    """Wait for `condition`, and leave the processor to those it waits for.

    Args:
        condition: asked again and again until it is true.
        seconds: when to give up. A busy machine needs five times as long as an idle one.
        every: seconds between two looks, for who must hit a moment; a look that costs time itself
            is taken less often, so that a wait is never more than a tenth of a core.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(max(every, min(1.0, 9 * (time.monotonic() - began))))

"""Ports for servers of tests, of which no two workers ever take the same."""

import itertools
import os
import socket

# Below the ports that Linux gives out by itself (32768 on), so that no connection takes one either.
FIRST, EACH = 12_000, 2_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
_next = itertools.count(os.getpid())


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    while True:
        port = FIRST + EACH * _WORKER + next(_next) % EACH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port

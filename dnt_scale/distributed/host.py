"""This machine and its processes, by names that mean the same to all ranks."""

import os
import socket
from contextlib import suppress
from pathlib import Path


def host() -> str:
    """This machine as its scheduler calls it, which may be shorter than its hostname."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def machine() -> str:
    """A name for this kernel and set of process numbers (containers have their own)."""
    parts = []
    with suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join([socket.gethostname(), *parts])


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None where there is none, or only its exit status."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])

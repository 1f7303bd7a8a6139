"""This machine and its processes, by names that mean the same to all ranks."""

import os
import socket
from pathlib import Path

import psutil


def host() -> str:
    """Return this machine's name as its scheduler has it: its hostname, or a shorter one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def machine() -> str:
    """Return a name for this kernel and its set of process numbers (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # This is not Linux.
        return socket.gethostname()


# Ranks of this machine, this one among them, that may use the same CPUs: 1 until they have met, see
# ``threads.share_cpus``.
sharing = 1


def cpus() -> frozenset[int]:
    """Return the numbers of the CPUs that this process may use. srun binds each task to some of its
    own.
    """
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpus_of_a_rank() -> int:
    """Return how many CPUs there are for each of the ranks that share those of this process."""
    return max(1, len(cpus()) // sharing)


def cores() -> int:
    """Return of how many cores the CPUs of this process are: those of one core share what computes,
    and count once where Linux tells.
    """
    try:
        return len(
            {
                Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
                for cpu in cpus()
            }
        )
    except OSError:
        return len(cpus())


def start_ticks(pid: int) -> int:
    """Return when a process was started, in clock ticks since boot; 0 where Linux does not tell.

    psutil adds the time of the boot, which Linux gives in whole seconds and moves when the clock
    is set: one process has several such times.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def has_ended(pid: int, started: int, machine_of_it: str) -> bool:
    """Return whether a process is one of this machine that has ended, or left only its exit status.

    Args:
        started: what ``start_ticks`` said of it, for another process may have its number by now;
            0: not known.
        machine_of_it: what ``machine`` said where it runs. Nothing is known of other machines.
    """
    if machine_of_it != machine():
        return False
    try:
        if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return True
        now = start_ticks(pid)
        return bool(started and now and started != now)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False

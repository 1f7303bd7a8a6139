"""How much memory a process has taken at most."""

import re
from pathlib import Path


def peak_kb() -> int:
    """Return the largest resident memory of this process so far, in kB.

    Not `resource.getrusage`'s ru_maxrss: a process begins with that of the one that started it,
    so in a test it is at least what pytest had taken.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found, status
    return int(found[1])

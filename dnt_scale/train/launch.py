"""What starts training in another process, as `dnt train` or torchrun would, and what that said."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# variables of whoever started this process
LAUNCHERS = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_STEP_",
)


def command(overrides: Sequence[str], ranks: int) -> list[str]:
    """Return what trains ``overrides`` in one process, or on several ranks under torchrun."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    return [sys.executable, "-P", *launcher, "-m", "dnt_scale.train", *overrides]


def environment() -> dict[str, str]:
    """Return the variables of this process without those of a launcher."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}


def complaint(log: Path) -> str:
    """Return what a failed start said last: its error, or else its last lines."""
    text = log.read_text(errors="replace")
    found = re.findall(r"^(?:rank \d+: )?error: (.*)", text, re.MULTILINE)
    return found[-1] if found else "\n".join(text.splitlines()[-10:])

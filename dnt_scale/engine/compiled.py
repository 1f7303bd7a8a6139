"""What torch.compile makes of blocks: where it is kept, and how long it took."""

import os
from pathlib import Path

import torch
from torch._dynamo.utils import calculate_time_spent

CACHE = "TORCHINDUCTOR_CACHE_DIR"
# of a block: training and validation have graphs of their own, and so has each length of rows and
# size of a last, smaller batch
SHAPES = 64


def prepare() -> None:
    """Keep what is compiled in the user's cache, where nobody chose another place; to be called
    before anything is compiled.

    Torch's own place is a temporary folder, which a restart of the machine empties.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    if CACHE not in os.environ:
        try:
            user = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
            folder = Path(user, "dnt-scale", "compiled")
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or none that can be written: torch's own place
            return
        os.environ[CACHE] = str(folder)


def seconds() -> float:
    """Return how long this process has compiled until now."""
    return calculate_time_spent()["total_wall_time"]

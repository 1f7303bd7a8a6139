"""What failures and checkpoints leave of the time: expected goodput."""

import math
from dataclasses import dataclass

# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section
# 3.3.4), so one in about 50,700 hours of a GPU.
GPU_HOURS_A_FAILURE = 54 * 24 * 16_384 / 419
RESTART_S = 300.0  # assumed: until a new attempt may begin, without reading its checkpoint
STORAGE_BYTES_S = 2e9  # assumed: what a node writes to or reads from storage that all share
STORAGE_TOTAL_BYTES_S = 100e9  # assumed: what that takes from all nodes together
HOST_COPY_BYTES_S = 10e9  # assumed: from a GPU into the host's memory


@dataclass(frozen=True)
class Goodput:
    """Expected share of the time that steps which count take, and what it depends on; seconds."""

    share: float
    between_failures: float
    best_interval: float  # between checkpoints


def storage_seconds(size: float, nodes: int) -> float:
    """Return the seconds to write a checkpoint, or to read it."""
    return size / min(STORAGE_BYTES_S * nodes, STORAGE_TOTAL_BYTES_S)


def goodput(
    ranks: int,
    gpu_hours_a_failure: float,
    interval: float,
    waits: float,
    save: float,
) -> Goodput:
    """Return the expected goodput.

    Of a time M between failures each one loses half an interval t between checkpoints and the
    restart R; each interval waits w for its checkpoint: 1 / ((1 + w / t) (1 + (R + t / 2) / M)). It
    is highest near t = sqrt(2 w M) (Young, 1974), and t is no less than a checkpoint takes. R is
    ``RESTART_S`` and as long as writing takes, for reading.

    Args:
        interval: seconds of training between checkpoints.
        waits: seconds that training waits for one.
        save: seconds until one is written.
    """
    between = 3600.0 * gpu_hours_a_failure / ranks
    lost = (RESTART_S + save + interval / 2) / between
    share = 1.0 / ((1.0 + waits / interval) * (1.0 + lost))
    return Goodput(share, between, max(save, math.sqrt(2.0 * waits * between)))

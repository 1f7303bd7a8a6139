"""Units (of text, tokens) a second, and MFU."""

import torch

from dnt_scale.config import RunConfig, Unit
from dnt_scale.config.hardware import hardware_of
from dnt_scale.distributed.process_group import Ranks

Metrics = dict[str, float | int | None]


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak in FLOP/s, without sparsity; None where it is not known,
    as of a CPU: an unknown MFU rather than a wrong one.
    """
    if device.type != "cuda":
        return None
    known = hardware_of(torch.cuda.get_device_name(device))
    return 1e12 * known.bf16_tflops if known else None


def speed(run: RunConfig, unit: Unit, flops_a_row: float, seconds: float, ranks: Ranks) -> Metrics:
    """Return what a step of so many seconds tells of a run's speed.

    That is units a second over all ranks (``tokens_per_s``); MFU = rows/s x FLOPs a row / (ranks x
    peak), left out if no peak is known; and on CUDA this rank's peak allocated memory in GB (1e9
    bytes).
    """
    metrics: Metrics = {f"{unit.name}_per_s": unit.of(run.train.global_batch) / seconds}
    if peak := peak_flops(ranks.device):
        flops = run.train.global_batch * flops_a_row
        metrics["mfu"] = flops / seconds / (ranks.world_size * peak)
    if ranks.device.type == "cuda":
        metrics["memory_gb"] = torch.cuda.max_memory_allocated(ranks.device) / 1e9
    return metrics

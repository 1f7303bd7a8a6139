"""Tokens a second and MFU."""

import torch

from dnt_scale.config import RunConfig
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.flops import flops_per_token

Metrics = dict[str, float | int | None]


# Dense bf16 peaks without sparsity, FLOP/s, from the vendors' data sheets. Longest matching name wins; a device
# that is not here has an unknown MFU rather than a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (a CPU, an unlisted GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matching = [known for known in PEAK_FLOPS if name.startswith(known)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def speed(run: RunConfig, seq_len: int, seconds: float, me: Ranks) -> Metrics:
    """Tokens a second over all ranks; MFU = tokens/s x flops_per_token / (ranks x peak), left out if no peak is known;
    and on CUDA this rank's peak allocated memory in GB (1e9 bytes)."""
    tokens_per_s = run.train.global_batch * seq_len / seconds
    metrics: Metrics = {"tokens_per_s": tokens_per_s}
    if peak := peak_flops(me.device):
        metrics["mfu"] = tokens_per_s * flops_per_token(run.model, seq_len) / (me.world_size * peak)
    if me.device.type == "cuda":
        metrics["memory_gb"] = torch.cuda.max_memory_allocated(me.device) / 1e9
    return metrics


def speed_at(mfu: float, peak: float, run: RunConfig, seq_len: int, ranks: int) -> float:
    """Tokens a second over all ranks when each computes at ``mfu`` of ``peak`` FLOP/s: what ``speed`` reports, turned
    round."""
    return mfu * peak * ranks / flops_per_token(run.model, seq_len)

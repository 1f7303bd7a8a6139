"""Which dtype a run computes in where ``train.dtype`` is auto: bf16 where the hardware multiplies
it faster than fp32.

Many processors have no bf16 arithmetic: there a bf16 matmul takes 4 to 100 times as long as one in
fp32. So a start times one small matmul of each, and records what it chose as ``train.dtype``; a
resume computes as recorded. fp8 is never chosen: it is asked for, and refused where it cannot be.
"""

import logging
import math
import time
from typing import Any

import torch

from dnt_scale.config import ConfigError, RunConfig, validate
from dnt_scale.distributed.agree import highest, together
from dnt_scale.distributed.process_group import Ranks

# of the square matrices that are timed: smaller ones measure the call rather than the arithmetic
SIDE = 256
ROUNDS = 8
FEWEST = 3  # the first makes oneDNN compile, and another process may take the processor away in one
ENOUGH_S = 0.005  # a bf16 product, where more rounds would only take longer
# bf16 also rounds and converts around its matmuls, so it pays only where they are clearly faster
PAYS_BELOW = 0.8
FP8_FROM = (8, 9)  # compute capability of the first GPUs with fp8 products, Ada; Hopper's is 9.0


def bf16_cost(device: torch.device) -> float:
    """Return the time of a bf16 matmul over that of an fp32 one on a CPU, measured in some
    milliseconds.

    A CUDA device is asked instead: 0 where it has bf16 arithmetic, infinity where it has not.
    """
    if device.type == "cuda":
        return 0.0 if torch.cuda.is_bf16_supported(including_emulation=False) else math.inf
    threads = torch.get_num_threads()
    # on a busy machine threads wait for each other, which would be all that is timed
    torch.set_num_threads(1)
    try:
        matrices = {
            dtype: torch.ones(SIDE, SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        best = dict.fromkeys(matrices, math.inf)
        for number in range(ROUNDS):
            for dtype, matrix in matrices.items():
                started = time.perf_counter()
                torch.mm(matrix, matrix)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
            if number + 1 >= FEWEST and best[torch.bfloat16] > ENOUGH_S:
                break
        return best[torch.bfloat16] / best[torch.float32]
    finally:
        torch.set_num_threads(threads)


def faster(cost: float) -> str:
    """Return the dtype to compute in, bf16 or fp32, where a bf16 matmul costs so much of an fp32
    one.
    """
    return "bf16" if cost < PAYS_BELOW else "fp32"


def resolve(
    run: RunConfig, ranks: Ranks, command: str, recorded: str | None
) -> tuple[RunConfig, str]:
    """Return ``run`` with a dtype in place of auto, and a line for the user or "". A collective.

    Args:
        command: the ``train.dtype`` of the command alone; where it is auto, ``run`` may have the
            recorded one already.
        recorded: what the checkpoint that the run resumes from was trained in; auto keeps it. None:
            a first start.

    Raises:
        AgreedError: it is fp8, which this machine cannot compute in.
        ConfigError: as of ``with_dtype``.
    """
    asked = run.train.dtype
    if (recorded if asked == "auto" else asked) == "fp8":
        together(ranks, lambda: check_fp8(ranks.device))
        return with_dtype(run, "fp8"), ""
    if asked == "fp32" and (recorded is None or command == "fp32"):
        return run, ""
    cost = highest(round(1000 * min(bf16_cost(ranks.device), 1e6)))[0] / 1000  # the slowest rank's
    best = faster(cost)
    chosen = (recorded or best) if asked == "auto" else asked
    line = ""
    if chosen == "bf16" != best:
        whose = "recorded with the checkpoint" if recorded == "bf16" else "asked for"
        line = (
            f"train.dtype: bf16 was {whose}, but {slowness(ranks.device, cost)}; train.dtype=fp32 "
            "is "
            "faster"
        )
    elif chosen != best:
        line = (
            f"train.dtype: {chosen}, as recorded with the checkpoint; on this machine {best} is "
            "faster"
        )
    return with_dtype(run, chosen), line


def check_fp8(device: torch.device) -> None:
    """Raise ConfigError where ``device`` has no fp8 products, or torchao is not there."""
    cuda = device.type == "cuda"
    if not cuda or torch.cuda.get_device_capability(device) < FP8_FROM:
        found = "a CPU"
        if cuda:
            major, minor = torch.cuda.get_device_capability(device)
            found = f"{torch.cuda.get_device_name(device)}, of {major}.{minor}"
        raise ConfigError(
            "train.dtype is fp8, which takes a CUDA GPU of compute capability "
            f"{'.'.join(map(str, FP8_FROM))} or higher (Ada, Hopper, Blackwell), but this is "
            f"{found}; use train.dtype=bf16"
        )
    float8_layers()


def float8_layers() -> Any:
    """Import torchao's module of float8 layers, and return it.

    Raises:
        ConfigError: it is not there, or does not go with this torch.
    """
    # They warn, of kernels for other GPUs that torchao could not load and of a class that torch
    # knows better: the products in fp8 are torch's own.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        from torchao import float8
    except ImportError as error:
        raise ConfigError(
            f"train.dtype is fp8, which torchao computes, but {error}; pip install "
            "'dnt-scale[fp8]', or use train.dtype=bf16"
        ) from None
    return float8


def for_inference(recorded: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype in which to use weights of a run trained in ``recorded``, and a line about
    it, or none.

    What computes in bf16 elsewhere is computed in fp32 where bf16 is slower: weights are stored in
    fp32. What was trained in fp8 is used as if it had been in bf16.
    """
    if recorded == "fp32":
        return torch.float32, ""
    cost = bf16_cost(device)
    if faster(cost) == "bf16":
        return torch.bfloat16, ""
    line = (
        f"computing in fp32: the run was trained in {recorded}, but {slowness(device, cost)}"
        if recorded in ("bf16", "fp8")
        else ""
    )
    return torch.float32, line


def for_preflight(run: RunConfig, ranks: Ranks) -> torch.dtype:
    """Return the dtype in which to time the devices of a run, the same on all ranks. A
    collective.
    """
    if run.train.dtype == "fp8":  # the rest of a step is bf16, which older GPUs have too
        return torch.bfloat16
    resolved, _ = resolve(run, ranks, run.train.dtype, None)
    return torch.bfloat16 if resolved.train.in_bf16 else torch.float32


def slowness(device: torch.device, cost: float) -> str:
    """Say how much slower bf16 is than fp32 on a device where it does not pay."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic"
    return f"a bf16 matmul takes {cost:.2g} times as long as an fp32 one here"


def expected(run: RunConfig, gpus: bool) -> RunConfig:
    """Return ``run`` with what auto is most likely to become on nodes with or without GPUs, for
    estimates.
    """
    if run.train.dtype != "auto":
        return run
    return with_dtype(run, "bf16" if gpus and run.run.device != "cpu" else "fp32")


def with_dtype(run: RunConfig, dtype: str) -> RunConfig:
    """Return ``run`` with another ``train.dtype``, checked as a whole.

    Raises:
        ConfigError: the engine's settings do not go with it.
    """
    if dtype == run.train.dtype:
        return run
    raw = run.model_dump(mode="json")
    raw["train"]["dtype"] = dtype
    return validate(raw)

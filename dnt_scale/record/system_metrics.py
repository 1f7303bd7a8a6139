"""``RUN/logs/system/NODE.jsonl``: what the machines of a run were doing, over all its attempts.

The first rank of every node appends a line every ``tracking.system_every_s`` seconds: ``time``
(seconds since 1970), ``step`` (the last one done), and

    cpu_percent            of all cores, whoever used them, since the line before
    memory_used_gb, memory_percent    the host's (GB of 1e9 bytes)
    disk_free_gb           where the run folder lies
    gpu0/percent, gpu0/memory_used_gb,
    gpu0/temperature_c, gpu0/power_w    and so on: the GPUs that this run sees

It is a thread's work, which never reaches training: what cannot be measured or written is left out.
A sender passes the lines on (:mod:`dnt_scale.record.appended`) as the metrics
``system/NODE/cpu_percent`` and so on.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psutil

if TYPE_CHECKING:
    from dnt_scale.config import RunConfig
    from dnt_scale.distributed.process_group import Ranks

GB = 1e9

Sample = dict[str, float]


# --- on every node --------------------------------------------------------------------------------


@contextmanager
def sampling(run: RunConfig, ranks: Ranks, step: Callable[[], int]) -> Iterator[None]:
    """Append a sample now and then for the length of a block, where this rank is its node's first.

    Args:
        step: tells the last step done.
    """
    every_s = run.tracking.system_every_s
    if not (run.tracking.enabled and every_s and ranks.local_rank == 0):
        yield
        return
    over = threading.Event()
    gpus = ranks.device.type == "cuda"
    arguments = (run.run.dir, every_s, step, gpus, over)
    thread = threading.Thread(target=_keep_sampling, args=arguments, name="system metrics")
    thread.daemon = True
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2.0)  # A disk that does not answer is left behind.


def _keep_sampling(
    run_dir: Path,
    every_s: float,
    step: Callable[[], int],
    gpus: bool,
    over: threading.Event,
) -> None:
    handles: list[Any] = []
    with suppress(Exception):  # There is no NVML here, or no right to ask it.
        handles = _gpu_handles() if gpus else []
    file = folder(run_dir) / f"{socket.gethostname()}.jsonl"
    psutil.cpu_percent()  # The first answer has nothing to compare with.
    while not over.wait(every_s):
        with suppress(Exception):  # The disk is full or away; the next sample may go well.
            _append(file, step(), {**_host(run_dir), **_gpus(handles)})


def folder(run_dir: Path) -> Path:
    """Return where the samples lie."""
    return run_dir / "logs" / "system"


def _append(file: Path, step: int, sample: Sample) -> None:
    """Add one line, with one write. Raises OSError."""
    rounded = {name: round(value, 3) for name, value in sample.items()}
    content = {"time": round(time.time(), 3), "step": step, **rounded}
    line = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write(line)


def _host(run_dir: Path) -> Sample:
    memory = psutil.virtual_memory()
    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_used_gb": (memory.total - memory.available) / GB,
        "memory_percent": memory.percent,
        "disk_free_gb": psutil.disk_usage(str(run_dir)).free / GB,
    }


def _gpu_handles() -> list[Any]:
    """Return NVML's handles of the GPUs that torch sees, in torch's order.

    Raises whatever NVML raises.
    """
    import pynvml
    import torch

    pynvml.nvmlInit()
    numbers = range(torch.cuda.device_count())
    uuids = [torch.cuda.get_device_properties(number).uuid for number in numbers]
    return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]


def _gpus(handles: list[Any]) -> Sample:
    if not handles:
        return {}
    import pynvml

    sensor = pynvml.NVML_TEMPERATURE_GPU
    values: dict[str, Callable[[Any], float]] = {
        "percent": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_used_gb": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / GB,
        "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, sensor),
        "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    }
    sample = {}
    for number, gpu in enumerate(handles):
        for name, ask in values.items():
            # A slice of a GPU has no power or temperature of its own.
            with suppress(pynvml.NVMLError):
                sample[f"gpu{number}/{name}"] = float(ask(gpu))
    return sample

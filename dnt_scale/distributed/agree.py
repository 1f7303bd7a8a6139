"""What the ranks of a run agree on: a value, a failure, that all have the same settings and
code.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from dnt_scale.distributed.errors import AgreedError, AgreedFault, is_fault
from dnt_scale.distributed.process_group import Ranks

T = TypeVar("T")


def highest(*values: int) -> tuple[int, ...]:
    """The largest of all ranks' values, each by itself, on every rank. A collective: all ranks
    call it together.
    """
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def on_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank. A collective; the result travels pickled
    between our ranks.

    Raises:
        AgreedError: on every rank, when it raised ValueError or OSError; AgreedFault for one that
            :func:`is_fault`.
    """
    outcome: list[T | AgreedError | None] = [None, None]
    if ranks.first:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = agreed(error)
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[1], AgreedError):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def together(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and give each its own result. A collective, so ``action`` must
    not hold one.

    Raises:
        AgreedError: on every rank, when any raised ValueError or OSError, with the first such
            message; AgreedFault for one that :func:`is_fault`.
    """
    result, failure = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        failure = agreed(error, "" if ranks.first else f"rank {ranks.rank}: ")
    failures: list[AgreedError | None] = [None] * ranks.world_size
    dist.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise found
    return result  # type: ignore[return-value]


def agreed(error: Exception, speaker: str = "") -> AgreedError:
    """The error as all ranks are going to raise it."""
    return (AgreedFault if is_fault(error) else AgreedError)(f"{speaker}{error}")


# what changes a GPU's arithmetic, or which code runs
NUMERIC_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "DS_ACCELERATOR",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def check_settings(ranks: Ranks, settings: Mapping[str, object]) -> None:
    """That every rank has the settings, the code, the libraries and the environment that rank 0
    has. A collective.

    Args:
        settings: ``config.flat(run)``.

    Raises:
        AgreedError: on every rank, as ``same_everywhere``.
    """
    same_everywhere(ranks, {**settings, **surroundings(ranks)})


def surroundings(ranks: Ranks) -> dict[str, object]:
    """What beside the configuration a run's numbers depend on: code, versions, environment."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("deepspeed", "numpy", "torchao"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **{f"the version of {name}": version for name, version in versions.items()},
        "the device": ranks.device.type,
        "the code of dnt_scale": code.hexdigest()[:12],
        **{f"the variable {name}": os.environ.get(name, "not set") for name in NUMERIC_VARIABLES},
    }


def same_everywhere(ranks: Ranks, what: Mapping[str, object]) -> None:
    """That ``what``, names to plain values, is on every rank as on rank 0. A collective.

    Raises:
        AgreedError: on every rank; names the first rank and field that differ, and both values.
    """
    expected = on_first(ranks, lambda: dict(what))
    difference = next(
        (name for name in sorted({*what, *expected}) if what.get(name) != expected.get(name)),
        None,
    )
    found: list[tuple[str, object] | None] = [None] * ranks.world_size
    dist.all_gather_object(
        found, None if difference is None else (difference, what.get(difference))
    )
    for rank, other in enumerate(found):
        if other is not None:
            name, value = other
            raise AgreedError(
                f"{name} is {value} on rank {rank}, but {expected.get(name)} on rank 0; "
                "start every rank with the same command, in the same environment, from the same "
                "code"
            )

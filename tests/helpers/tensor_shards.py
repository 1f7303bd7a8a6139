"""Made-up tensors and the ways engines cut them, for tests of checkpoints without an engine."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dnt_scale.checkpoint import Saver, State
from dnt_scale.checkpoint.tensor_shards import TensorShard, flat_shards
from dnt_scale.distributed.process_group import Ranks

Tensors = Mapping[str, Tensor]


def rows(tensors: Tensors, rank: int, ranks: int) -> list[TensorShard]:
    """FSDP2's shards: as many whole rows a rank as go, the last ranks perhaps none; scalars on
    rank 0.
    """
    shards = []
    for name, tensor in tensors.items():
        if not tensor.dim():
            shards.append(TensorShard(name, (), (), tensor, rank, ranks))
            continue
        each = -(-len(tensor) // ranks)
        first = min(rank * each, len(tensor))
        offset = (first, *(0,) * (tensor.dim() - 1))
        shards.append(TensorShard(name, tuple(tensor.shape), offset, tensor[first : first + each]))
    return shards


def copies(tensors: Tensors, rank: int, ranks: int) -> list[TensorShard]:
    """DDP's: everything everywhere."""
    return [
        TensorShard(name, tuple(t.shape), (0,) * t.dim(), t, rank, ranks)
        for name, t in tensors.items()
    ]


def columns(tensors: Tensors, rank: int, ranks: int) -> list[TensorShard]:
    """Tensor parallelism's: a part of the last dimension; where there is one at most, rows."""
    shards = []
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            shards += rows({name: tensor}, rank, ranks)
            continue
        each = -(-tensor.shape[-1] // ranks)
        first = min(rank * each, tensor.shape[-1])
        offset = (*(0,) * (tensor.dim() - 1), first)
        shards.append(
            TensorShard(name, tuple(tensor.shape), offset, tensor[..., first : first + each])
        )
    return shards


def flat(tensors: Tensors, rank: int, ranks: int) -> list[TensorShard]:
    """ZeRO 1 and 2's: all tensors end to end, cut into equal parts anywhere."""
    total = sum(t.numel() for t in tensors.values())
    first, last = (total * number // ranks for number in (rank, rank + 1))
    shards, place = [], 0
    for name, tensor in tensors.items():
        start, end = max(first, place), min(last, place + tensor.numel())
        if start < end:
            run = tensor.view(-1)[start - place : end - place]
            shards += flat_shards(name, tuple(tensor.shape), start - place, run)
        place += tensor.numel()
    return shards


def flat_each(tensors: Tensors, rank: int, ranks: int) -> list[TensorShard]:
    """ZeRO 3's: each tensor cut into equal parts anywhere."""
    return [
        shard for name, tensor in tensors.items() for shard in flat({name: tensor}, rank, ranks)
    ]


CUTS = (rows, copies, columns, flat, flat_each)


def some_tensors(scale: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Two weights and a scalar with their momentum, one of it in bf16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"emb.weight": (50 * scale, 33), "norm.gain": (33,), "temperature": ()}
    weights = {
        f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    momentum = {
        f"momentum_buffer.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    momentum["momentum_buffer.emb.weight"] = momentum["momentum_buffer.emb.weight"].bfloat16()
    return weights | momentum


def some_state(step: int, ranks: int = 1, **changes: object) -> State:
    fields = {
        "step": step,
        "consumed_rows": 8 * step,
        "tokens": 512 * step,
        "skipped": 0,
        "seed": 1234,
        "run_id": "test",
        "manifest_sha256": "",
        "tokenizer_sha256": "",
        "world_size": ranks,
        "config": {"run": {"name": "made-up"}, "engine": {"name": "fsdp"}, "model": {"width": 33}},
        "engine": {"step": step, "updates": step},
        "files": {},
    }
    return State.model_validate({**fields, **changes})


def zeros(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether tensors are the same to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and bits(one[name]) == bits(other[name])
        for name in one
    )


def save_made_up(
    folder: Path | str, step: int, me: Ranks, seed: int = 0, **changes: object
) -> dict[str, Tensor]:
    """A checkpoint of `some_tensors`, written by one rank."""
    whole = some_tensors(seed=seed)
    saver = Saver(folder, me, keep=99)
    saver.save(some_state(step, **changes), copies(whole, 0, 1))
    saver.commit(wait=True)
    saver.close()
    return whole

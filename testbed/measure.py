"""What an engine takes: bytes of memory and of collectives, measured on real ranks, and on ranks
that are made up.

The `print_` functions run on every rank, through `call`, and print one line of JSON.
"""

import ctypes
import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnt_scale.config import RunConfig
from dnt_scale.distributed import process_group
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine import build as build_engine
from dnt_scale.engine.base import Engine
from dnt_scale.engine.parallelize import parallelize
from dnt_scale.model.dnt import DNT
from dnt_scale.model.task import LossModule
from dnt_scale.optim.build import build_optimizer
from dnt_scale.optim.shards import local
from testbed.configs import composed
from testbed.run import TINY_RUN, Finished

# which argument is the whole tensor: what a gather makes, what a reduce-scatter is given, what is
# reduced in place
COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
}


def answers(finished: Finished) -> list[Any]:
    """What the ranks printed, in the order of ranks."""
    return [json.loads(line) for line in finished.ok().out.splitlines() if line[:1] in "[{"]


def run_config(overrides: Sequence[str]) -> RunConfig:
    """A tiny run; of rows of `model.context` random tokens, for there are no data."""
    return composed(*TINY_RUN, "data.path=none", "run.dir=none", *overrides)


@contextmanager
def engine(run: RunConfig, me: Ranks) -> Iterator[Engine]:
    built = build_engine(run, lambda: DNT(run.model), me, 100)
    yield built
    built.close()


def batch(run: RunConfig, me: Ranks) -> Tensor:
    generator = torch.Generator().manual_seed(me.rank)
    rows = run.train.global_batch // me.world_size
    return torch.randint(
        0, run.model.vocab_size, (rows, run.model.context + 1), generator=generator
    )


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2, of which the fifth field is the bytes of pieces that are mapped
    for themselves.
    """

    _fields_ = [
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("after", ctypes.c_size_t * 5),
    ]


class Meter(TorchDispatchMode):
    """Bytes in use since it was made, and inside a `with` block the most of them after any
    operation of torch that gives a large tensor or is a collective: glibc takes its time to count.

    Counted is what the process has allocated in pieces of LARGE bytes or more, by any thread, and
    not given back: glibc then maps each such piece for itself and knows their sum, once the holes
    in its heap are plugged. Smaller ones, Python objects mostly, are left out. Unlike the resident
    set it has no memory that is free but kept, and unlike torch's profiler it sees what other
    threads free, as gloo's do.
    """

    LARGE = 1 << 15

    def __init__(self) -> None:
        super().__init__()
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, self.LARGE)  # M_MMAP_THRESHOLD, which otherwise grows
        libc.mallopt(-2, 0)  # M_TOP_PAD: the end of the heap has room for large pieces otherwise
        libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD
        self._mallinfo = libc.mallinfo2
        self._mallinfo.restype = _MallInfo
        mapped = self._mapped()
        while self._mapped() == mapped:
            libc.malloc(self.LARGE)  # never freed
        self._before = self._mapped()
        self.peak = 0

    def _mapped(self) -> int:
        return int(self._mallinfo().hblkhd)

    def now(self) -> int:
        return self._mapped() - self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if func.namespace == "c10d" or any(
            tensor.untyped_storage().nbytes() >= self.LARGE for tensor in tensors
        ):
            self.peak = max(self.peak, self.now())
        return result


@dataclass
class Collectives(TorchDispatchMode):
    """Counts the bytes of all collectives that are called inside a `with` block."""

    found: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.namespace == "c10d"
            and (name := func._schema.name.partition("::")[2]) in COLLECTIVES
        ):
            kind, place = COLLECTIVES[name]
            whole = args[place]
            for tensor in whole if isinstance(whole, list) else [whole]:
                self.found[kind] += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def print_costs(overrides: Sequence[str], depths: Sequence[int]) -> None:
    """Of the model at each depth: bytes `held` between backward and update of the second step, at
    the `peak` of that step, in `shards` of each kind, and of a step's collectives by kind, as
    `traffic`.

    What does not grow with the model (imports, buckets, a block's gathered weights) is in the
    differences no more. The first depth is not reported: what the first engine of a process leaves
    behind would be in its numbers.
    """
    me = process_group.start("cpu")
    found: list[dict[str, Any]] = []
    for depth in depths:
        run = run_config([*overrides, f"model.layers={depth}"])
        meter, held = Meter(), [0]

        def judge(
            loss: float, grad_norm: float, meter: Meter = meter, held: list[int] = held
        ) -> float:
            held.append(meter.now())
            return 1.0

        with engine(run, me) as built:
            rows = batch(run, me)
            built.train_step(rows, judge)
            with meter:
                built.train_step(rows, judge)
            with Collectives() as counted:
                built.train_step(rows, lambda loss, grad_norm: 1.0)
            shards: Counter[str] = Counter()
            for shard in built.shards():
                shards[shard.name.partition(".")[0]] += (
                    shard.data.numel() * shard.data.element_size()
                )
        found.append(
            {"held": held[2], "peak": meter.peak, "shards": shards, "traffic": counted.found}
        )
        del built
        gc.collect()
    print(json.dumps(found[1:]))
    process_group.stop()


def print_simulated(overrides: Sequence[str], world_size: int) -> None:
    """Bytes of storage that rank 0 of `world_size` holds after a backward pass: a simulation, in
    this one process.

    The sharding is `parallelize`'s own, over a fake process group; tensors are fake and have no
    storage behind them.
    """
    run = run_config(overrides)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    with torch.device("meta"):
        model = LossModule(DNT(run.model))
    parallelize(model, run, Ranks(0, 0, world_size, torch.device("cpu")))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        rows = [
            (name, nn.Parameter(local(parameter.detach())))
            for name, parameter in model.task.named_parameters()
        ]
        optimizer = build_optimizer(rows, run.optim, run.run.seed)
        optimizer.allocate()
        model(torch.zeros(1, 9, dtype=torch.int64)).backward()
        found = {
            "weights": storage(parameter for _, parameter in rows),
            "gradients": storage(local(p.grad) for p in model.parameters() if p.grad is not None),
            "buffers": storage(
                v for state in optimizer.state.values() for k, v in state.items() if k != "step"
            ),
        }
    print(json.dumps(found))


def storage(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages; views of one count once, and padding that no view shows counts too."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

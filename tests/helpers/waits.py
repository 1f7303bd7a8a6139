"""Counts how often the host looks at a number on the device, and would have to wait for it.

On a CPU nothing waits; what would on CUDA is seen all the same: each operation that hands a
tensor's value to Python.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dnt_scale.engine.accumulate_then_step import AccumulateThenStep

P, R = ParamSpec("P"), TypeVar("R")
_aten = torch.ops.aten
# operations whose result, or the shape of it, is known once the device has come by
WAITING_OPS = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.nonzero,
    _aten.masked_select,
}
# methods that read a tensor in C++, where no operation is seen
WAITING_METHODS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
}


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING_OPS:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING_METHODS:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count, in the block, how often the host looks at a tensor's values: by what did it."""
    seen: Counter[str] = Counter()
    with _Operations(seen), _Methods(seen):
        yield seen


def uncounted(seen: Counter[str], function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, of whose looks at tensors ``seen`` learns nothing."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        before = Counter(seen)
        found = function(*args, **kwargs)
        seen.clear()
        seen.update(before)
        return found

    return call


def with_the_devices_root() -> None:
    """Have engines that wait take torch's square root of a norm too, for the rest of the process.

    On CPUs it is MKL's, which is not always the nearest number, as Python's and CUDA's are.
    """
    grad_norm = AccumulateThenStep.grad_norm

    def root(self: AccumulateThenStep, squares: Sequence[float]) -> float:
        grad_norm(self, squares)
        return torch.tensor(squares[0], dtype=torch.float64).sqrt().item()

    AccumulateThenStep.grad_norm = root  # type: ignore[method-assign]

"""The plain momentum update of fp32 tensors on the CPU, in one pass over memory.

fused_cpu.c is compiled with the machine's C compiler when first asked for, so that it uses all that
this processor has. Where there is no compiler, torch's operations do the same, bit for bit, in more
passes.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")

Update = Callable[[list[Tensor], list[Tensor], list[Tensor], float, float, float, float], None]


@cache
def load() -> Update | None:
    """Compile ``update(ps, vs, gs, momentum, keep, shrink, lr)``; None where that cannot be done.

    For each p, v, g of the lists v <- momentum v + keep g, then p <- shrink p - lr v. The tensors
    are fp32, on the CPU, contiguous, and those of a triple of one length.
    """
    with tempfile.TemporaryDirectory(prefix="dnt-kernel-") as folder:
        library = Path(folder, "update.so")
        compiler = shlex.split(os.environ.get("CC") or "cc")
        command = [*compiler, *FLAGS, "-o", str(library), str(SOURCE), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            function = ctypes.CDLL(str(library)).update
        except (OSError, subprocess.SubprocessError):
            return None
    number = ctypes.c_float
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] + [number] * 4 + [ctypes.c_int]
    function.restype = None

    def update(
        ps: list[Tensor],
        vs: list[Tensor],
        gs: list[Tensor],
        momentum: float,
        keep: float,
        shrink: float,
        lr: float,
    ) -> None:
        lengths = [p.numel() for p in ps]
        for tensors in (ps, vs, gs):
            assert [tensor.numel() for tensor in tensors] == lengths
            assert all(
                tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors
            )
        pointers = [
            (ctypes.c_void_p * len(ps))(*[tensor.data_ptr() for tensor in tensors])
            for tensors in (ps, vs, gs)
        ]
        counts = (ctypes.c_ssize_t * len(ps))(*lengths)
        function(*pointers, counts, len(ps), momentum, keep, shrink, lr, torch.get_num_threads())

    return update

"""The plain mSGDW update of fp32 tensors on the CPU in one pass over memory; torch's own operations need two or more.

Compiled with the machine's C compiler when first asked for. Where there is none, torch's operations do the same, bit
for bit: a product is rounded, then added to a multiple that is not (fma), which is what torch's add with alpha does.
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

SOURCE = r"""
#include <math.h>
#include <stddef.h>
#ifndef FP_FAST_FMAF
#error "without a fused multiply-add this would be slow"
#endif
#define RUN 128  // elements read from all arrays before any is written: 6 % faster than one by one
// a parallel region for all tensors: one each makes the step of a model 4 % longer
void update(float **ps, float **vs, const float **gs, const ptrdiff_t *lengths, int tensors, float momentum, float keep,
            float shrink, float lr, int threads)
{
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int tensor = 0; tensor < tensors; tensor++) {
        float *restrict p = ps[tensor], *restrict v = vs[tensor];
        const float *restrict g = gs[tensor];
        ptrdiff_t n = lengths[tensor];
#pragma omp for schedule(static) nowait
        for (ptrdiff_t run = 0; run < n / RUN; run++) {
            ptrdiff_t first = run * RUN;
            float d[RUN], moved[RUN];
            for (int i = 0; i < RUN; i++) d[i] = fmaf(keep, g[first + i], momentum * v[first + i]);
            for (int i = 0; i < RUN; i++) moved[i] = fmaf(-lr, d[i], shrink * p[first + i]);
            for (int i = 0; i < RUN; i++) v[first + i] = d[i];
            for (int i = 0; i < RUN; i++) p[first + i] = moved[i];
        }
#pragma omp single nowait
        for (ptrdiff_t i = n / RUN * RUN; i < n; i++) {
            v[i] = fmaf(keep, g[i], momentum * v[i]);
            p[i] = fmaf(-lr, v[i], shrink * p[i]);
        }
    }
}
"""
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")

Update = Callable[[list[Tensor], list[Tensor], list[Tensor], float, float, float, float], None]


@cache
def load() -> Update | None:
    """``update(ps, vs, gs, momentum, keep, shrink, lr)``, or None where it cannot be compiled.

    For each p, v, g of the lists v <- momentum v + keep g, then p <- shrink p - lr v. The tensors are fp32, on the CPU,
    contiguous, and those of a triple of one length.
    """
    with tempfile.TemporaryDirectory(prefix="dnt-kernel-") as folder:
        source, library = Path(folder, "update.c"), Path(folder, "update.so")
        source.write_text(SOURCE)
        command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, "-o", str(library), str(source), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            function = ctypes.CDLL(str(library)).update
        except (OSError, subprocess.SubprocessError):
            return None
    number = ctypes.c_float
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] + [number] * 4 + [ctypes.c_int]
    function.restype = None

    def update(
        ps: list[Tensor], vs: list[Tensor], gs: list[Tensor], momentum: float, keep: float, shrink: float, lr: float
    ) -> None:
        lengths = [p.numel() for p in ps]
        for tensors in (ps, vs, gs):
            assert [tensor.numel() for tensor in tensors] == lengths
            assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
        pointers = [(ctypes.c_void_p * len(ps))(*[tensor.data_ptr() for tensor in tensors]) for tensors in (ps, vs, gs)]
        counts = (ctypes.c_ssize_t * len(ps))(*lengths)
        function(*pointers, counts, len(ps), momentum, keep, shrink, lr, torch.get_num_threads())

    return update

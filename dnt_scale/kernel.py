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
void update(float *restrict p, float *restrict v, const float *restrict g, ptrdiff_t n, float momentum, float keep,
            float shrink, float lr, int threads)
{
    ptrdiff_t runs = n / RUN;
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 65536)
    for (ptrdiff_t run = 0; run < runs; run++) {
        ptrdiff_t first = run * RUN;
        float d[RUN], moved[RUN];
        for (int i = 0; i < RUN; i++) d[i] = fmaf(keep, g[first + i], momentum * v[first + i]);
        for (int i = 0; i < RUN; i++) moved[i] = fmaf(-lr, d[i], shrink * p[first + i]);
        for (int i = 0; i < RUN; i++) v[first + i] = d[i];
        for (int i = 0; i < RUN; i++) p[first + i] = moved[i];
    }
    for (ptrdiff_t i = runs * RUN; i < n; i++) {
        v[i] = fmaf(keep, g[i], momentum * v[i]);
        p[i] = fmaf(-lr, v[i], shrink * p[i]);
    }
}
"""
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")

Update = Callable[[Tensor, Tensor, Tensor, float, float, float, float], None]


@cache
def load() -> Update | None:
    """``update(p, v, g, momentum, keep, shrink, lr)``, or None where it cannot be compiled.

    v <- momentum v + keep g, then p <- shrink p - lr v, on flat contiguous fp32 CPU tensors of one length.
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
    pointer, number = ctypes.c_void_p, ctypes.c_float
    function.argtypes = [pointer] * 3 + [ctypes.c_ssize_t] + [number] * 4 + [ctypes.c_int]
    function.restype = None

    def update(p: Tensor, v: Tensor, g: Tensor, momentum: float, keep: float, shrink: float, lr: float) -> None:
        assert p.dtype == v.dtype == g.dtype == torch.float32 and p.numel() == v.numel() == g.numel()
        assert p.is_contiguous() and v.is_contiguous() and g.is_contiguous()
        threads = torch.get_num_threads()
        function(p.data_ptr(), v.data_ptr(), g.data_ptr(), p.numel(), momentum, keep, shrink, lr, threads)

    return update

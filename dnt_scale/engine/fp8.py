"""``train.dtype=fp8``: matrices of the blocks are multiplied in fp8, by torchao's linear layers.

Of a layer's three products, y = x W^T, dx = dy W and dW = dy^T x, both factors are rounded to fp8
(x and W to e4m3, dy to e5m2) and the result is bf16. Everything else is as with bf16: embedding,
head, norms, attention, gathered weights, and the fp32 state that the optimizer and checkpoints see.

A whole factor has one scale, which makes its largest magnitude fp8's largest number: torchao's
recipe "tensorwise", by cuBLAS, which it calls its fastest. Its recipe "rowwise", with a scale a row
and products by CUTLASS, gains where numbers of other rows are thousands of times as large: e4m3 has
15 powers of two for normal numbers, and one that is 100 times the others' largest leaves those as
exact as they were (lab log, 2026-11-30).
Scales are measured anew in each product, so that nothing is kept between steps. Weights are
gathered in bf16 and not in fp8: for that torchao puts them into a tensor class of its own, and the
optimizer and checkpoints know them as plain shards.
"""

from torch import nn

from dnt_scale.distributed.compute_dtype import float8_layers
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.model.task import Task

MULTIPLE = 16  # of both sizes of a weight, for the GPU's fp8 products


def layers(task: Task) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Return the linear layers in the blocks of ``task``: those for fp8, and those whose sizes it
    does not take.
    """
    found = [
        layer for block in task.blocks for layer in block.modules() if isinstance(layer, nn.Linear)
    ]
    fits = [not any(size % MULTIPLE for size in layer.weight.shape) for layer in found]
    return (
        [layer for layer, fit in zip(found, fits, strict=True) if fit],
        [layer for layer, fit in zip(found, fits, strict=True) if not fit],
    )


def convert(task: Task) -> None:
    """Have the blocks of ``task`` multiply in fp8 where sizes allow, in place. Parameters and their
    names stay.

    On a CPU too, where torch converts the fp8 numbers before it multiplies: for tests, for nothing
    is gained (``compute_dtype.check_fp8`` refuses a run).

    Raises:
        AgreedError: on every rank, for all have the same model: no layer's sizes allow it.
        ConfigError: torchao is not there.
    """
    chosen, others = layers(task)
    if not chosen:
        sizes = " and ".join(sorted({"x".join(map(str, layer.weight.shape)) for layer in others}))
        raise AgreedError(
            f"train.dtype is fp8, but no linear layer of the model's blocks has two sizes that are "
            f"multiples of {MULTIPLE} (found: {sizes or 'no linear layers'}); use train.dtype=bf16"
        )
    float8 = float8_layers()
    # Tokens of a micro-batch, over which dW sums, are padded to a multiple of 16; most are one.
    config = float8.Float8LinearConfig(pad_inner_dim=True)
    wanted = set(chosen)
    float8.convert_to_float8_training(
        task, module_filter_fn=lambda module, _: module in wanted, config=config
    )


def told(task: Task, *, compiled: bool) -> str:
    """Return a line on how much of ``task`` is multiplied in fp8."""
    chosen, others = layers(task)
    left = f"; {len(others)} stay in bf16, for their sizes are no multiples of {MULTIPLE}"
    slow = "; without engine.compile=true rounding may cost more than its products save"
    return (
        f"train.dtype: fp8 in {len(chosen)} of {len(chosen) + len(others)} linear layers of the "
        f"blocks{left if others else ''}{'' if compiled else slow}"
    )

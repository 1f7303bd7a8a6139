"""What this machine reaches, timed operation by operation at the sizes of a run's own block, and
kept in a file.

Each rate is the work that `work.py` counts for an operation over the least of several times that it
took, forward and backward. Rates are of one rank, with the threads that it has.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dnt_scale.config import ConfigError, ModelConfig, RunConfig
from dnt_scale.config.hardware import hardware_of
from dnt_scale.costs import memory_plan, work
from dnt_scale.costs.work import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    BACKWARD,
    FP32,
    Sizes,
    loss_traffic,
    piece_rows,
    pointwise_bytes,
    sizes_of,
)
from dnt_scale.model.block import Block, Norm
from dnt_scale.model.cpu_ops import Linear
from dnt_scale.model.documents import attention
from dnt_scale.model.linear_cross_entropy import linear_cross_entropy
from dnt_scale.model.rotary import table
from dnt_scale.optim.updates.orthogonalized import newton_schulz
from dnt_scale.tools.planner.machine import GB, Machine, Rates
from dnt_scale.tools.planner.step_time import STEPS, newton_schulz_flops

MOST_TOKENS = 4096  # of what is timed; more would not be faster
REPEATS = 5
COPIED = 1 << 24  # numbers, more than caches hold
Clock = Callable[[], float]


def cache_file() -> Path:
    """Return where rates are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dnt-scale" / "rates.json"


def measured(
    run: RunConfig, seq_len: int, device: torch.device, *, again: bool = False
) -> Rates | None:
    """Return the rates of this machine for a run's sizes, as they were kept; None: never measured.

    Args:
        again: measure, whatever is kept, and keep it.

    Raises:
        ConfigError: the file cannot be read as what this writes.
    """
    path, key = cache_file(), _key(run, seq_len, device)
    try:
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if key in kept and not again:
            return Rates(**kept[key])
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it") from None
    if not again:
        return None
    found = measure(run, seq_len, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({**kept, key: asdict(found)}, indent=2) + "\n", "utf-8")
    beside.replace(path)
    return found


def this_machine(rates: Rates, nodes: int, ranks_per_node: int, device: torch.device) -> Machine:
    """Return a machine of ranks as this one; ranks that share a processor also share its rates."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = hardware_of(name)
        total = float(torch.cuda.get_device_properties(device).total_memory)
        return Machine(
            name,
            nodes,
            ranks_per_node,
            rates,
            GB * (known.link_gb_s if known else 32),
            GB * (known.network_gb_s if known else 12.5),
            1e12 * known.bf16_tflops if known else None,
            total - GB,
        )
    threads = torch.get_num_threads()
    share = min(1.0, (os.cpu_count() or 1) / (threads * ranks_per_node))
    slower = replace(
        rates,
        **{
            name: getattr(rates, name) * share
            for name in ("matmul", "attention", "norms", "pointwise", "loss", "copy", "update")
        },
    )
    # ranks of one node pass their bytes through its memory
    return Machine(
        f"this processor ({threads} thread{'s' * (threads != 1)} a rank)",
        nodes,
        ranks_per_node,
        slower,
        slower.copy / 4,
        1.25 * GB,
        gpus=False,
    )


def _key(run: RunConfig, seq_len: int, device: torch.device) -> str:
    """Return a name of all that rates depend on."""
    counted = b"".join(Path(each).read_bytes() for each in (__file__, work.__file__))
    where = (
        hashlib.sha256(counted).hexdigest(),  # other code may count other work
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        torch.get_num_threads(),
        torch.__version__,
        run.train.dtype,
        _tokens(run, seq_len),
        run.model.model_copy(update={"layers": 1}).model_dump_json(),
    )
    return hashlib.sha256(repr(where).encode()).hexdigest()[:16]


def _processor() -> str:
    about = Path("/proc/cpuinfo")  # of Linux
    for line in about.read_text().splitlines() if about.exists() else ():
        if line.startswith("model name"):
            return line
    return platform.processor()


def _tokens(run: RunConfig, seq_len: int) -> tuple[int, int]:
    """Return rows and tokens of what is timed."""
    rows = max(1, min(run.train.rows_a_forward, MOST_TOKENS // seq_len))
    return rows, seq_len


def measure(
    run: RunConfig, seq_len: int, device: torch.device, clock: Clock = time.perf_counter
) -> Rates:
    """Time a block's operations, the loss and a copy; takes a second or a few."""
    model = run.model
    assert isinstance(model, ModelConfig)
    rows, length = _tokens(run, seq_len)
    c = memory_plan.compute_bytes(run)
    dtype = torch.bfloat16 if c < FP32 else torch.float32
    sizes, tokens = sizes_of(model), rows * length
    timer = _Timer(device, clock)

    def inputs(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    products = [(sizes.width, sizes.queries)] * 2 + [(sizes.width, sizes.keys)] * 2
    products += [(sizes.width, sizes.ffn), (sizes.ffn, sizes.width)]
    products += [(sizes.width, sizes.ffn)] * sizes.gated
    seconds = {
        shape: timer.both(
            Linear(*shape, bias=False, device=device, dtype=dtype), inputs(tokens, shape[0])
        )
        for shape in set(products)
    }
    block = math.fsum(seconds[shape] for shape in products)
    # the loss's own products, of a piece's rows
    piece = piece_rows(tokens, gpus=device.type == "cuda")
    of_head = Linear(sizes.width, model.vocab_rows, bias=False, device=device, dtype=dtype)
    head = tokens / piece * timer.both(of_head, inputs(piece, sizes.width))
    flops = 2.0 * (1 + BACKWARD) * tokens
    matmul = flops * (model.layers * sizes.matrices + model.vocab_rows * model.width)
    heads = [inputs(rows, model.heads, length, sizes.queries // model.heads) for _ in range(3)]
    attending = timer.both(lambda q, k, v: attention(q, k, v, None, True), *heads)
    pairs = 2.0 * tokens * length / 2 * sizes.queries
    wide = _norm(model, sizes.width, device, dtype)
    norming = sizes.outer_norms * timer.both(wide, inputs(tokens, sizes.width))
    if sizes.qk_norms:
        norm_of_head = _norm(model, sizes.head, device, dtype)
        for width in (sizes.queries, sizes.keys):
            norming += timer.both(norm_of_head, inputs(tokens, width // sizes.head, sizes.head))
    whole = timer.both(*_block(model, rows, length, device, dtype))
    # never less than a tenth of the block: what is timed apart may take longer than inside of it
    others = max(0.1 * whole, whole - block - attending - norming)
    losing = timer.both(_loss(model, tokens, device), inputs(tokens, sizes.width), of_head.weight)
    losing = max(0.1 * losing, losing - head)  # as of the block
    source, target = torch.zeros(2, COPIED, device=device)
    small = torch.zeros(1, device=device)
    return Rates(
        matmul=matmul / (model.layers * block + head),
        attention=pairs * (ATTENTION_FORWARD + ATTENTION_BACKWARD) / attending,
        norms=5.0 * c * tokens * sum(sizes.norm_widths) / norming,
        pointwise=tokens * pointwise_bytes(model, c) / others,
        loss=loss_traffic(model, tokens, c, gpus=device.type == "cuda") / losing,
        copy=2.0 * FP32 * COPIED / timer.once(lambda: target.copy_(source)),
        update=_update_rate(sizes, device, timer),
        call_s=timer.once(lambda: [small.add_(1.0) for _ in range(100)]) / 100,
        measured=True,
    )


def _block(
    model: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a block as a function of its input, and an input."""
    block = Block(model).to(device, dtype)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.02)
    rotary = None
    if model.positions == "rope":
        rotary = table(model.rope, model.sizes.head, length).unsqueeze(-2).to(device, torch.float32)
    x_BTD = torch.randn(rows, length, model.width, device=device, dtype=dtype, requires_grad=True)
    return lambda x: block(x, None, None, rotary), x_BTD


def _loss(
    model: ModelConfig, tokens: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of so many tokens as a function of the head's input and weight."""
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    size, cap, z_loss = model.vocab_size, model.logit_cap, model.z_loss
    return lambda x, head: linear_cross_entropy(x, head, targets, size, cap, z_loss)[0]


def _norm(model: ModelConfig, size: int, device: torch.device, dtype: torch.dtype) -> Norm:
    norm = Norm(size, model).to(device, dtype)
    for parameter in norm.parameters():
        nn.init.ones_(parameter)
    return norm


def _update_rate(sizes: Sizes, device: torch.device, timer: "_Timer") -> float:
    """Return the FLOP/s of Newton-Schulz steps, those of a square matrix and of W_1 together: bf16
    on a GPU, else fp32.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = ((sizes.width, sizes.width), (sizes.ffn, sizes.width))
    matrices = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    seconds = timer.once(lambda: [newton_schulz(matrix, STEPS) for matrix in matrices])
    return sum(newton_schulz_flops(shape, STEPS) for shape in shapes) / seconds


class _Timer:
    """The least of several times that something took, once it has run twice."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device = device
        self.clock = clock

    def once(self, work: Callable[[], object]) -> float:
        """Return the seconds of a call."""
        work()
        times = []
        for _ in range(REPEATS):
            work()
            self._wait()
            started = self.clock()
            work()
            self._wait()
            times.append(self.clock() - started)
        return max(min(times), 1e-9)

    def both(self, work: Callable[..., Tensor], *inputs: Tensor) -> float:
        """Return the seconds of a call and its backward, without allocating gradients anew."""
        result = work(*inputs)
        gradient = torch.ones_like(result)

        weights = list(work.parameters()) if isinstance(work, nn.Module) else []

        def run() -> None:
            work(*inputs).backward(gradient)
            for each in (*inputs, *weights):
                each.grad = None

        return self.once(run)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

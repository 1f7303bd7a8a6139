"""Ranks, their devices and links, and what each kind of work reaches of a device's peaks."""

from dataclasses import dataclass, replace

from dnt_scale.config.hardware import Hardware

GB = 1e9
# The two numbers that are fitted, to the published runs of benchmarks/plan_accuracy.py: what large
# matmuls reach of the data sheet's peak in training, and other operations of the memory's.
MATMUL_EFFICIENCY = 0.65
MEMORY_EFFICIENCY = 0.80
# Assumed, and not fitted.
LINK_EFFICIENCY = 0.8  # of collectives of many megabytes
COMPILED = 0.5  # of the bytes of norms and pointwise operations, which are then made together
CALL_S = 5e-6  # of the host, for each operation
HOP_S = 1e-5  # of a collective, for each of the log2(ranks) steps to the farthest rank
CONTEXT_BYTES = 2 * GB  # CUDA's own memory, NCCL's buffers


@dataclass(frozen=True)
class Rates:
    """What a rank's device reaches: FLOP/s, bytes/s."""

    matmul: float
    attention: float
    norms: float
    pointwise: float  # measured: of all that a block does beside its products and norms
    loss: float
    copy: float  # of optimizers, casts and copies
    update: float  # FLOP/s of the products of an orthogonalized update: in fp32 on CPUs
    call_s: float  # seconds of the host for each operation
    measured: bool = False


@dataclass(frozen=True)
class Machine:
    """Equal nodes of equal ranks."""

    device: str
    nodes: int
    ranks_per_node: int
    rates: Rates
    link: float  # bytes/s of a rank to others of its node, one direction
    network: float  # to other nodes
    peak_flops: float | None = None  # what MFU is of; None: not known, as of a CPU
    memory: float | None = None  # bytes that a rank may take; None: not known
    gpus: bool = True

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.ranks_per_node

    def of_nodes(self, nodes: int, ranks_per_node: int | None = None) -> "Machine":
        """Return the same nodes in another number, or with other ranks on each."""
        return replace(self, nodes=nodes, ranks_per_node=ranks_per_node or self.ranks_per_node)


def gpu_machine(
    hardware: Hardware, nodes: int, gpus_per_node: int, dtype: str, *, compiled: bool
) -> Machine:
    """Return nodes of GPUs by their data sheet and the efficiencies above.

    Args:
        dtype: bf16 or fp32, of the products.
        compiled: whether blocks are compiled.
    """
    peak = 1e12 * (hardware.bf16_tflops if dtype == "bf16" else hardware.fp32_tflops)
    attention = 1e12 * hardware.attention_tflops
    if dtype == "fp32":
        attention *= hardware.fp32_tflops / hardware.bf16_tflops
    memory = GB * hardware.memory_gb_s * MEMORY_EFFICIENCY
    fewer = COMPILED if compiled else 1.0
    return Machine(
        device=hardware.name,
        nodes=nodes,
        ranks_per_node=gpus_per_node,
        rates=Rates(
            matmul=peak * MATMUL_EFFICIENCY,
            attention=attention,
            norms=memory / fewer,
            pointwise=memory / fewer,
            loss=memory,
            copy=memory,
            update=1e12 * hardware.bf16_tflops * MATMUL_EFFICIENCY,
            call_s=CALL_S * fewer,
        ),
        link=GB * hardware.link_gb_s * LINK_EFFICIENCY,
        network=GB * hardware.network_gb_s * LINK_EFFICIENCY,
        peak_flops=1e12 * hardware.bf16_tflops if dtype == "bf16" else None,
        memory=GB * hardware.memory_gb - CONTEXT_BYTES,
    )

"""What a micro-batch of a language model costs: FLOPs of matrices and attention, bytes that the
other operations move, bytes kept for backward.

n is the tokens of a micro-batch, c the bytes of a number to compute with (bf16: 2, fp32: 4), D the
width, Q and K the widths of all heads of queries and of keys, F the feed-forward part's, V the
vocabulary.
"""

from dataclasses import dataclass

from dnt_scale.config import ModelConfig, RunConfig
from dnt_scale.model.block import ACTIVATIONS, SETTINGS

FP32 = 4
BACKWARD = 2  # times the forward's FLOPs of a matrix: a product for the input, one for the weight
# Of causal attention T / 2 keys count for each query. Two products forward; five backward, for the
# probabilities are made again (FlashAttention-2, arXiv 2307.08691, section 2.3).
ATTENTION_FORWARD, ATTENTION_BACKWARD = 2, 5


@dataclass(frozen=True)
class Work:
    """Of one micro-batch, forward and backward, recomputation included; on one rank."""

    matmul: float  # FLOPs
    attention: float  # FLOPs, the masked half not counted
    norms: float  # bytes read and written
    pointwise: float  # bytes read and written by activations, residuals and rotary positions
    loss: float  # bytes read and written from the logits to their gradient
    operations: float  # calls that the host makes of the device


@dataclass(frozen=True)
class Sizes:
    """Widths of what a block's operations work on."""

    width: int
    queries: int
    keys: int
    ffn: int
    gated: bool
    head: int  # width of a head
    outer_norms: int  # norms of a block over the width
    qk_norms: bool  # whether each head of queries and keys is normalised

    @property
    def norm_widths(self) -> tuple[int, ...]:
        """Return the numbers a token that each norm of a block works on."""
        return (self.width,) * self.outer_norms + (self.queries, self.keys) * self.qk_norms

    @property
    def matrices(self) -> int:
        """Return the weights of a block's matrices."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + (3 if self.gated else 2) * self.width * self.ffn

    @property
    def inner(self) -> int:
        """Return the tensors of width F that the feed-forward part keeps for backward: before and
        after its activation; gated, the other factor and the product too.
        """
        return 4 if self.gated else 2


def sizes_of(model: ModelConfig) -> Sizes:
    """Return the widths of a model's blocks."""
    head, kv_heads, ffn = model.sizes
    norms = SETTINGS[model.setting]
    return Sizes(
        width=model.width,
        queries=model.heads * head,
        keys=kv_heads * head,
        ffn=ffn,
        gated=ACTIVATIONS[model.activation][1],
        head=head,
        outer_norms=norms.pre_attention + norms.pre_ffn + 2 * norms.mid,
        qk_norms=norms.qk,
    )


def recomputed_blocks(run: RunConfig) -> float:
    """Return how many blocks compute their forward again in backward."""
    chosen, layers = run.engine.activation_checkpointing, run.model.layers  # type: ignore[attr-defined]
    if chosen == "full":
        return float(layers)
    return float(-(-layers // chosen)) if isinstance(chosen, int) else 0.0


def work_of(run: RunConfig, rows: int, seq_len: int, compute_bytes: int) -> Work:
    """Return the work of a micro-batch of so many rows.

        matmul      (2 + 4) n (L N_block + V D), and 2 n N_block a block that is computed again
        attention   (4 + 10) n T / 2 Q L, and 4 n T / 2 Q a block that is computed again
        norms       5 c w a token: read and write; read twice and write
        pointwise   5 c F an activation (gated, 13 c F), 12 c D two residuals, 8 c (Q + K) rotary
        loss        (2 c + 28) V a token in bf16, of which the casts are 12 and are none in fp32

    ``selective`` recomputation makes norms and pointwise operations again, no product.
    """
    model = run.model
    assert isinstance(model, ModelConfig)
    sizes, tokens, layers = sizes_of(model), rows * seq_len, model.layers
    again = recomputed_blocks(run)
    light = float(layers) if run.engine.activation_checkpointing == "selective" else again
    products = (1 + BACKWARD) * layers + again
    matmul = 2.0 * tokens * (products * sizes.matrices)
    matmul += 2.0 * (1 + BACKWARD) * tokens * model.vocab_rows * model.width
    pairs = 2.0 * tokens * seq_len / 2 * sizes.queries
    attention = pairs * (
        (ATTENTION_FORWARD + ATTENTION_BACKWARD) * layers + ATTENTION_FORWARD * again
    )
    # forward is two fifths of what a norm or an activation moves
    passes = layers + 0.4 * light
    widths = sum(sizes.norm_widths)
    norms = 5.0 * compute_bytes * tokens * (widths * passes + 2 * model.width)
    cast = 2 * compute_bytes + 8 if compute_bytes < FP32 else 0
    return Work(
        matmul,
        attention,
        norms,
        float(tokens * pointwise_bytes(model, compute_bytes)) * passes,
        float(tokens * model.vocab_rows * (20 + cast)),
        operations=passes * _operations(sizes) + 20,
    )


def pointwise_bytes(model: ModelConfig, compute_bytes: int) -> int:
    """Return what a block's activations, residuals and rotary positions move a token."""
    sizes = sizes_of(model)
    moved = (13 if sizes.gated else 5) * sizes.ffn + 12 * sizes.width
    if model.positions == "rope":
        moved += 8 * (sizes.queries + sizes.keys)
    return compute_bytes * moved


def _operations(sizes: Sizes) -> int:
    """Return the calls of a block, forward and backward: three a product, about four a norm, and
    some twenty for attention, activation and residuals.
    """
    return 3 * (7 if sizes.gated else 6) + 4 * len(sizes.norm_widths) + 20


# --- bytes kept for backward ----------------------------------------------------------------------


def block_bytes(model: ModelConfig, compute_bytes: int, *, fused_norms: bool) -> int:
    """Return what a block keeps a token for its backward.

        inputs of matrices   c (D + Q + D + F): of W_q, W_k, W_v together, W_o, W_1, W_2
        attention            c 3 Q, and 4 a head: keys and values are written out for each query
        before activations   c F; gated, c 3 F
        norms                c w fused, its input, and 4: one number a token or head; else 8 w,
                             input and result in fp32, as torch's RMSNorm does on CPUs

    LayerNorm is fused everywhere.
    """
    sizes, c = sizes_of(model), compute_bytes
    fused = fused_norms or model.norm == "layernorm"
    kept = c * (2 * sizes.width + 4 * sizes.queries + sizes.inner * sizes.ffn)
    kept += FP32 * model.heads
    kept += sum(sizes.norm_widths) * (c if fused else 2 * FP32)
    return kept + FP32 * (sizes.outer_norms + sizes.qk_norms * (model.heads + model.sizes.kv_heads))


def activation_bytes(run: RunConfig, tokens: int, compute_bytes: int, *, fused_norms: bool) -> int:
    """Return what all blocks, and the norms around them, keep of a micro-batch.

    A block that is computed again keeps its input, c D a token, and one of them all it has while
    its backward runs; ``selective`` keeps the products: c (3 D + 2 Q + 2 K + F), gated c 2 F, and
    attention's result.
    """
    model = run.model
    assert isinstance(model, ModelConfig)
    sizes, c = sizes_of(model), compute_bytes
    whole = block_bytes(model, c, fused_norms=fused_norms)
    entry = c * model.width
    chosen, again = run.engine.activation_checkpointing, int(recomputed_blocks(run))
    if chosen == "selective":
        products = 3 * sizes.width + 2 * sizes.queries + 2 * sizes.keys
        products += (2 if sizes.gated else 1) * sizes.ffn
        kept = model.layers * (c * products + FP32 * model.heads) + whole
    else:
        kept = (model.layers - again) * whole + again * entry + (whole if again else 0)
    entrance = _norm_bytes(model, c, fused_norms) if SETTINGS[model.setting].input else 0
    return tokens * (kept + entrance + activations_behind(model, c, fused_norms=fused_norms))


def activations_behind(model: ModelConfig, compute_bytes: int, *, fused_norms: bool) -> int:
    """Return what is kept a token behind the last block: by the last norm, and the head's input."""
    norm = _norm_bytes(model, compute_bytes, fused_norms) if model.final_norm else 0
    return norm + compute_bytes * model.width


def _norm_bytes(model: ModelConfig, compute_bytes: int, fused_norms: bool) -> int:
    fused = fused_norms or model.norm == "layernorm"
    return FP32 + model.width * (compute_bytes if fused else 2 * FP32)


def logits_bytes(model: ModelConfig, tokens: int) -> int:
    """Return the most that logits and what the loss makes of them take at a time.

    Whole logits: 12 V a token. Log-softmax keeps its result in fp32, and backward makes two more of
    that size: of the picked targets, and of the logits. ``z_loss`` keeps the fp32 logits beside, a
    cap them and what it caps.

    This is the one place that says whether the loss holds whole logits or pieces of them.
    """
    a_logit = 3 * FP32 + FP32 * bool(model.z_loss) + 2 * FP32 * bool(model.logit_cap)
    return tokens * model.vocab_rows * a_logit

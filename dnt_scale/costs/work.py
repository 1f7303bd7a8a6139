"""What a language model costs on a rank: FLOPs of matrices and attention, bytes that the other
operations move, bytes kept for backward.

n is the tokens of a micro-batch, c the bytes of a number to compute with (bf16: 2, fp32: 4), D the
width, Q and K the widths of all heads of queries and of keys, F the feed-forward part's, V the rows
of the head (the vocabulary and its padding), P the rows that have logits at a time.
"""

from dataclasses import dataclass

from dnt_scale.config import ModelConfig, RunConfig
from dnt_scale.model.block import ACTIVATIONS, SETTINGS
from dnt_scale.model.linear_cross_entropy import CONVERTED_ROWS, PIECE_ROWS

FP32 = 4
BACKWARD = 2  # times the forward's FLOPs of a matrix: a product for the input, one for the weight
# Of causal attention T / 2 keys count for each query. Two products forward; five backward, for the
# probabilities are made again (FlashAttention-2, arXiv 2307.08691, section 2.3).
ATTENTION_FORWARD, ATTENTION_BACKWARD = 2, 5


@dataclass(frozen=True)
class Work:
    """Of a rank's micro-batches of a step, forward and backward, recomputation included."""

    matmul: float  # FLOPs
    attention: float  # FLOPs, the masked half not counted
    norms: float  # bytes read and written
    pointwise: float  # bytes read and written by activations, residuals and rotary positions
    loss: float  # bytes read and written by the loss beside its products
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


def work_of(run: RunConfig, rows: int, seq_len: int, compute_bytes: int, *, gpus: bool) -> Work:
    """Return the work of so many rows, in micro-batches of ``train.micro_batch``.

        matmul      (2 + 4) n (L N_block + V D), and 2 n N_block a block that is computed again
        attention   (4 + 10) n T / 2 Q L, and 4 n T / 2 Q a block that is computed again
        norms       5 c w a token: read and write; read twice and write
        pointwise   5 c F an activation (gated, 13 c F), 12 c D two residuals, 8 c (Q + K) rotary
        loss        ``loss_traffic``

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
    micro = min(run.train.rows_a_forward, rows)
    micro_batches = -(-rows // micro)
    pieces = micro_batches * _pieces(micro * seq_len, gpus)
    return Work(
        matmul,
        attention,
        norms,
        float(tokens * pointwise_bytes(model, compute_bytes)) * passes,
        rows / micro * loss_traffic(model, micro * seq_len, compute_bytes, gpus=gpus),
        operations=micro_batches * (passes * _operations(sizes) + 20) + 30 * pieces,
    )


def loss_traffic(model: ModelConfig, tokens: int, compute_bytes: int, *, gpus: bool) -> float:
    """Return the bytes that the loss of a micro-batch reads and writes beside its three products,
    forward and backward; see model/linear_cross_entropy.py.

        a token         32 V from logits to their gradient in fp32, 60 V more with a cap;
                        (2 c + 8) V to and from fp32, where c is less
        a piece         8 V D: the head's gradient is read and written; c V D more where c is less
        a micro-batch   12 (n + V) D: gradients in fp32 are made and scaled; (4 + c) (n + V) D more
                        where c is less
    """
    cast = compute_bytes < FP32
    a_logit = 32 + 60 * (model.logit_cap is not None) + (2 * compute_bytes + 8) * cast
    head = model.vocab_rows * model.width
    moved = tokens * model.vocab_rows * a_logit
    moved += _pieces(tokens, gpus) * head * (8 + compute_bytes * cast)
    moved += (tokens * model.width + head) * (12 + (4 + compute_bytes) * cast)
    return float(moved)


def piece_rows(tokens: int, *, gpus: bool) -> int:
    """Return P of a micro-batch."""
    return min(tokens, PIECE_ROWS["cuda" if gpus else "cpu"])


def _pieces(tokens: int, gpus: bool) -> int:
    return -(-tokens // piece_rows(tokens, gpus=gpus))


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


def block_bytes(model: ModelConfig, compute_bytes: int) -> int:
    """Return what a block keeps a token for its backward.

    inputs of matrices   c (D + Q + D + F): of W_q, W_k, W_v together, W_o, W_1, W_2
    attention            c 3 Q, and 4 a head: keys and values are written out for each query
    before activations   c F; gated, c 3 F
    norms                c w, its input, and 4: one number a token or head
    """
    sizes, c = sizes_of(model), compute_bytes
    kept = c * (2 * sizes.width + 4 * sizes.queries + sizes.inner * sizes.ffn)
    kept += FP32 * model.heads + c * sum(sizes.norm_widths)
    return kept + FP32 * (sizes.outer_norms + sizes.qk_norms * (model.heads + model.sizes.kv_heads))


def activation_bytes(run: RunConfig, tokens: int, compute_bytes: int) -> int:
    """Return what all blocks, and the norms around them, keep of a micro-batch.

    A block that is computed again keeps its input, c D a token, and one of them all it has while
    its backward runs; ``selective`` keeps the products: c (3 D + 2 Q + 2 K + F), gated c 2 F, and
    attention's result.
    """
    model = run.model
    assert isinstance(model, ModelConfig)
    sizes, c = sizes_of(model), compute_bytes
    whole = block_bytes(model, c)
    entry = c * model.width
    chosen, again = run.engine.activation_checkpointing, int(recomputed_blocks(run))
    if chosen == "selective":
        products = 3 * sizes.width + 2 * sizes.queries + 2 * sizes.keys
        products += (2 if sizes.gated else 1) * sizes.ffn
        kept = model.layers * (c * products + FP32 * model.heads) + whole
    else:
        kept = (model.layers - again) * whole + again * entry + (whole if again else 0)
    norms = SETTINGS[model.setting].input + model.final_norm
    return tokens * (kept + norms * norm_bytes(model, c))


def norm_bytes(model: ModelConfig, compute_bytes: int) -> int:
    """Return what a norm before or behind the blocks keeps a token: its input and a number."""
    return FP32 + compute_bytes * model.width


def loss_bytes(model: ModelConfig, tokens: int, compute_bytes: int, *, gpus: bool) -> int:
    """Return the most that the loss of a micro-batch takes at a time, be it in the loss or in its
    backward; see model/linear_cross_entropy.py.

        gradients   4 (n + V) D: of x and of the head in fp32, from the loss to its backward
        loss        c n D, x; c P V, a piece's logits, and 4 P V in fp32 where c is less; and the
                    larger one of 4 P V, the slope of a cap, and what of the head's gradient waits
                    to be added to a wider sum: c V D on CUDA, (c + 4) D of 1,024 rows on a CPU
        backward    c (n + V) D, the gradients that it gives, where c is less
    """
    c, width, rows = compute_bytes, model.width, model.vocab_rows
    cast = c < FP32
    both = (tokens + rows) * width
    piece = piece_rows(tokens, gpus=gpus) * rows
    slope = FP32 * piece * (model.logit_cap is not None)
    waiting = c * rows if gpus else (c + FP32) * min(rows, CONVERTED_ROWS)
    loss = c * tokens * width + (c + FP32 * cast) * piece + max(slope, cast * waiting * width)
    return FP32 * both + max(loss, cast * c * both)

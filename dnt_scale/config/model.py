"""`model.*`: what a model of any kind has, and the kind `dnt`: the shape of a DNT or of its GPT
baseline.
"""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    Field,
    SerializeAsAny,
    WrapValidator,
    model_validator,
)

from dnt_scale.config.base import ConfigError, Size, Strict, Text
from dnt_scale.config.data import TokenRows
from dnt_scale.config.kinds import Registry, resolved

Setting = Literal["S1", "S2", "S3", "S4", "S5", "peri"]
Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"]

MODELS = Registry("model", "dnt_scale.model", default="dnt")


class ModelSection(Strict):
    """What every kind of model has. A kind is a subclass, with ``kind: Literal["..."] = "..."``,
    that ``MODELS.register`` is given, from ``dnt_scale/model/KIND.py`` or from a file of one's
    own.
    """

    registry: ClassVar[Registry] = MODELS
    reads: ClassVar[type] = object  # The class of a source's ``rows`` that the model takes.

    kind: str
    name: Text

    def build(self, rows: Any = None) -> Any:
        """Make the model, a ``dnt_scale.model.task.Task``, on the current device with weights of no
        meaning.

        Args:
            rows: what the run's rows are, of the class ``reads``; None where only shapes matter.
        """
        raise NotImplementedError

    def check(self, rows: Any) -> None:
        """Raise ConfigError, naming the field, where rows of the class ``reads`` do not fit this
        model.
        """

    def exported_rows(self, name: str) -> int | None:
        """Return how many rows of a weight others are given: None, all; else those beyond it only
        fill it up, and are 0.
        """
        return None

    def describe(self) -> str:
        """Return the model's shape in words."""
        return f"kind {self.kind}"


AnyModel = Annotated[SerializeAsAny[ModelSection], WrapValidator(MODELS.validate)]


class BlockSizes(NamedTuple):
    """Sizes of a block's matrices, with a number where the configuration has null."""

    head: int  # width of a head
    kv_heads: int
    ffn: int  # inner width of the feed-forward part


class BlockSection(ModelSection):
    """What every model of our blocks has. Which norms stand where is ``setting`` (dnt.md,
    S1-S5).
    """

    layers: int = Field(gt=0, le=10_000)
    width: Size
    heads: Size
    kv_heads: Size | None = Field(
        None,
        description="heads of keys and values, each shared by heads / kv_heads of queries (GQA); "
        "null: as many as heads",
    )
    head_size: Size | None = Field(None, description="width of a head; null: width / heads")
    setting: Setting = "S5"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square")
    gain_init: float = 1.0
    final_norm: bool = True
    bias: bool = False
    activation: Activation = "gelu"
    ffn_multiple: int = Field(4, gt=0, le=1024)
    ffn_size: Size | None = Field(
        None,
        description="the feed-forward part's inner width as a number; null: ffn_multiple widths",
    )
    init_std: float = Field(0.02, gt=0)
    residual_init_scaled: bool = Field(
        True, description="W_o and W_2 start 1/sqrt(2 layers) smaller"
    )

    @property
    def sizes(self) -> BlockSizes:
        """Return the sizes of the block's matrices."""
        return BlockSizes(
            self.head_size or self.width // self.heads,
            self.kv_heads or self.heads,
            self.ffn_size or self.ffn_multiple * self.width,
        )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_size is None and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; change one of them, "
                "or set head_size"
            )
        if self.heads % self.sizes.kv_heads:
            raise ValueError(
                f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}; change one of "
                "them"
            )
        return self


class RopeSection(Strict):
    """`model.rope`: rotary positions (arXiv 2104.09864), with `model.positions: rope`.

    ``scaling`` is for contexts longer than the one trained with: ``linear`` divides positions by
    ``factor`` (arXiv 2306.15595), ``llama3`` only the frequencies with few turns in
    ``original_context`` tokens (Llama 3.1's).
    """

    theta: float = Field(10_000.0, gt=1, description="base of the frequencies")
    scaling: Literal["none", "linear", "llama3"] = Field(
        "none",
        description="for a context longer than the one trained with: `linear` stretches positions, "
        "`llama3` only the slow frequencies",
    )
    factor: float = Field(
        1.0, ge=1, description="how many times longer than the context trained with"
    )
    original_context: int | None = Field(
        None, gt=0, le=1 << 24, description="the context trained with, in tokens; llama3 only"
    )
    low_freq_factor: float = Field(
        1.0, gt=0, description="llama3: turns in original_context up to which all is stretched"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="llama3: turns in original_context from which nothing is"
    )

    @model_validator(mode="after")
    def _scaling_has_what_it_needs(self) -> Self:
        llama3 = self.scaling == "llama3"
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"factor is {self.factor:g}, but scaling is none; set scaling to linear or llama3"
            )
        if llama3 and self.original_context is None:
            raise ValueError(
                "scaling llama3 needs original_context, the context that the model was trained "
                "with; set it"
            )
        if llama3 and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor:g}, expected less than "
                f"high_freq_factor, {self.high_freq_factor:g}"
            )
        return self


@MODELS.register
class ModelConfig(BlockSection):
    """A DNT-GPT or its GPT baseline."""

    reads: ClassVar[type] = TokenRows

    kind: Literal["dnt"] = "dnt"
    vocab_size: int = Field(gt=0, le=1 << 25)
    vocab_multiple: int = Field(
        1,
        gt=0,
        le=1 << 20,
        description="embedding and head have vocab_size rows, rounded up to a multiple of this; "
        "the rows beyond it stay 0 and are never predicted",
    )
    context: int = Field(
        gt=0, le=1 << 24, description="longest row the position table can hold, in tokens"
    )
    positions: Literal["learned", "rope", "none"] = "learned"
    rope: RopeSection = RopeSection()
    tied_head: bool = True
    z_loss: float = Field(
        0.0,
        ge=0,
        description="training adds this times the square of each target's log partition function, "
        "which keeps logits small; PaLM has 1e-4",
    )
    logit_cap: float | None = Field(
        None, gt=0, description="logits become cap tanh(logits / cap); Gemma 2 has 30"
    )

    @property
    def vocab_rows(self) -> int:
        """Return the rows of embedding and head: ``vocab_size`` and padding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _rope_fits(self) -> Self:
        if self.positions != "rope" and self.rope != RopeSection():
            raise ValueError(
                f"rope has settings, but positions is {self.positions}; set positions to rope"
            )
        if self.positions == "rope" and self.sizes.head % 2:
            raise ValueError(
                f"positions is rope, which turns pairs of numbers, but a head has a width of "
                f"{self.sizes.head}; set an even head_size"
            )
        return self

    def build(self, rows: TokenRows | None = None) -> Any:
        return resolved("dnt_scale.model.dnt:DNT")(self, rows.document_eos if rows else None)

    def check(self, rows: TokenRows) -> None:
        if rows.vocab_size > self.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {self.vocab_size}, but the shards in {rows.folder} have "
                f"{rows.vocab_size} token ids; set model.vocab_size={rows.vocab_size} or more"
            )
        if rows.seq_len > self.context:
            raise ConfigError(
                f"model.context is {self.context}, but the rows in {rows.folder} have "
                f"{rows.seq_len} tokens; set model.context={rows.seq_len} or prepare with "
                f"--seq-len {self.context}"
            )

    def exported_rows(self, name: str) -> int | None:
        padded = self.vocab_rows > self.vocab_size and name in ("tok_emb.weight", "head.weight")
        return self.vocab_size if padded else None

    def describe(self) -> str:
        kv_heads = self.sizes.kv_heads
        shared = f" ({kv_heads} of keys and values)" if kv_heads != self.heads else ""
        return (
            f"setting {self.setting}, {self.layers} layers, width {self.width}, {self.heads} "
            f"heads{shared}, {self.activation}, positions {self.positions}, context "
            f"{self.context:,}, vocabulary {self.vocab_size:,}"
        )

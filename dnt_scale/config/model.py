"""`model.*`: what a model of any kind has, and the kind `dnt`: the shape of a DNT or of its GPT
baseline.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializeAsAny,
    WrapValidator,
    model_validator,
)

from dnt_scale.config.base import ConfigError, Size, Strict, Text
from dnt_scale.config.data import TokenRows
from dnt_scale.config.kinds import Registry, resolved

Setting = Literal["S1", "S2", "S3", "S4", "S5"]

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

    def describe(self) -> str:
        """Return the model's shape in words."""
        return f"kind {self.kind}"


AnyModel = Annotated[SerializeAsAny[ModelSection], WrapValidator(MODELS.validate)]


class BlockSection(ModelSection):
    """What every model of our blocks has. Which norms stand where is ``setting`` (dnt.md,
    S1-S5).
    """

    layers: int = Field(gt=0, le=10_000)
    width: Size
    heads: Size
    setting: Setting = "S5"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square")
    gain_init: float = 1.0
    final_norm: bool = True
    bias: bool = False
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    ffn_multiple: int = Field(4, gt=0, le=1024)
    init_std: float = Field(0.02, gt=0)
    residual_init_scaled: bool = Field(
        True, description="W_o and W_2 start 1/sqrt(2 layers) smaller"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; change one of them"
            )
        return self


@MODELS.register
class ModelConfig(BlockSection):
    """A DNT-GPT or its GPT baseline."""

    reads: ClassVar[type] = TokenRows

    kind: Literal["dnt"] = "dnt"
    vocab_size: int = Field(gt=0, le=1 << 25)
    context: int = Field(
        gt=0, le=1 << 24, description="longest row the position table can hold, in tokens"
    )
    positions: Literal["learned", "none"] = "learned"
    tied_head: bool = True

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

    def describe(self) -> str:
        return (
            f"setting {self.setting}, {self.layers} layers, width {self.width}, {self.heads} "
            f"heads, vocabulary {self.vocab_size:,}"
        )

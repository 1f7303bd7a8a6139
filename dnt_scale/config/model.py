"""`model.*`: the shape of a DNT or of its GPT baseline."""

from typing import Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from dnt_scale.config.base import Size, Strict, Text

Setting = Literal["S1", "S2", "S3", "S4", "S5"]


class ModelConfig(Strict):
    """A DNT-GPT or its GPT baseline. Which norms stand where is ``setting`` (dnt.md, S1-S5)."""

    name: Text
    layers: int = Field(gt=0, le=10_000)
    width: Size
    heads: Size
    vocab_size: int = Field(gt=0, le=1 << 25)
    context: int = Field(gt=0, le=1 << 24, description="longest row the position table can hold, in tokens")
    setting: Setting = "S5"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square")
    gain_init: float = 1.0
    final_norm: bool = True
    bias: bool = False
    positions: Literal["learned", "none"] = "learned"
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    ffn_multiple: int = Field(4, gt=0, le=1024)
    tied_head: bool = True
    init_std: float = Field(0.02, gt=0)
    residual_init_scaled: bool = Field(True, description="W_o and W_2 start 1/sqrt(2 layers) smaller")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; change one of them")
        return self

"""The block of a Deeply Normalized Transformer (arXiv 2507.17501), of language and of images alike.

    u  = x + N_mid1( Attention_QKNorm( N_pre1(x) ) )
    x' = u + N_mid2( FFN( N_pre2(u) ) )                 S4;  S5 drops N_pre2

Which of these norms stand is data (``SETTINGS``), not a subclass. Shapes in names: B rows, T
tokens, D width, H heads, K width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnt_scale.config import BlockSection, Setting


@dataclass(frozen=True)
class Norms:
    """Where a setting of the paper places its norms (dnt.md, Architecture)."""

    pre_attention: bool = True
    pre_ffn: bool = True
    mid: bool = False
    qk: bool = False
    input: bool = False


SETTINGS: dict[Setting, Norms] = {
    "S1": Norms(),
    "S2": Norms(qk=True),
    "S3": Norms(qk=True, input=True),
    "S4": Norms(qk=True, input=True, mid=True),
    "S5": Norms(qk=True, input=True, mid=True, pre_ffn=False),
}


class Norm(nn.Module):
    """N(x) = sqrt(d) g x / sqrt(|x|^2 + d eps) over the last dimension, or LayerNorm for the
    GPT-2 baseline.
    """

    def __init__(self, size: int, config: BlockSection) -> None:
        super().__init__()
        self.size = size
        self.eps = config.norm_eps
        self.gain = nn.Parameter(torch.empty(size))
        self.layernorm = config.norm == "layernorm"
        self.bias = nn.Parameter(torch.empty(size)) if self.layernorm and config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layernorm:
            return F.layer_norm(x, (self.size,), self.gain, self.bias, self.eps)
        return F.rms_norm(x, (self.size,), self.gain, self.eps)


def norm_if(wanted: bool, size: int, config: BlockSection) -> nn.Module:
    return Norm(size, config) if wanted else nn.Identity()


class Attention(nn.Module):
    """Attention; with QKNorm the logits are sqrt(d_h) cos(q, k) times the gains (paper, Prop. 5).

    Args:
        causal: whether a token attends only to itself and those before it, where no mask is given.
    """

    def __init__(self, config: BlockSection, causal: bool = True) -> None:
        super().__init__()
        self.heads = config.heads
        self.causal = causal
        head_size = config.width // config.heads
        self.w_q = nn.Linear(config.width, config.width, bias=config.bias)
        self.w_k = nn.Linear(config.width, config.width, bias=config.bias)
        self.w_v = nn.Linear(config.width, config.width, bias=config.bias)
        self.w_o = nn.Linear(config.width, config.width, bias=config.bias)
        qk_norm = SETTINGS[config.setting].qk
        self.norm_q = norm_if(qk_norm, head_size, config)
        self.norm_k = norm_if(qk_norm, head_size, config)

    def forward(self, x_BTD: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        def split_heads(y_BTD: Tensor) -> Tensor:
            return y_BTD.view(*y_BTD.shape[:-1], self.heads, -1)

        q_BTHK = self.norm_q(split_heads(self.w_q(x_BTD)))
        k_BTHK = self.norm_k(split_heads(self.w_k(x_BTD)))
        v_BTHK = split_heads(self.w_v(x_BTD))
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BTHK.transpose(1, 2),
            v_BTHK.transpose(1, 2),
            attn_mask=mask_B1TT,
            is_causal=self.causal and mask_B1TT is None,
        )
        y_BTD: Tensor = self.w_o(y_BHTK.transpose(1, 2).flatten(-2))
        return y_BTD


class FeedForward(nn.Module):
    def __init__(self, config: BlockSection) -> None:
        super().__init__()
        hidden = config.ffn_multiple * config.width
        self.w_1 = nn.Linear(config.width, hidden, bias=config.bias)
        self.w_2 = nn.Linear(hidden, config.width, bias=config.bias)
        self.activation = config.activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.w_1(x_BTD)
        if self.activation == "relu":
            hidden = F.relu(hidden)
        else:
            hidden = F.gelu(
                hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none"
            )
        y_BTD: Tensor = self.w_2(hidden)
        return y_BTD


class Block(nn.Module):
    def __init__(self, config: BlockSection, causal: bool = True) -> None:
        super().__init__()
        norms = SETTINGS[config.setting]
        self.norm_pre1 = norm_if(norms.pre_attention, config.width, config)
        self.attn = Attention(config, causal)
        self.norm_mid1 = norm_if(norms.mid, config.width, config)
        self.norm_pre2 = norm_if(norms.pre_ffn, config.width, config)
        self.ffn = FeedForward(config)
        self.norm_mid2 = norm_if(norms.mid, config.width, config)

    def forward(
        self, x_BTD: Tensor, mask_B1TT: Tensor | None = None, kept_B2: Tensor | None = None
    ) -> Tensor:
        """Return the residual stream after the block.

        Args:
            mask_B1TT: what is added to the attention's logits.
            kept_B2: by what the two branches of a row are multiplied before they are added
                (stochastic depth); None: 1.
        """
        branch_BTD = self.norm_mid1(self.attn(self.norm_pre1(x_BTD), mask_B1TT))
        x_BTD = x_BTD + (branch_BTD if kept_B2 is None else branch_BTD * kept_B2[:, :1, None])
        branch_BTD = self.norm_mid2(self.ffn(self.norm_pre2(x_BTD)))
        out_BTD: Tensor = x_BTD + (
            branch_BTD if kept_B2 is None else branch_BTD * kept_B2[:, 1:, None]
        )
        return out_BTD

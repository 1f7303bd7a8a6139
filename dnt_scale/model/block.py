"""The block of a Deeply Normalized Transformer (arXiv 2507.17501), of language and of images alike.

    u  = x + N_mid1( Attention_QKNorm( N_pre1(x) ) )
    x' = u + N_mid2( FFN( N_pre2(u) ) )                 S4;  S5 drops N_pre2

Which of these norms stand, and what stands between the matrices of the FFN, is data (``SETTINGS``,
``ACTIVATIONS``), not a subclass. Shapes in names: B rows, T tokens, D width, H heads, G heads of
keys and values where those of queries share them, K width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnt_scale.config import Activation, BlockSection, Setting
from dnt_scale.model.cache import LayerCache
from dnt_scale.model.cpu_ops import Linear, rms_norm
from dnt_scale.model.documents import Documents, attention
from dnt_scale.model.rotary import rotated


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
    "peri": Norms(mid=True),  # Peri-LN, Gemma 2
}


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# The function behind W_1, and whether a third matrix stands beside it: a gated linear unit (arXiv
# 2002.05202).
ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu": (F.relu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (_gelu_tanh, True),
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
        return rms_norm(x, self.gain, self.eps)


def norm_if(wanted: bool, size: int, config: BlockSection) -> nn.Module:
    return Norm(size, config) if wanted else nn.Identity()


class Attention(nn.Module):
    """Attention; with QKNorm the logits are sqrt(d_h) cos(q, k) times the gains (paper, Prop. 5).

    Heads of queries share those of keys and values in groups (GQA, arXiv 2305.13245) where
    ``kv_heads`` is less than ``heads``.

    Args:
        causal: whether a token attends only to itself and those before it, where no documents are
            given: inside of these it always does.
    """

    def __init__(self, config: BlockSection, causal: bool = True) -> None:
        super().__init__()
        size, kv_heads, _ = config.sizes
        self.head_size = size
        self.shared_by = config.heads // kv_heads  # heads of queries for one of keys
        self.causal = causal
        self.w_q = Linear(config.width, config.heads * size, bias=config.bias)
        self.w_k = Linear(config.width, kv_heads * size, bias=config.bias)
        self.w_v = Linear(config.width, kv_heads * size, bias=config.bias)
        self.w_o = Linear(config.heads * size, config.width, bias=config.bias)
        qk_norm = SETTINGS[config.setting].qk
        self.norm_q = norm_if(qk_norm, size, config)
        self.norm_k = norm_if(qk_norm, size, config)

    def queries(self, projected: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Return q_BHTK of W_q x: in heads, normalised, turned by their positions."""
        return rotated(self.norm_q(self._split(projected)), rotary).transpose(1, 2)

    def keys(self, projected: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Return k_BHTK of W_k x, a head for each of the queries'."""
        return self._for_each_query(self._shared_keys(projected, rotary))

    def _shared_keys(self, projected: Tensor, rotary: Tensor | None) -> Tensor:
        return rotated(self.norm_k(self._split(projected)), rotary).transpose(1, 2)

    def _split(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:-1], -1, self.head_size)

    def _for_each_query(self, y_BGTK: Tensor) -> Tensor:
        # Written out: `enable_gqa` has a flash and a math kernel only, so that with a mask, or in
        # fp32, logits (B, H, T, T) would lie in memory.
        return y_BGTK if self.shared_by == 1 else y_BGTK.repeat_interleave(self.shared_by, dim=1)

    def forward(
        self,
        x_BTD: Tensor,
        documents: Documents | None = None,
        rotary: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q_BHTK = self.queries(self.w_q(x_BTD), rotary)
        k_BGTK = self._shared_keys(self.w_k(x_BTD), rotary)
        v_BGTK = self._split(self.w_v(x_BTD)).transpose(1, 2)
        if cache is not None:
            cache.keep(k_BGTK, v_BGTK)
        if cache is not None and cache.goes_on:
            y_BHTK = cache.attended(q_BHTK)
        else:
            y_BHTK = attention(
                q_BHTK,
                self._for_each_query(k_BGTK),
                self._for_each_query(v_BGTK),
                documents,
                self.causal,
            )
        y_BTD: Tensor = self.w_o(y_BHTK.transpose(1, 2).flatten(-2))
        return y_BTD


class FeedForward(nn.Module):
    """W_2 f(W_1 x), or gated W_2 (f(W_1 x) * W_3 x)."""

    def __init__(self, config: BlockSection) -> None:
        super().__init__()
        hidden = config.sizes.ffn
        self.activation, gated = ACTIVATIONS[config.activation]
        self.w_1 = Linear(config.width, hidden, bias=config.bias)
        self.w_2 = Linear(hidden, config.width, bias=config.bias)
        self.w_3 = Linear(config.width, hidden, bias=config.bias) if gated else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.activation(self.w_1(x_BTD))
        if self.w_3 is not None:
            hidden = hidden * self.w_3(x_BTD)
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
        self,
        x_BTD: Tensor,
        documents: Documents | None = None,
        kept_B2: Tensor | None = None,
        rotary: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return the residual stream after the block.

        Args:
            documents: attention stays inside of them; None: a row is one text.
            kept_B2: by what the two branches of a row are multiplied before they are added
                (stochastic depth); None: 1.
            rotary: of `model.rotary.table`, the lines of each token's position; None: positions do
                not turn queries and keys.
            cache: keeps keys and values; where the tokens go on with others, it says what they
                attend to, in the documents' place.
        """
        branch_BTD = self.norm_mid1(self.attn(self.norm_pre1(x_BTD), documents, rotary, cache))
        x_BTD = x_BTD + (branch_BTD if kept_B2 is None else branch_BTD * kept_B2[:, :1, None])
        branch_BTD = self.norm_mid2(self.ffn(self.norm_pre2(x_BTD)))
        out_BTD: Tensor = x_BTD + (
            branch_BTD if kept_B2 is None else branch_BTD * kept_B2[:, 1:, None]
        )
        return out_BTD

"""The Deeply Normalized Transformer (arXiv 2507.17501) and its GPT baseline, read top to bottom.

    x0 = N_in(tok_emb + pos_emb)
    u  = x + N_mid1( Attention_QKNorm( N_pre1(x) ) )
    x' = u + N_mid2( FFN( N_pre2(u) ) )                 S4;  S5 drops N_pre2
    logits = tok_emb^T N_out(x)

Which of these norms stand is data (``SETTINGS``), not a subclass. Shapes in names: B rows, T
tokens, D width, V vocabulary, H heads, K width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnt_scale.config import ModelConfig, Setting
from dnt_scale.model.batch import Batch
from dnt_scale.model.flops import flops_per_token
from dnt_scale.model.init import initial_tensor
from dnt_scale.model.task import Task

IGNORED = -1  # a target that does not count in the loss


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of rows of token ids, each int64 (rows, seq_len): a target is the
    token that follows.

    Args:
        batch: int64 (rows, seq_len + 1); ``IGNORED`` is padding, for which token 0 stands as an
            input.
    """
    assert isinstance(batch, Tensor)
    return batch[:, :-1].clamp(min=0), batch[:, 1:]


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

    def __init__(self, size: int, config: ModelConfig) -> None:
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


def norm_if(wanted: bool, size: int, config: ModelConfig) -> nn.Module:
    return Norm(size, config) if wanted else nn.Identity()


class Attention(nn.Module):
    """Causal attention; with QKNorm the logits are sqrt(d_h) cos(q, k) times the gains (paper,
    Prop. 5).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
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
            is_causal=mask_B1TT is None,
        )
        y_BTD: Tensor = self.w_o(y_BHTK.transpose(1, 2).flatten(-2))
        return y_BTD


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
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
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norms = SETTINGS[config.setting]
        self.norm_pre1 = norm_if(norms.pre_attention, config.width, config)
        self.attn = Attention(config)
        self.norm_mid1 = norm_if(norms.mid, config.width, config)
        self.norm_pre2 = norm_if(norms.pre_ffn, config.width, config)
        self.ffn = FeedForward(config)
        self.norm_mid2 = norm_if(norms.mid, config.width, config)

    def forward(self, x_BTD: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.norm_mid1(self.attn(self.norm_pre1(x_BTD), mask_B1TT))
        out_BTD: Tensor = x_BTD + self.norm_mid2(self.ffn(self.norm_pre2(x_BTD)))
        return out_BTD


def document_layout(tokens_BT: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Where documents lie in rows: each ``eos`` begins one, and what precedes the first is the rest
    of another.

    Returns:
        positions_BT, int64: the distance from the document's beginning, or from the row's where
            that comes later.
        mask_B1TT, bool: whether a token (next to last dimension) attends to another (last): one of
            its own document, not after it.
    """
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begin_BT = torch.where(tokens_BT == eos, index_T, 0).cummax(dim=1).values
    same_BTT = begin_BT[:, :, None] == begin_BT[:, None, :]
    return index_T - begin_BT, (same_BTT & (index_T[:, None] >= index_T))[:, None]


class DNT(nn.Module, Task):
    """A decoder-only language model. Parameters are uninitialised until ``init_weights``.

    Its batches are rows of token ids, see ``next_tokens``.

    Args:
        document_eos: the token that stands before and after documents; attention then stays inside
            a document, and its positions count from that token. None: a row is one text.
    """

    def __init__(self, config: ModelConfig, document_eos: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.document_eos = document_eos
        self.tok_emb = nn.Embedding(config.vocab_size, config.width)
        self.pos_emb = (
            nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        )
        self.norm_in = norm_if(SETTINGS[config.setting].input, config.width, config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = norm_if(config.final_norm, config.width, config)
        self.head = (
            None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        )

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss when there are targets.

        Args:
            tokens_BT: int64 token ids, T at most ``config.context``.
            targets_BT: int64 ids of the next tokens; ``IGNORED`` ones do not count.

        Returns:
            logits_BTV in the compute dtype, or the cross entropy summed over targets: fp32 scalar,
            nats.

        Raises:
            ValueError: T is longer than ``config.context``.
        """
        length = tokens_BT.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"row of {length} tokens, but model.context is {self.config.context}; "
                f"set model.context={length} or prepare shorter rows"
            )
        x_BTD = self.tok_emb(tokens_BT)
        positions, mask_B1TT = torch.arange(length, device=tokens_BT.device), None
        if self.document_eos is not None:
            positions, attends_B1TT = document_layout(tokens_BT, self.document_eos)
            # what is added to the logits; of a bool mask every block would make such a one and keep
            # it for its backward
            mask_B1TT = x_BTD.new_zeros(attends_B1TT.shape).masked_fill_(~attends_B1TT, -torch.inf)
        if self.pos_emb is not None:
            x_BTD = x_BTD + self.pos_emb(positions)
        x_BTD = self.norm_in(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B1TT)
        head_VD = self.tok_emb.weight if self.head is None else self.head.weight
        logits_BTV = F.linear(self.norm_out(x_BTD), head_VD)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(
            logits_BTV.float().flatten(0, 1),
            targets_BT.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def loss_sum(self, batch: Batch) -> Tensor:
        loss: Tensor = self(*next_tokens(batch))
        return loss

    def count(self, batch: Batch) -> Tensor:
        return (next_tokens(batch)[1] != IGNORED).sum()

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        return initial_tensor(name, shape, self.config, seed)

    def flops_per_row(self, units_a_row: int) -> float:
        return units_a_row * flops_per_token(self.config, units_a_row)

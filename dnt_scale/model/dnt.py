"""The Deeply Normalized Transformer (arXiv 2507.17501) and its GPT baseline, read top to bottom.

    x0 = N_in(tok_emb + pos_emb)
    u  = x + N_mid1( Attention_QKNorm( N_pre1(x) ) )
    x' = u + N_mid2( FFN( N_pre2(u) ) )                 S4;  S5 drops N_pre2
    logits = tok_emb^T N_out(x)                         or W_head N_out(x), not tied

Positions are a table that is added (pos_emb), or turn queries and keys (rotary). The middle two
lines are a block's (:mod:`dnt_scale.model.block`). Shapes in names: B rows, T tokens, D width, V
vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnt_scale.config import ModelConfig
from dnt_scale.distributed.device_metrics import record
from dnt_scale.model.batch import IGNORED, Batch
from dnt_scale.model.block import SETTINGS, Block, norm_if
from dnt_scale.model.cache import Cache, CacheCall, LayerCache
from dnt_scale.model.documents import find_documents
from dnt_scale.model.flops import flops_per_token
from dnt_scale.model.init import initial_tensor
from dnt_scale.model.linear_cross_entropy import linear_cross_entropy
from dnt_scale.model.rotary import table
from dnt_scale.model.task import Task

Made = TypeVar("Made")


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of rows of token ids, each int64 (rows, seq_len): a target is the
    token that follows.

    Args:
        batch: int64 (rows, seq_len + 1); ``IGNORED`` is padding, for which token 0 stands as an
            input.
    """
    assert isinstance(batch, Tensor)
    return batch[:, :-1].clamp(min=0), batch[:, 1:]


class Head(nn.Module):
    """The weight that makes logits, where it is not the embedding's: (vocabulary rows, width).

    FSDP2 has it whole while this is called, so whatever needs it is made here, the loss too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_rows, config.width))

    def forward(self, x: Tensor, make: Callable[[Tensor, Tensor], Made]) -> Made:
        """Return ``make(x, weight)``, x (..., width)."""
        return make(x, self.weight)


class DNT(nn.Module, Task):
    """A decoder-only language model. Parameters are uninitialised until ``init_weights``.

    Its batches are rows of token ids, see ``next_tokens``.

    Args:
        document_eos: the token that stands before and after documents; attention then stays inside
            a document, and its positions count from that token. None: a row is one text.
    """

    rotary: Tensor | None

    def __init__(self, config: ModelConfig, document_eos: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.document_eos = document_eos
        self.tok_emb = nn.Embedding(config.vocab_rows, config.width)
        self.pos_emb = (
            nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        )
        rotary = config.positions == "rope"
        shape = (config.context, config.sizes.head)
        self.register_buffer(
            "rotary",
            torch.empty(shape, dtype=torch.float32) if rotary else None,
            persistent=False,
        )
        self.norm_in = norm_if(SETTINGS[config.setting].input, config.width, config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = norm_if(config.final_norm, config.width, config)
        self.head = None if config.tied_head else Head(config)

    def fsdp_units(self) -> Sequence[nn.Module]:
        """See `Task`. A tied weight, which both ends use, is in none: its gradient is whole only at
        the end of backward.
        """
        if self.head is None:
            return list(self.blocks)
        return [self.tok_emb, *self.blocks, self.head]

    def init_buffers(self) -> None:
        if self.rotary is not None:
            config = self.config
            self.rotary.copy_(table(config.rope, config.sizes.head, config.context))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss when there are targets.

        Args:
            tokens_BT: int64 token ids, T at most ``config.context``.
            targets_BT: int64 ids of the next tokens; ``IGNORED`` ones do not count.

        Returns:
            logits_BTV in the compute dtype, or the training loss summed over targets: a scalar,
            nats, fp32 (float64 where the weights are).

        Raises:
            ValueError: T is longer than ``config.context``.
        """
        x_BTD = self._last(tokens_BT)
        if targets_BT is None:
            return self._logits(x_BTD).to(x_BTD.dtype)
        loss, z_part = self._loss(x_BTD, targets_BT, self.config.z_loss)
        if self.config.z_loss:
            record("train/z_loss", z_part, (targets_BT != IGNORED).sum())
        return loss

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Return an empty cache for ``rows`` texts of at most ``capacity`` tokens, which is at most
        ``config.context``.
        """
        return Cache(self.config, rows, capacity, self.document_eos, self.tok_emb.weight)

    @torch.no_grad()
    def fill(self, cache: Cache, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Put texts, token ids each, into rows of a cache, in the place of what is there. Raises
        ValueError as ``forward`` does.
        """
        for row in rows:
            cache.empty(row)
        begun = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
        if begun:
            self._last(*cache.first_tokens(*zip(*begun, strict=True)))

    @torch.no_grad()
    def next_logits(self, cache: Cache, tokens: Sequence[int]) -> Tensor:
        """Add a token to each of a cache's first rows; return logits_BV of what follows it."""
        return self._logits(self._last(*cache.next_tokens(tokens)))[:, 0]

    def _last(self, tokens_BT: Tensor, cache: CacheCall | None = None) -> Tensor:
        """Return x_BTD after the last block. Raises ValueError as ``forward`` does."""
        length = tokens_BT.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"row of {length} tokens, but model.context is {self.config.context}; "
                f"set model.context={length} or prepare shorter rows"
            )
        x_BTD: Tensor = self.tok_emb(tokens_BT)
        positions, documents = torch.arange(length, device=tokens_BT.device), None
        if cache is not None and cache.positions_BT is not None:
            positions = cache.positions_BT
        elif self.document_eos is not None:
            documents = find_documents(tokens_BT, self.document_eos, x_BTD.dtype)
            positions = documents.positions_BT
        if self.pos_emb is not None:
            x_BTD = x_BTD + self.pos_emb(positions)
        rotary = None if self.rotary is None else self.rotary[positions].unsqueeze(-2)
        x_BTD = self.norm_in(x_BTD)
        layers: Iterable[LayerCache | None] = repeat(None) if cache is None else cache.layers
        for block, layer in zip(self.blocks, layers, strict=False):
            x_BTD = block(x_BTD, documents, None, rotary, layer)
        return x_BTD

    def _logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits_BTV of the vocabulary without padding: in the compute dtype, or where they
        are capped at least in fp32.
        """
        padded_BTV = self._with_head(self.norm_out(x_BTD), F.linear)
        logits_BTV = padded_BTV[..., : self.config.vocab_size]
        if (cap := self.config.logit_cap) is not None:
            wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
            logits_BTV = cap * torch.tanh(wide_BTV / cap)
        return logits_BTV

    def _loss(self, x_BTD: Tensor, targets_BT: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        """Return the loss summed over targets, and its part that is z-loss: scalars, nats."""
        config = self.config
        loss = partial(
            linear_cross_entropy,
            targets_N=targets_BT.flatten(),
            vocab_size=config.vocab_size,
            logit_cap=config.logit_cap,
            z_loss=z_loss,
        )
        return self._with_head(self.norm_out(x_BTD).flatten(0, 1), loss)

    def _with_head(self, x: Tensor, make: Callable[[Tensor, Tensor], Made]) -> Made:
        """Return ``make`` of x (..., width) and of the weight that makes logits, a row a token:
        (vocab_rows, width).
        """
        if self.head is None:
            return make(x, self.tok_emb.weight)
        made: Made = self.head(x, make)
        return made

    def loss_sum(self, batch: Batch) -> Tensor:
        loss: Tensor = self(*next_tokens(batch))
        return loss

    def eval_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the cross entropy alone, which perplexity is made of."""
        inputs_BT, targets_BT = next_tokens(batch)
        return {"loss": self._loss(self._last(inputs_BT), targets_BT, z_loss=0.0)[0]}

    def count(self, batch: Batch) -> Tensor:
        return (next_tokens(batch)[1] != IGNORED).sum()

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        if (rows := self.config.exported_rows(name)) is None:
            return initial_tensor(name, shape, self.config, seed)
        # the same vocabulary whatever it is padded to
        drawn = initial_tensor(name, torch.Size((rows, *shape[1:])), self.config, seed)
        return F.pad(drawn, (0, 0, 0, shape[0] - rows))

    def flops_per_row(self, units_a_row: int) -> float:
        return units_a_row * flops_per_token(self.config, units_a_row)

"""The Deeply Normalized Transformer (arXiv 2507.17501), a language model, for transformers.

    x0 = N_in(tok_emb + pos_emb)
    u  = x + N_mid1( Attention_QKNorm( N_pre1(x) ) )
    x' = u + N_mid2( FFN( N_pre2(u) ) )                 S4;  S5 drops N_pre2
    logits = tok_emb^T N_out(x)

Shapes in names: B rows, T new tokens, S tokens with those in the cache, D width, H heads, K width
of a head, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_dnt import DNTConfig

# where norms stand: before attention, before the FFN, behind both, of queries and keys, at the
# input
SETTINGS = {
    "S1": ("pre1", "pre2"),
    "S2": ("pre1", "pre2", "qk"),
    "S3": ("pre1", "pre2", "qk", "input"),
    "S4": ("pre1", "pre2", "qk", "input", "mid"),
    "S5": ("pre1", "qk", "input", "mid"),
    "peri": ("pre1", "pre2", "mid"),
}


RESIDUAL = "into_residual"  # an attribute, for _init_weights sees a module alone


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# the function behind W_1, and whether it gates W_3
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu": (F.relu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (_gelu_tanh, True),
}


class Norm(nn.Module):
    def __init__(self, size: int, config: DNTConfig) -> None:
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


def norm_if(wanted: bool, size: int, config: DNTConfig) -> nn.Module:
    return Norm(size, config) if wanted else nn.Identity()


def frequencies(rope: dict[str, Any], head_size: int, device: torch.device) -> Tensor:
    """Return the angle by which a position turns each pair: radians, float64 (K / 2,)."""
    place = torch.arange(0, head_size, 2, dtype=torch.float64, device=device)
    angles: Tensor = rope.get("theta", 10_000.0) ** (-place / head_size)
    scaling, factor = rope.get("scaling", "none"), rope.get("factor", 1.0)
    if scaling == "linear":
        angles = angles / factor
    if scaling == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = angles * rope["original_context"] / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        angles = angles * (unscaled + (1 - unscaled) / factor)
    return angles


def rotated(x_BTHK: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return queries or keys turned by their positions: i and i + K/2 are a pair."""
    if rotary is None:
        return x_BTHK
    cosines, sines = rotary
    first, second = x_BTHK.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(x_BTHK.dtype)


def attends_to(
    attention_mask: Tensor | None, past: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return which tokens each new one attends to, bool (B or 1, 1, T, S), and the positions
    int64 (B or 1, T) of ``length`` new tokens after ``past``; None for those before it and itself.
    """
    index_S = torch.arange(past + length, device=device)
    if attention_mask is not None and attention_mask.dim() == 4:
        # what `generate` makes for a cache of a fixed size, as long as that
        return attention_mask[..., : past + length], index_S[None, past:]
    if attention_mask is not None and not bool(attention_mask.all()):
        before = index_S <= index_S[past:, None]
        itself = index_S == index_S[past:, None]  # padding too, whose softmax would be NaN
        mask = (before & attention_mask[:, None, None, :].bool()) | itself
        return mask, (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    one_by_one = not past or length == 1
    mask_TS = None if one_by_one else index_S <= index_S[past:, None]
    return None if mask_TS is None else mask_TS[None, None], index_S[None, past:]


class Attention(nn.Module):
    def __init__(self, config: DNTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = size = config.head_size or config.width // config.heads
        kv_heads = config.kv_heads or config.heads
        self.shared_by = config.heads // kv_heads
        self.w_q = nn.Linear(config.width, config.heads * size, bias=config.bias)
        self.w_k = nn.Linear(config.width, kv_heads * size, bias=config.bias)
        self.w_v = nn.Linear(config.width, kv_heads * size, bias=config.bias)
        self.w_o = nn.Linear(config.heads * size, config.width, bias=config.bias)
        setattr(self.w_o, RESIDUAL, True)
        qk_norm = "qk" in SETTINGS[config.setting]
        self.norm_q = norm_if(qk_norm, size, config)
        self.norm_k = norm_if(qk_norm, size, config)

    def _split(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:-1], -1, self.head_size)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None, rotary: Any, cache: Any, causal: bool
    ) -> Tensor:
        q_BHTK = rotated(self.norm_q(self._split(self.w_q(x_BTD))), rotary).transpose(1, 2)
        k_BHSK = rotated(self.norm_k(self._split(self.w_k(x_BTD))), rotary).transpose(1, 2)
        v_BHSK = self._split(self.w_v(x_BTD)).transpose(1, 2)
        if cache is not None:
            seen = int(cache.get_seq_length(self.layer)) + x_BTD.shape[1]
            k_BHSK, v_BHSK = cache.update(k_BHSK, v_BHSK, self.layer)
            # one of a fixed size gives what is still empty too
            k_BHSK, v_BHSK = k_BHSK[:, :, :seen], v_BHSK[:, :, :seen]
        if self.shared_by > 1:
            k_BHSK = k_BHSK.repeat_interleave(self.shared_by, dim=1)
            v_BHSK = v_BHSK.repeat_interleave(self.shared_by, dim=1)
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=causal
        )
        y_BTD: Tensor = self.w_o(y_BHTK.transpose(1, 2).flatten(-2))
        return y_BTD


class FeedForward(nn.Module):
    def __init__(self, config: DNTConfig) -> None:
        super().__init__()
        hidden = config.ffn_size or config.ffn_multiple * config.width
        self.activation, gated = ACTIVATIONS[config.activation]
        self.w_1 = nn.Linear(config.width, hidden, bias=config.bias)
        self.w_2 = nn.Linear(hidden, config.width, bias=config.bias)
        setattr(self.w_2, RESIDUAL, True)
        self.w_3 = nn.Linear(config.width, hidden, bias=config.bias) if gated else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.activation(self.w_1(x_BTD))
        if self.w_3 is not None:
            hidden = hidden * self.w_3(x_BTD)
        y_BTD: Tensor = self.w_2(hidden)
        return y_BTD


class Block(nn.Module):
    def __init__(self, config: DNTConfig, layer: int) -> None:
        super().__init__()
        norms = SETTINGS[config.setting]
        self.norm_pre1 = norm_if("pre1" in norms, config.width, config)
        self.attn = Attention(config, layer)
        self.norm_mid1 = norm_if("mid" in norms, config.width, config)
        self.norm_pre2 = norm_if("pre2" in norms, config.width, config)
        self.ffn = FeedForward(config)
        self.norm_mid2 = norm_if("mid" in norms, config.width, config)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None, rotary: Any, cache: Any, causal: bool
    ) -> Tensor:
        attended = self.attn(self.norm_pre1(x_BTD), mask, rotary, cache, causal)
        x_BTD = x_BTD + self.norm_mid1(attended)
        out_BTD: Tensor = x_BTD + self.norm_mid2(self.ffn(self.norm_pre2(x_BTD)))
        return out_BTD


class DNTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DNTConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: DNTConfig) -> None:
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.pos_emb = nn.Embedding(config.context, config.width) if learned else None
        self.norm_in = norm_if("input" in SETTINGS[config.setting], config.width, config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm_out = norm_if(config.final_norm, config.width, config)
        self.head = (
            None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_emb = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, value: nn.Linear | None) -> None:
        self.head = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if getattr(module, RESIDUAL, False) and self.config.residual_init_scaled:
            std /= math.sqrt(2 * self.config.layers)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Norm):
            nn.init.constant_(module.gain, self.config.gain_init)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _rotary(self, positions_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines of the positions' angles: fp32 (B, T, 1, K / 2)."""
        config = self.config
        if config.positions != "rope":
            return None
        size = config.head_size or config.width // config.heads
        # in fp64, for at position 8,000 an fp32 angle is off in the fourth digit
        each = frequencies(config.rope, size, positions_BT.device)
        angles = positions_BT.to(torch.float64)[..., None, None] * each
        return angles.cos().float(), angles.sin().float()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, T, V), and with ``labels`` (B, T; -100 does not count) the mean cross
        entropy of the tokens that follow.

        Args:
            attention_mask: (B, S), 0 for padding; of the tokens in the cache too. Or (B, 1, T, S),
                as of `scaled_dot_product_attention`.
        """
        x_BTD = self.tok_emb(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length, device = x_BTD.shape[1], x_BTD.device
        if past + length > self.config.context:
            raise ValueError(
                f"{past + length} tokens, but the model's context is {self.config.context}; give "
                "fewer"
            )
        mask, places = attends_to(attention_mask, past, length, device)
        position_ids = places if position_ids is None else position_ids
        if self.pos_emb is not None:
            x_BTD = x_BTD + self.pos_emb(position_ids)
        rotary = self._rotary(position_ids)
        x_BTD = self.norm_in(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, mask, rotary, past_key_values, mask is None and length > 1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self._logits(x_BTD[:, kept])
        loss = None if labels is None else self._loss(logits_BTV, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV.to(x_BTD.dtype), past_key_values=past_key_values
        )
        return output.to_tuple() if return_dict is False else output

    def _logits(self, x_BTD: Tensor) -> Tensor:
        head_VD = self.tok_emb.weight if self.head is None else self.head.weight
        logits_BTV = F.linear(self.norm_out(x_BTD), head_VD)
        if (cap := self.config.logit_cap) is not None:
            logits_BTV = cap * torch.tanh(logits_BTV.float() / cap)
        return logits_BTV

    def _loss(self, logits_BTV: Tensor, labels_BT: Tensor, items: int | Tensor | None) -> Tensor:
        logits = logits_BTV[:, :-1].float().flatten(0, 1)
        targets = labels_BT[:, 1:].flatten().to(logits.device)
        total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        if self.training and self.config.z_loss:
            squares = logits.logsumexp(dim=-1).square()
            total = total + self.config.z_loss * (squares * (targets != -100)).sum()
        return total / ((targets != -100).sum() if items is None else items)

"""The settings of a Deeply Normalized Transformer (arXiv 2507.17501), by dnt-scale's names."""

from typing import Any

from transformers import PretrainedConfig


class DNTConfig(PretrainedConfig):
    """Settings as dnt-scale's `model.*`.

    Args:
        setting: where norms stand: S1 (PreNorm) to S5 of the paper, or peri.
        norm: rmsnorm or layernorm.
        positions: learned, rope or none; ``rope`` has theta, scaling (none, linear, llama3),
            factor, original_context, low_freq_factor and high_freq_factor.
        kv_heads, head_size, ffn_size: None: heads, width / heads, ffn_multiple x width.
        logit_cap: logits become cap tanh(logits / cap).
        z_loss: in training the loss has this times the square of the log partition function.
    """

    model_type = "dnt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
    }

    def __init__(
        self,
        layers: int = 6,
        width: int = 256,
        heads: int = 4,
        kv_heads: int | None = None,
        head_size: int | None = None,
        setting: str = "S5",
        norm: str = "rmsnorm",
        norm_eps: float = 1e-6,
        gain_init: float = 1.0,
        final_norm: bool = True,
        bias: bool = False,
        activation: str = "gelu",
        ffn_multiple: int = 4,
        ffn_size: int | None = None,
        init_std: float = 0.02,
        residual_init_scaled: bool = True,
        vocab_size: int = 4096,
        context: int = 256,
        positions: str = "learned",
        rope: dict[str, Any] | None = None,
        tied_head: bool = True,
        z_loss: float = 0.0,
        logit_cap: float | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.layers = layers
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_size = head_size
        self.setting = setting
        self.norm = norm
        self.norm_eps = norm_eps
        self.gain_init = gain_init
        self.final_norm = final_norm
        self.bias = bias
        self.activation = activation
        self.ffn_multiple = ffn_multiple
        self.ffn_size = ffn_size
        self.init_std = init_std
        self.residual_init_scaled = residual_init_scaled
        self.vocab_size = vocab_size
        self.context = context
        self.positions = positions
        self.rope = rope or {}
        self.tied_head = tied_head
        self.z_loss = z_loss
        self.logit_cap = logit_cap
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = tied_head
        super().__init__(**kwargs)

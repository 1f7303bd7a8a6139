"""V-DNT, an image classifier of the blocks of a DNT, and its ViT baseline (arXiv 2010.11929).

    x0 = N_in( [class token, W_p patches] + pos_emb )
    x' = the blocks of dnt_scale.model.block, every token attending to all
    logits = W_h N_out( x'[class token] )                or of the mean over the patches

Shapes in names: B rows, C channels, S pixels a side, P pixels a side of a patch, G patches a side,
T tokens, D width, L layers, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnt_scale.config import VitConfig
from dnt_scale.model.batch import IGNORED, Batch
from dnt_scale.model.block import SETTINGS, Block, norm_if
from dnt_scale.model.flops import matrices_flops
from dnt_scale.model.init import initial_tensor
from dnt_scale.model.task import Task


class VisionTransformer(nn.Module, Task):
    """An image classifier. Parameters are uninitialised until ``init_weights``.

    Its batches are those of ``ImageRows``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(3 * config.patch_size**2, config.width, bias=config.bias)
        self.cls = nn.Parameter(torch.empty(config.width)) if config.pooling == "token" else None
        self.pos_emb = nn.Embedding(config.tokens, config.width)
        self.norm_in = norm_if(SETTINGS[config.setting].input, config.width, config)
        self.blocks = nn.ModuleList(Block(config, causal=False) for _ in range(config.layers))
        self.norm_out = norm_if(config.final_norm, config.width, config)
        self.head = nn.Linear(config.width, config.classes, bias=config.bias)
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.empty(3, 1, 1), persistent=False)

    def fsdp_units(self) -> Sequence[nn.Module]:
        """See `Task`. The patch embedding, a small part of a block, is in none."""
        return [*self.blocks, self.head]

    def init_buffers(self) -> None:
        self.pixel_mean.copy_(torch.tensor(self.config.pixel_mean).view(3, 1, 1))
        self.pixel_std.copy_(torch.tensor(self.config.pixel_std).view(3, 1, 1))

    def forward(self, image_BCSS: Tensor, key_B: Tensor | None = None) -> Tensor:
        """Return logits_BK in the compute dtype.

        Args:
            image_BCSS: uint8.
            key_B: int64 in [0, 2^32), of training rows: decides which branches a row skips.
        """
        pixels_BCSS = (image_BCSS.float() / 255 - self.pixel_mean) / self.pixel_std
        x_BTD = self.patch(patches(pixels_BCSS, self.config.patch_size).to(self.patch.weight.dtype))
        if self.cls is not None:
            x_BTD = torch.cat([self.cls.expand(len(x_BTD), 1, -1), x_BTD], dim=1)
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        x_BTD = self.norm_in(x_BTD + self.pos_emb(positions))
        kept_LB2: list[Tensor | None] = [None] * len(self.blocks)
        if key_B is not None:
            kept_LB2 = self._kept(key_B, x_BTD.dtype)
        for block, kept_B2 in zip(self.blocks, kept_LB2, strict=True):
            x_BTD = block(x_BTD, None, kept_B2)
        x_BD = x_BTD.mean(1) if self.cls is None else x_BTD[:, 0]
        logits_BK: Tensor = self.head(self.norm_out(x_BD))
        return logits_BK

    def _kept(self, key_B: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """Return for each block by what its branches are multiplied (B, 2): 0, or what keeps their
        mean.

        Stochastic depth (arXiv 1603.09382): block l of L, from 1, drops a branch with probability
        rate (l - 1) / (L - 1), as timm does.
        """
        layers, found = len(self.blocks), list[Tensor | None]()
        for layer in range(layers):
            drop = self.config.stochastic_depth * layer / max(1, layers - 1)
            if not drop:
                found.append(None)
                continue
            branches = [uniform(key_B, 2 * layer + branch) for branch in (0, 1)]
            found.append(((torch.stack(branches, 1) >= drop) / (1 - drop)).to(dtype))
        return found

    def loss_sum(self, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        logits_BK = self(batch["image"], batch.get("key")).float()
        return _cross_entropy_sum(logits_BK, batch)

    def count(self, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        return (batch["label"] != IGNORED).sum()

    def eval_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of the loss, and of how often the label is the likeliest class and among
        the five likeliest.
        """
        assert isinstance(batch, dict)
        logits_BK = self(batch["image"]).float()
        best = logits_BK.topk(min(5, self.config.classes)).indices == batch["label"][:, None]
        loss = _cross_entropy_sum(logits_BK, batch)
        return {"loss": loss, "top1": best[:, 0].sum(), "top5": best.sum()}

    def initial(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        return initial_tensor(name, shape, self.config, seed)

    def flops_per_row(self, units_a_row: int) -> float:
        """Return the training FLOPs an image: 6 a weight and token that it meets, and attention.

        Class token and positions are no matrix products; the patch embedding sees the patches, the
        head one token.
        """
        config, tokens = self.config, self.config.tokens
        patch = 6.0 * (tokens - (self.cls is not None)) * self.patch.weight.numel()
        blocks = tokens * matrices_flops(self.blocks) + 12.0 * config.layers * (
            config.heads * config.sizes.head * tokens**2
        )
        return patch + blocks + 6.0 * self.head.weight.numel()


def _cross_entropy_sum(logits_BK: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy summed over the rows: fp32 scalar, nats."""
    if (target_BK := batch.get("target")) is not None:
        return F.cross_entropy(logits_BK, target_BK, reduction="sum")
    return F.cross_entropy(logits_BK, batch["label"], ignore_index=IGNORED, reduction="sum")


def patches(image_BCSS: Tensor, size: int) -> Tensor:
    """Return the patches of images (B, T, C P P), row by row: each as a convolution's weight has
    it.
    """
    rows, channels, side, _ = image_BCSS.shape
    grid = side // size
    cut_BCGPGP = image_BCSS.view(rows, channels, grid, size, grid, size)
    return cut_BCGPGP.permute(0, 2, 4, 1, 3, 5).reshape(rows, grid * grid, -1)


def uniform(key: Tensor, salt: int) -> Tensor:
    """Return a number in [0, 1) of each key and of the salt, fp64 of the keys' shape: the same
    wherever it is computed.

    The hash is lowbias32 (nullprogram.com/blog/2018/07/31, public domain), in int64.

    Args:
        key: int64 in [0, 2^32).
    """
    x = (key + 0x9E3779B9 * (salt + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 16)).double() / 2.0**32

"""Keys and values of the tokens that a decoder has seen, so that one more costs the work of one.

A row's token t stands in column t, whatever the lengths of other rows: so rows need no padding in
front, and one may be begun anew while the others go on. Shapes in names: R rows of the cache, B
those of a call, H heads of queries, G heads of keys and values, C columns, S those in use, T tokens
of a call, K width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dnt_scale.config import ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """What one call of a block does with the keys and values of its layer."""

    keys_RGCK: Tensor
    values_RGCK: Tensor
    rows_B: Tensor  # int64, the cache's rows that the call's are
    columns_B: Tensor | None  # int64, of each row's one new token; None: the texts begin here
    seen: int  # columns that a new token may attend to
    mask_B11S: Tensor | None  # bool, which of them each does; None: all

    @property
    def goes_on(self) -> bool:
        """Whether there are tokens before those of the call."""
        return self.columns_B is not None

    def keep(self, k_BGTK: Tensor, v_BGTK: Tensor) -> None:
        """Store the keys and values of the call's tokens."""
        for stored_RGCK, new_BGTK in ((self.keys_RGCK, k_BGTK), (self.values_RGCK, v_BGTK)):
            if self.columns_B is None:
                stored_RGCK[self.rows_B, :, : new_BGTK.shape[2]] = new_BGTK
            else:
                stored_RGCK[self.rows_B, :, self.columns_B] = new_BGTK[:, :, 0]

    def attended(self, q_BHTK: Tensor) -> Tensor:
        """Return y_BHTK of a token a row (T is 1), for which `keep` was called."""
        rows, heads, _, size = q_BHTK.shape
        shared = self.keys_RGCK.shape[1]
        # queries that share a head stand where several tokens would, so that no key is copied
        y_BGTK = F.scaled_dot_product_attention(
            q_BHTK.reshape(rows, shared, heads // shared, size),
            self.keys_RGCK[:rows, :, : self.seen],
            self.values_RGCK[:rows, :, : self.seen],
            attn_mask=self.mask_B11S,
        )
        return y_BGTK.reshape(rows, heads, 1, size)


@dataclass(frozen=True)
class CacheCall:
    """What one call of a model does with a cache."""

    layers: list[LayerCache]
    positions_BT: Tensor | None  # int64, of its tokens; None: as their documents lie


class Cache:
    """Keys and values of ``rows`` texts of at most ``capacity`` tokens, in memory from the start.

    Args:
        eos: begins a document, outside of which its tokens do not attend; None: a row is one text.
        like: of the dtype and on the device that the model computes with.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, eos: int | None, like: Tensor
    ) -> None:
        size, shared, _ = config.sizes
        # Zeros, for what a mask hides is multiplied by 0, and NaN would stay.
        self.layers = like.new_zeros(config.layers, 2, rows, shared, capacity, size)
        self.eos = eos
        self.lengths = [0] * rows  # tokens of each row
        self.begins = [0] * rows  # the column where each row's last document begins

    def first_tokens(
        self, rows: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, CacheCall]:
        """Return tokens_BT, int64, of texts for rows that they are to fill, in the place of what is
        there, and how.
        """
        longest = max(map(len, texts))
        for row, text in zip(rows, texts, strict=True):
            self.lengths[row] = len(text)
            self.begins[row] = max(
                (at for at, each in enumerate(text) if each == self.eos), default=0
            )
        # What stands behind a text is seen by none of it.
        padded = [[*text, *[0] * (longest - len(text))] for text in texts]
        device = self.layers.device
        rows_B = torch.tensor(rows, device=device)
        layers = [LayerCache(k, v, rows_B, None, 0, None) for k, v in self.layers.unbind()]
        documents = any(self.begins[row] for row in rows)
        positions_BT = None if documents else torch.arange(longest, device=device)[None]
        return torch.tensor(padded, device=device), CacheCall(layers, positions_BT)

    def next_tokens(self, tokens: Sequence[int]) -> tuple[Tensor, CacheCall]:
        """Return tokens_BT, int64 with T of 1, that follow in the first rows, and how."""
        count, device = len(tokens), self.layers.device
        for row, token in enumerate(tokens):
            if token == self.eos:
                self.begins[row] = self.lengths[row]
        columns, begins = self.lengths[:count], self.begins[:count]
        self.lengths[:count] = [length + 1 for length in columns]
        seen = max(columns) + 1
        columns_B, begins_B = torch.tensor([columns, begins], device=device)
        mask_B11S = None
        if any(begins) or min(columns) + 1 < seen:
            index_S = torch.arange(seen, device=device)
            mask_BS = (index_S <= columns_B[:, None]) & (index_S >= begins_B[:, None])
            mask_B11S = mask_BS[:, None, None]
        rows_B = torch.arange(count, device=device)
        layers = [
            LayerCache(k, v, rows_B, columns_B, seen, mask_B11S) for k, v in self.layers.unbind()
        ]
        tokens_BT = torch.tensor(tokens, device=device)[:, None]
        return tokens_BT, CacheCall(layers, (columns_B - begins_B)[:, None])

    def empty(self, row: int) -> None:
        """Begin a row whose first token is the next one."""
        self.lengths[row] = self.begins[row] = 0

    def close_up(self, ended: Sequence[bool]) -> list[int]:
        """Let go of those of the first rows that have ended, and put the last ones in their places;
        return, for each of the first rows now, which one it was.
        """
        were = list(range(len(ended)))
        for row in reversed(were.copy()):
            if ended[row]:
                last = were.pop()
                if row < len(were):
                    were[row] = last
                    self.move(len(were), row)
        return were

    def move(self, source: int, target: int) -> None:
        """Put row ``source`` in the place of row ``target``."""
        length = self.lengths[source]
        self.layers[:, :, target, :, :length] = self.layers[:, :, source, :, :length]
        self.lengths[target], self.begins[target] = length, self.begins[source]

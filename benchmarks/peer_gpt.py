"""The peer of `benchmarks.train_speed`: GPT-2 and its training loop as one writes them by hand.

    python -m benchmarks.peer_gpt TURN_STEPS SHAPE.json

Blocks of LayerNorm, one matrix for queries, keys and values, GELU, biases; embedding and head
tied; autocast for bf16; gradients clipped to norm 1; torch's fused AdamW. Its rows are random and
drawn before, so that it waits for no data, and it writes nothing: what our loop does beside the
arithmetic is not done here.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.turns import Phases, Turns

STD = 0.02  # of initial weights


@dataclass(frozen=True)
class Shape:
    """What the peer shares with the run it is measured against."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    seq_len: int
    global_batch: int
    micro_batch: int
    dtype: str  # bf16, fp32
    compiled: bool
    steps: int


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream (rows, tokens, width) after the block."""
        rows, tokens, width = x.shape
        parts = self.qkv(self.before_attention(x)).view(rows, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, tokens, width))
        z: Tensor = x + self.down(F.gelu(self.up(self.before_mlp(x))))
        return z


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.seq_len, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.last = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def body(self, ids: Tensor) -> Tensor:
        """Return the residual stream before the head."""
        x: Tensor = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy: nats."""
        logits = F.linear(self.last(self.body(ids)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(shape: Shape, turns: Turns) -> None:
    """Do so many steps, by turns."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(shape).to(device)
    part = turns.phases.part
    if not shape.compiled:  # what is compiled is one piece: forward and loss are not told apart
        turns.phases.watch(GPT, "body", "forward")
    loss_of = torch.compile(model) if shape.compiled else model
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    rows = torch.randint(shape.vocab_size, (shape.global_batch, shape.seq_len + 1))
    micro_batches = rows.split(shape.micro_batch)
    for _ in range(shape.steps):
        turns.begin()
        for micro in micro_batches:
            ids = micro.to(device)
            with part("loss"), torch.autocast(device, torch.bfloat16, shape.dtype == "bf16"):
                loss = loss_of(ids[:, :-1], ids[:, 1:]) / len(micro_batches)
            with part("backward"):
                loss.backward()
        with part("optimizer"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        turns.end()


if __name__ == "__main__":
    wanted = Shape(**json.loads(Path(sys.argv[2]).read_text()))
    train(wanted, Turns(int(sys.argv[1]), Phases()))

"""Rounding to bf16 at random, to either neighbour, such that the expectation is exact."""

import hashlib

import torch
from torch import Tensor


class RandomBits:
    """Private generators, one a device, whose draws are a function of a seed and of numbers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device, *numbers: int) -> torch.Generator:
        """Return the device's generator, seeded anew by this object's seed and ``numbers``."""
        generator = self._generators.setdefault(device, torch.Generator(device))
        digest = hashlib.sha256(repr((self.seed, *numbers)).encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))
        return generator


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round flat fp32 values to bf16, up with the probability that makes the expectation exact.

    A bf16 is the upper half of an fp32's bits: adding 16 random bits to the lower half carries with
    that probability. Values that bf16 holds stay as they are; those that are not finite become NaN.
    """
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits: four values' worth
    bits = words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
    rounded = bits.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    # A carry can turn a NaN's bits into a number's: adding 0 times the NaN makes it one again.
    return rounded.add_(values, alpha=0).to(torch.bfloat16)

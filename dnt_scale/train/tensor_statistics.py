"""Scale-free statistics of tensors that are spread over ranks: how heavy their tails are.

A smaller scale alone makes a histogram of gradients narrower, so all of these are of the entries
divided by their RMS. For each tensor every rank counts the entries that it holds; counts add up
exactly, so the result is the same on any number of ranks, to rounding of the sums of powers.

Counts are of |x| by the leading bits of its fp32 form: the exponent and 5 bits of the mantissa,
which are 32 bins an octave, each at most 3.1 % wide. Quantiles are interpolated inside of a bin.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.checkpoint.tensor_shards import TensorShard, shard_to_write

BINS_PER_OCTAVE = 32
SHIFT = 18  # bits of the mantissa that do not count: 23 of fp32 less 5
BINS = 256 * BINS_PER_OCTAVE  # of all exponents
FINITE = 255 * BINS_PER_OCTAVE  # the bins from here on are of inf and nan
TAIL_SHARE = 0.01  # of the entries, whose decay is the Hill index
LEAST_ENTRIES = 1000  # below it a tensor has no tail to speak of: no quantiles, no Hill index


class TensorStatistics(NamedTuple):
    """What is told of one tensor x of N entries; nan where it has no meaning.

    Attributes:
        elements: N.
        rms: sqrt(sum x^2 / N), in the tensor's own unit.
        kurtosis: N sum x^4 / (sum x^2)^2, about zero: a constant has 1, a normal distribution 3.
        q999_q50: the quantile of |x| at 0.999 over that at 0.5. A normal distribution has 4.88.
        hill: the tail index alpha of P(|x| > t) ~ t^-alpha over the largest 1 % of |x|: 1 / mean
            log(|x| / their smallest); Hill (1975), "A simple general approach to inference about
            the tail of a distribution", Annals of Statistics 3(5). Small: heavy; the fourth moment
            is infinite at 4 or below. A normal distribution has about 8.6 there.
        max_rms: max |x| / rms.
        zeros: the share of entries that are 0 (or below 1e-39).
    """

    elements: int
    rms: float
    kurtosis: float
    q999_q50: float
    hill: float
    max_rms: float
    zeros: float


@dataclass
class Entries:
    """What this rank has seen of the entries of some tensors, or after ``over_ranks`` all ranks.

    Attributes:
        counts: by bins of |x|, int64 (tensors, BINS).
        powers: sums of x^2 and of x^4, float64 (tensors, 2).
        largest: of |x|, float64 (tensors,).
    """

    counts: Tensor
    powers: Tensor
    largest: Tensor

    @classmethod
    def none(cls, tensors: int, device: torch.device) -> "Entries":
        """Return those of tensors of which nothing was seen."""
        return cls(
            torch.zeros(tensors, BINS, dtype=torch.int64, device=device),
            torch.zeros(tensors, 2, dtype=torch.float64, device=device),
            torch.zeros(tensors, dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def add(self, tensor: int, values: Tensor) -> None:
        """Count the values, of any shape and float dtype, on any device, as entries of a tensor."""
        for piece in pieces(values):
            bits = piece.float().abs().view(torch.int32) >> SHIFT
            self.counts[tensor] += torch.bincount(bits, minlength=BINS).to(self.counts.device)
            squares = piece.double().square()
            powers = torch.stack([squares.sum(), squares.square().sum()])
            self.powers[tensor] += powers.to(self.powers.device)
            largest = squares.amax().sqrt().to(self.largest.device)
            self.largest[tensor] = torch.maximum(self.largest[tensor], largest)

    def over_ranks(self) -> None:
        """Take in what the other ranks have seen. A collective."""
        dist.all_reduce(self.counts)
        dist.all_reduce(self.powers)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)

    def statistics(self) -> list[TensorStatistics]:
        """Return each tensor's, of what was seen. The host waits for the device."""
        counts, powers, largest = (x.cpu() for x in (self.counts, self.powers, self.largest))
        return [
            _of_one(own, squares, fourths, most)
            for own, (squares, fourths), most in zip(
                counts, powers.tolist(), largest.tolist(), strict=True
            )
        ]


def pieces(values: Tensor) -> Iterator[Tensor]:
    """Yield the values flat, so many at a time that what is made of them stays small."""
    return iter(
        values.detach().reshape(-1).split(1 << 17 if values.device.type == "cpu" else 1 << 22)
    )


def shared_out(shards: Iterable[TensorShard]) -> list[TensorShard]:
    """Return what of these shards this rank looks at, so that together ranks see all once."""
    own = (shard_to_write(shard) for shard in shards)
    return [shard for shard in own if shard is not None and shard.data.numel()]


def gradient_statistics(
    shards: Sequence[TensorShard], names: Sequence[str], device: torch.device
) -> list[TensorStatistics]:
    """Return the statistics of gradients, ``grad.NAME``, in the order of ``names``. A collective.

    Args:
        shards: this rank's.
        names: of all tensors, in an order that all ranks share.
        device: for the exchange between ranks.
    """
    seen = Entries.none(len(names), device)
    number = {f"grad.{name}": place for place, name in enumerate(names)}
    for shard in shared_out(shards):
        seen.add(number[shard.name], shard.data)
    seen.over_ranks()
    return seen.statistics()


def _of_one(counts: Tensor, squares: float, fourths: float, largest: float) -> TensorStatistics:
    elements = int(counts.sum())
    zeros = float(counts[0]) / elements if elements else math.nan
    unknown = TensorStatistics(elements, math.nan, math.nan, math.nan, math.nan, math.nan, zeros)
    if not elements or counts[FINITE:].any():
        return unknown
    rms = (squares / elements) ** 0.5
    if not rms:
        return unknown._replace(rms=0.0)
    ratio = hill = math.nan
    if elements >= LEAST_ENTRIES:
        middle, high = quantile(counts, 0.5), quantile(counts, 0.999)
        ratio = high / middle if counts[0] < elements / 2 else math.nan
        hill = hill_index(counts, TAIL_SHARE)
    kurtosis = elements * fourths / squares**2
    return TensorStatistics(elements, rms, kurtosis, ratio, hill, largest / rms, zeros)


def bin_edges() -> Tensor:
    """Return the edges of the bins of finite numbers, from 0 to 2^128: float64 (FINITE + 1,)."""
    bits = torch.arange(FINITE, dtype=torch.int32) << SHIFT
    return torch.cat(
        [bits.view(torch.float32).double(), torch.tensor([2.0**128], dtype=torch.float64)]
    )


EDGES = bin_edges()


def quantile(counts: Tensor, at: float) -> float:
    """Return the quantile of |x|, interpolated inside of its bin.

    Args:
        counts: by bins, (BINS,), none of inf and nan.
        at: 0 to 1.
    """
    cumulative = counts.cumsum(0).double()
    place = at * cumulative[-1]
    own = int(torch.searchsorted(cumulative, place))
    share = (place - cumulative[own] + counts[own]) / counts[own]
    return float(EDGES[own] + share * (EDGES[own + 1] - EDGES[own]))


def hill_index(counts: Tensor, share: float) -> float:
    """Return the Hill index over the largest ``share`` of |x|; nan where they are 0.

    Entries count as the middle of their bin: 1 / alpha is within 0.1 % by that at alpha 4.
    """
    threshold = quantile(counts, 1.0 - share)
    if threshold <= float(EDGES[1]):
        return math.nan
    lower, upper = EDGES[:-1].clamp(min=threshold), EDGES[1:]
    inside = upper > lower
    part = (upper - lower) / (upper - EDGES[:-1])  # of the threshold's own bin, else 1
    weights = (counts[:FINITE] * part)[inside]
    excess = (0.5 * (lower + upper))[inside].log() - math.log(threshold)
    return float(weights.sum() / (weights * excess).sum())


def rms_of(parts: Sequence[tuple[float, float]]) -> float:
    """Return the RMS of what consists of parts, each (elements, RMS)."""
    elements = math.fsum(number for number, _ in parts)
    squares = math.fsum(number * rms**2 for number, rms in parts)
    return math.sqrt(squares / elements) if elements else math.nan


class Change(NamedTuple):
    """What a step has done to one tensor; nan where the weights or the update tell nothing.

    Attributes:
        elements: of the tensor.
        weight_rms: before the step.
        update_rms: of the difference.
        update_ratio: norm of the difference over the norm of the weights before.
        angle: between the weights before and after, as vectors, radians.
    """

    elements: int
    weight_rms: float
    update_rms: float
    update_ratio: float
    angle: float


class Changes:
    """Weights before a step, of which this rank keeps its share, to be compared with those after.

    It takes 4 bytes a parameter over the ranks together, on the device, for one step.
    """

    def __init__(self, shards: Sequence[TensorShard]) -> None:
        self.before = [shard.data.detach().clone() for shard in weights_of(shards)]

    @torch.no_grad()
    def since(
        self, shards: Sequence[TensorShard], names: Sequence[str], device: torch.device
    ) -> list[Change]:
        """Return what has become of each tensor, in the order of ``names``. A collective.

        Args:
            shards: the engine's, after the step.
            names: of all tensors, in an order that all ranks share.
            device: for the exchange between ranks.
        """
        number = {f"model.{name}": place for place, name in enumerate(names)}
        sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)
        for old, shard in zip(self.before, weights_of(shards), strict=True):
            for before, after in zip(pieces(old), pieces(shard.data), strict=True):
                w = before.double()
                d = after.double() - w
                found = torch.stack([w.square().sum(), d.square().sum(), (w * d).sum()])
                sums[number[shard.name], :3] += found.to(device)
            sums[number[shard.name], 3] += old.numel()
        dist.all_reduce(sums)
        return [change(*row) for row in sums.tolist()]


def weights_of(shards: Sequence[TensorShard]) -> list[TensorShard]:
    """Return what of the weights this rank looks at."""
    return shared_out(shard for shard in shards if shard.name.startswith("model."))


def change(squares: float, moved: float, product: float, elements: float) -> Change:
    """Return the change of a tensor w by d out of sums of squares w^2, d^2 and of w d.

    The angle is atan2 of the parts of w + d across w and along it, which is exact to 1e-8 of |d| /
    |w|; the arc cosine of a small angle is not.
    """
    weight_rms, update_rms = (squares / elements) ** 0.5, (moved / elements) ** 0.5
    if not squares:
        return Change(int(elements), weight_rms, update_rms, math.nan, math.nan)
    norm = squares**0.5
    across = max(0.0, moved - product**2 / squares) ** 0.5
    angle = math.atan2(across, norm + product / norm)
    return Change(int(elements), weight_rms, update_rms, (moved / squares) ** 0.5, angle)

"""Clipping by group: which gradients are bounded together, and what by (`groups.NAME.clip`)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnt_scale.config import OptimizerConfig
from dnt_scale.optim.groups import group_labels


class Bound(NamedTuple):
    """Gradients that are clipped as one, by the norm of them all.

    members: their places in the list of parameters, ascending.
    clip_norm: what that norm is at most.
    """

    members: list[int]
    clip_norm: float


def bounds(names: Sequence[str], optim: OptimizerConfig) -> list[Bound]:
    """Return what is clipped together; parameters in none of it are not clipped.

    Empty where no group has a ``clip`` of its own: then the judge clips the whole gradient.

    Args:
        names: of all parameters.

    Raises:
        ConfigError: as `group_labels` does.
    """
    if not optim.clips_by_group:
        return []
    labels = group_labels(names, optim)
    found: dict[str, Bound] = {}
    for place, name in enumerate(names):
        group = optim.groups.get(labels[name])
        clip = group.clip or "global" if group else "global"
        own = group if group and clip == "group" else None
        clip_norm = own.clip_norm if own and own.clip_norm is not None else optim.clip_norm
        if clip == "none" or clip_norm is None:
            continue
        together = labels[name] if own else ""
        found.setdefault(together, Bound([], clip_norm)).members.append(place)
    return list(found.values())


def factors(
    bounds: Sequence[Bound], squares: Sequence[float], judged: float, count: int
) -> list[float]:
    """Return what each parameter's gradient is multiplied by.

    min(judged, clip_norm / norm), norm being that of all that is clipped together.

    Args:
        squares: squared norms, of each of ``bounds``.
        judged: the judge's factor, which holds for every gradient: a spike's too.
        count: of parameters.
    """
    found = [judged] * count
    for bound, square in zip(bounds, squares, strict=True):
        if square > bound.clip_norm**2:
            for place in bound.members:
                found[place] = min(judged, bound.clip_norm / square**0.5)
    return found


def late_factors(
    bounds: Sequence[Bound], squares: Sequence[Tensor], judged: Tensor, count: int
) -> list[tuple[list[int], Tensor]]:
    """Return what ``factors`` does on the device: places of parameters, and a float64 scalar that
    the gradients there are multiplied by. The host waits for nothing.

    Args:
        squares, judged: float64 scalars on the device.
    """
    bounded = {place for bound in bounds for place in bound.members}
    rest = [place for place in range(count) if place not in bounded]
    found = [(rest, judged)] if rest else []
    for bound, square in zip(bounds, squares, strict=True):
        own = torch.minimum(judged, torch.full_like(square, bound.clip_norm) / square.sqrt())
        found.append((bound.members, torch.where(square > bound.clip_norm**2, own, judged)))
    return found

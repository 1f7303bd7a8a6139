"""Parameter groups: a learning rate, decay and update of their own, by regex over names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dnt_scale.config import ConfigError, OptimizerConfig
from dnt_scale.optim.transfer import Ratios, scaled
from dnt_scale.optim.updates.plain import Plain

Named = Iterable[tuple[str, nn.Parameter]]  # every parameter that is trained, by its name


def group_labels(names: Iterable[str], config: OptimizerConfig) -> dict[str, str]:
    """Return the group of each parameter: its label in ``optim.groups``, where no pattern matches
    that of the group without one, else ``default``.

    Raises:
        ConfigError: a pattern that is no regex, or a parameter that two patterns match.
    """
    rules, rest = {}, "default"
    for label, group in config.groups.items():
        if group.pattern is None:
            rest = label
            continue
        try:
            rules[label] = re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(
                f"optim.groups.{label}.pattern: {group.pattern!r} is not a regex: {error}"
            ) from None
    labels = {}
    for name in names:
        matching = [label for label, regex in rules.items() if regex.search(name)]
        if len(matching) > 1:
            raise ConfigError(
                f"optim.groups: parameter {name} is matched by {' and '.join(matching)}; narrow "
                "one pattern"
            )
        labels[name] = matching[0] if matching else rest
    return labels


def parameter_groups(
    named: Named, config: OptimizerConfig, lr_ratios: Ratios | None = None
) -> list[dict[str, Any]]:
    """Put every parameter in one group; what no pattern matches gets the optimizer's own values.

    Tensors with fewer than two dimensions (gains, biases) are never decayed. Each dict has label,
    params, names, given_lr, lr, base_lr (what the schedule multiplies), weight_decay, update (an
    `UpdateRule`) and algorithm (an `Algorithm`).

    Args:
        lr_ratios: what learning rates are scaled by; None: nothing.

    Raises:
        ConfigError: a pattern that is no regex or matches nothing, a parameter that two patterns
            match, or an update of matrices on a tensor that is none.
    """
    parameters = list(named)
    label_of = group_labels([name for name, _ in parameters], config)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {
        label: [] for label in [*config.groups, "default"]
    }
    for name, parameter in parameters:
        members[label_of[name]].append((name, parameter))

    groups = []
    every_name = [name for inside in members.values() for name, _ in inside]
    for label, inside in members.items():
        if not inside and label in config.groups:
            examples = ", ".join(every_name[:3])
            pattern = config.groups[label].pattern
            what = "null, but others leave" if pattern is None else f"{pattern!r} matches"
            raise ConfigError(
                f"optim.groups.{label}.pattern: {what} no parameter; names look like {examples}"
            )
        rule = config.groups.get(label, Plain(pattern=None))
        lr = config.lr if rule.lr is None else rule.lr
        decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        decay = 0.0 if rule.fixed_norm else decay
        dimensions, what = rule.dimensions, rule.update
        if rule.fixed_norm:
            dimensions, what = 2, "fixed_norm"
        for name, parameter in inside:
            if dimensions and parameter.ndim != dimensions:
                wanted = "matrices" if dimensions == 2 else f"{dimensions} dimensions"
                raise ConfigError(
                    f"optim.groups.{label}: {what} needs {wanted}, but {name} has shape "
                    f"{tuple(parameter.shape)}; narrow the pattern"
                )
        algorithm = rule.optimizer or config
        for decayed in (True, False):
            now = scaled(lr, rule, algorithm, lr_ratios, matrix=decayed)
            part = [(name, p) for name, p in inside if (p.ndim >= 2) == decayed]
            if part:
                groups.append(
                    {
                        "label": label,
                        "params": [p for _, p in part],
                        "names": [name for name, _ in part],
                        "given_lr": lr,
                        "lr": now,
                        "base_lr": now,
                        "weight_decay": decay if decayed else 0.0,
                        "update": rule,
                        "algorithm": algorithm,
                    }
                )
    return groups


def buffer_shapes(
    weights: Mapping[str, tuple[int, ...]], config: OptimizerConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every buffer of weights of these shapes, by its name in checkpoints.

    Raises:
        ConfigError: as `parameter_groups` does.
    """
    named = [
        (name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in weights.items()
    ]
    found: dict[str, tuple[int, ...]] = {}
    for group in parameter_groups(named, config):
        for name in group["names"]:
            shape = weights[name]
            found |= {f"{buffer}.{name}": shape for buffer in group["algorithm"].buffers()}
            found |= {f"{buffer}.{name}": shape[:1] for buffer in group["update"].row_buffers}
    return found

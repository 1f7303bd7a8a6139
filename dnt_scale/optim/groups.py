"""Parameter groups: a learning rate, decay and update of their own, by regex over names."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from dnt_scale.config import ConfigError, OptimizerConfig
from dnt_scale.optim.updates.plain import Plain

Named = Iterable[tuple[str, nn.Parameter]]  # every parameter that is trained, by its name


def parameter_groups(named: Named, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Put every parameter in one group; what no pattern matches gets the optimizer's own values.

    Tensors with fewer than two dimensions (gains, biases) are never decayed. Each dict has params,
    names, lr, base_lr (what the schedule multiplies), weight_decay and update, an `UpdateRule`.

    Raises:
        ConfigError: a pattern that is no regex or matches nothing, a parameter that two patterns
            match, or an update of matrices on a tensor that is none.
    """
    rules = {}
    for label, group in config.groups.items():
        try:
            rules[label] = re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(
                f"optim.groups.{label}.pattern: {group.pattern!r} is not a regex: {error}"
            ) from None
    members: dict[str, list[tuple[str, nn.Parameter]]] = {
        label: [] for label in [*rules, "default"]
    }
    for name, parameter in named:
        matching = [label for label, regex in rules.items() if regex.search(name)]
        if len(matching) > 1:
            raise ConfigError(
                f"optim.groups: parameter {name} is matched by {' and '.join(matching)}; narrow "
                "one pattern"
            )
        members[matching[0] if matching else "default"].append((name, parameter))

    groups = []
    every_name = [name for inside in members.values() for name, _ in inside]
    for label, inside in members.items():
        if not inside and label in rules:
            examples = ", ".join(every_name[:3])
            raise ConfigError(
                f"optim.groups.{label}.pattern: {rules[label].pattern!r} matches no parameter; "
                f"names look like {examples}"
            )
        rule = config.groups.get(label, Plain(pattern=""))
        lr = config.lr if rule.lr is None else rule.lr
        decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        for name, parameter in inside:
            if rule.dimensions and parameter.ndim != rule.dimensions:
                wanted = "matrices" if rule.dimensions == 2 else f"{rule.dimensions} dimensions"
                raise ConfigError(
                    f"optim.groups.{label}: {rule.update} needs {wanted}, but {name} has shape "
                    f"{tuple(parameter.shape)}; narrow the pattern"
                )
        for decayed in (True, False):
            part = [(name, p) for name, p in inside if (p.ndim >= 2) == decayed]
            if part:
                groups.append(
                    {
                        "params": [p for _, p in part],
                        "names": [name for name, _ in part],
                        "lr": lr,
                        "base_lr": lr,
                        "weight_decay": decay if decayed else 0.0,
                        "update": rule,
                    }
                )
    return groups

"""`optim.scale`: learning rates that were tuned on a small run, for this one.

    lr <- lr (width / scale.width)^w (batch / scale.batch)^b (tokens / scale.tokens)^TOKENS

w and b are the update rule's or the algorithm's own, see their files; w is that of a matrix, and
gains and biases have none. docs/dnt.md derives w. Nothing else is scaled: no weight decay, no
momentum, no depth.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dnt_scale.config import ConfigError, GroupConfig, OptimizerConfig, RunConfig

# Measured for AdamW at a fixed batch (Bjorck et al., arXiv 2409.19913), and again for Muon on fixed
# norms (arXiv 2603.28743); taken for every rule.
TOKENS = -0.32


class Ratios(NamedTuple):
    """This run over the one that was tuned; 1 for what is not scaled by."""

    width: float = 1.0
    batch: float = 1.0
    tokens: float = 1.0


def ratios(run: RunConfig, units_a_row: int, of_stages: Mapping[str, int] = {}) -> Ratios | None:
    """Return what learning rates are scaled by; None without ``optim.scale``.

    A stage of another batch has no ratio of its own: its ``lr_factor`` says what it has.

    Args:
        units_a_row: what a row counts: tokens, of text.
        of_stages: the same of stages, by name.

    Raises:
        ConfigError: the model has no width.
    """
    scale = run.optim.scale
    if not scale.given:
        return None
    width, batch = getattr(run.model, "width", None), run.train.global_batch * units_a_row
    if scale.width is not None and not isinstance(width, int):
        raise ConfigError(
            f"optim.scale.width is {scale.width}, but a model of kind {run.model.kind} has no "
            "width; remove optim.scale.width"
        )
    last = run.spans(units_a_row, of_stages)[-1]
    return Ratios(
        width / scale.width if scale.width and width else 1.0,
        batch / scale.batch if scale.batch else 1.0,
        last.units_at(last.end) / scale.tokens if scale.tokens else 1.0,
    )


def scaled(
    lr: float,
    rule: GroupConfig,
    algorithm: OptimizerConfig,
    lr_ratios: Ratios | None,
    *,
    matrix: bool = True,
) -> float:
    """Return a learning rate for this run: that of matrices, or of gains and biases."""
    if lr_ratios is None:
        return lr
    powers = algorithm.powers(rule)
    assert powers is not None, "the section is validated"
    width = lr_ratios.width**powers.width if matrix else 1.0
    batch, tokens = lr_ratios.batch**powers.batch, lr_ratios.tokens**TOKENS
    return float(lr * width * batch * tokens)


def rates(groups: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the learning rates given and scaled, by group; ``NAME.vectors`` where a group has
    gains or biases beside its matrices.

    Args:
        groups: of `parameter_groups`.
    """
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        name = group["label"]
        found[f"{name}.vectors" if name in found else name] = group["given_lr"], group["lr"]
    return found


def told(given: Mapping[str, tuple[float, float]]) -> str:
    """Return `rates` in a line."""
    each = ", ".join(f"{name} {before:.4g} -> {now:.4g}" for name, (before, now) in given.items())
    return f"learning rates by optim.scale: {each}"

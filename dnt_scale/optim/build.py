"""Make the optimizer that a configuration names."""

from dnt_scale.config import OptimizerConfig
from dnt_scale.optim.algorithm import Algorithm
from dnt_scale.optim.groups import Named, parameter_groups
from dnt_scale.optim.sharded_optimizer import ShardedOptimizer
from dnt_scale.optim.transfer import Ratios, scaled
from dnt_scale.optim.updates.plain import Plain


def build_optimizer(
    named: Named, config: OptimizerConfig, seed: int, lr_ratios: Ratios | None = None
) -> ShardedOptimizer:
    """Return the optimizer, without its state.

    ``allocate`` it once its groups hold the tensors that it is going to step.

    Args:
        named: every parameter that is trained, by its name in the model.
        seed: seeds the stochastic rounding of buffers in bf16.
        lr_ratios: what learning rates are scaled by; None: nothing.

    Raises:
        ConfigError: as `parameter_groups` does.
    """
    assert isinstance(config, Algorithm), f"{type(config).__name__} has no update rule"
    groups = parameter_groups(named, config, lr_ratios)
    optimizer = ShardedOptimizer(config, groups, seed)
    optimizer.defaults["lr"] = scaled(config.lr, Plain(pattern=None), config, lr_ratios)
    return optimizer

"""Engines: how a model is spread over devices and stepped. ``base.py`` holds the protocol."""

from collections.abc import Callable

from dnt_scale.config import ConfigError, DeepSpeedEngineConfig, RunConfig, Spans
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.averaging import AveragingEngine
from dnt_scale.engine.base import Engine
from dnt_scale.model.task import Task
from dnt_scale.optim.transfer import Ratios


def build(
    config: RunConfig,
    model_fn: Callable[[], Task],
    ranks: Ranks,
    total_steps: int,
    lr_ratios: Ratios | None = None,
    spans: Spans = (),
) -> Engine:
    """The engine that ``config.engine`` names, with initial weights and its optimizer allocated.

    Args:
        model_fn: makes the unsharded model; the engine decides on which device.
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.
        lr_ratios: what learning rates are scaled by, with ``optim.scale``.
        spans: the steps of the run's stages, which have factors of their own.

    Raises:
        AgreedError: an optimizer group, a schedule or an engine that does not fit the model, the
            run or the ranks.
    """
    assert (lr_ratios is not None) == config.optim.scale.given, "see transfer.ratios"
    built: Engine
    try:
        if isinstance(config.engine, DeepSpeedEngineConfig):
            from dnt_scale.engine import deepspeed

            built = deepspeed.build(config, model_fn, ranks, total_steps, lr_ratios, spans)
        else:
            from dnt_scale.engine import fsdp

            built = fsdp.build(config, model_fn, ranks, total_steps, lr_ratios, spans)
    except ConfigError as error:  # all ranks have the same configuration
        raise AgreedError(str(error)) from None
    return built if config.train.ema is None else AveragingEngine(built, config.train.ema)

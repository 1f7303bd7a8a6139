"""The configuration of a run: sections as pydantic models, composed by Hydra out of ``configs/``
and overrides.

``load(overrides)`` is the one way in. Importing this loads no torch.
"""

from dnt_scale.config.augment import AugmentSection
from dnt_scale.config.base import ConfigError, Strict
from dnt_scale.config.compose import (
    budget,
    changed,
    check_tracking,
    choice_file,
    config_dir,
    flat,
    from_yaml,
    load,
    refusal,
    to_yaml,
    typed_keys,
    validate,
)
from dnt_scale.config.data import SOURCES, DataConfig, DataSection, TokenRows, Unit
from dnt_scale.config.engine import DeepSpeedEngineConfig, TorchEngineConfig
from dnt_scale.config.images import ImageRows, ImagesConfig, VitConfig
from dnt_scale.config.model import (
    MODELS,
    Activation,
    BlockSection,
    ModelConfig,
    ModelSection,
    RopeSection,
    Setting,
)
from dnt_scale.config.optim import GroupConfig, OptimizerConfig, ScheduleConfig
from dnt_scale.config.run import HealthSection, RunConfig, TrainSection
from dnt_scale.config.stages import Span, Spans, by_stage, span_at

__all__ = [
    "MODELS",
    "SOURCES",
    "Activation",
    "AugmentSection",
    "BlockSection",
    "ConfigError",
    "DataConfig",
    "DataSection",
    "DeepSpeedEngineConfig",
    "GroupConfig",
    "HealthSection",
    "ImageRows",
    "ImagesConfig",
    "ModelConfig",
    "ModelSection",
    "OptimizerConfig",
    "RopeSection",
    "RunConfig",
    "ScheduleConfig",
    "Setting",
    "Span",
    "Spans",
    "Strict",
    "TokenRows",
    "TorchEngineConfig",
    "TrainSection",
    "Unit",
    "VitConfig",
    "budget",
    "by_stage",
    "changed",
    "check_tracking",
    "choice_file",
    "config_dir",
    "flat",
    "from_yaml",
    "load",
    "refusal",
    "span_at",
    "to_yaml",
    "typed_keys",
    "validate",
]

"""DeepSpeed's own JSON: what our fields make of it, and a user's ``engine.deepspeed`` merged over
that.

DeepSpeed says nothing of keys that it does not know, or that do nothing in the chosen stage. Here
they are errors.
"""

from typing import Any

from dnt_scale.config import ConfigError, DeepSpeedEngineConfig, RunConfig, by_stage
from dnt_scale.config.base import nearest

JSON = dict[str, Any]
PATH = "engine.deepspeed"

# what our own fields decide, and which; what torch decides
OWNED = {
    "train_batch_size": "use train.global_batch",
    "train_micro_batch_size_per_gpu": "use train.micro_batch",
    "gradient_accumulation_steps": "it follows from train.global_batch, train.micro_batch and the "
    "number of ranks",
    "gradient_clipping": "use optim.clip_norm",
    "optimizer": "use optim=msgdw or another file of configs/optim, and optim.lr and the like",
    "scheduler": "use optim.schedule",
    "fp16": "use train.dtype (bf16 or fp32)",
    "bf16": "use train.dtype (bf16 or fp32)",
    "bfloat16": "use train.dtype (bf16 or fp32)",
    "torch_autocast": "use train.dtype (bf16 or fp32)",
    "data_types": "use train.dtype; gradients are summed in fp32",
    "communication_data_type": "use train.dtype; gradients are reduced in fp32",
    "zero_allow_untested_optimizer": "it is always true",
    "zero_force_ds_cpu_optimizer": "it is always false",
    "activation_checkpointing": "use engine.activation_checkpointing",
    "compile": "use engine.compile",
    "checkpoint": "use checkpoint.every and the like",
    "tensorboard": "use tracking",
    "wandb": "use tracking",
    "comet": "use tracking",
    "csv_monitor": "use tracking",
    "zero_optimization.allgather_bucket_size": "DeepSpeed gathers the weights of a parameter group "
    "at once",
    "zero_optimization.stage": "use engine=zero0, zero1, zero2 or zero3",
    "zero_optimization.compute_grad_norm": "the gradient norm is always measured",
    "zero_optimization.cpu_offload": "use engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "use engine.offload_parameters",
    "zero_optimization.offload_optimizer.device": "use engine.offload_optimizer (cpu is the only "
    "place)",
    "zero_optimization.offload_param.device": "use engine.offload_parameters (cpu is the only "
    "place)",
}
TOP_LEVEL = {"log_level", "wall_clock_breakdown", "zero_optimization"}
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# what acts, and in which stages
ZERO = {
    "contiguous_gradients": (1, 2, 3),
    "enable_sanity_checks": (3,),
    "offload_optimizer": (1, 2, 3),
    "offload_param": (3,),
    "overlap_comm": (1, 2, 3),
    "parameter_alignment": (1, 2),
    "reduce_bucket_size": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "round_robin_gradients": (1, 2),
    "stage3_allgather_sequential": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_module_granularity_threshold": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "sub_group_size": (3,),
    "use_multi_rank_bucket_allreduce": (1, 2),
}
OFFLOAD = {"pin_memory"}
# numbers that wait to be reduced; DeepSpeed's own 5e8 would take 2 GB a rank of any model
BUCKET = 20_000_000


def bucket_of(engine: DeepSpeedEngineConfig) -> int:
    """Return ``reduce_bucket_size``, without asking DeepSpeed, whose import takes seconds."""
    given = engine.deepspeed.get("zero_optimization", {})
    return int(float(given.get("reduce_bucket_size", BUCKET)))


def deepspeed_json(run: RunConfig, world_size: int, *, pin_memory: bool) -> JSON:
    """The JSON for ``deepspeed.initialize``.

    Args:
        pin_memory: page-lock what is offloaded to the host, for faster copies from and to a GPU.

    Raises:
        ConfigError: a value in ``engine.deepspeed`` that DeepSpeed does not take.
    """
    assert isinstance(run.engine, DeepSpeedEngineConfig)
    batches = [_micro_batches(each, world_size) for each in by_stage(run).values()]
    stage, bf16 = run.engine.stage, run.train.dtype == "bf16"
    zero: JSON = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = BUCKET
    if stage == 3:
        # the memory-efficient one replaces torch.nn.functional.linear for the whole process, for
        # good
        zero |= {"memory_efficient_linear": False}
    if run.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if run.engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    ours = {
        "train_micro_batch_size_per_gpu": batches[0][0],
        # of the stage with the most: with 1 DeepSpeed leaves out what sums them
        "gradient_accumulation_steps": max(count for _, count in batches),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # in stage 0 it would sum gradients in bf16: the model casts its weights itself; check: the
        # judge does that
        "bf16": {
            "enabled": bf16 and stage > 0,
            "immediate_grad_update": True,
            "check_grad_overflow": False,
        },
        "steps_per_print": None,
        "log_level": "info" if run.engine.deepspeed.get("wall_clock_breakdown") else "error",
        "zero_optimization": zero,
    }
    merged = merge(ours, run.engine.deepspeed)
    _check_values(merged["zero_optimization"])
    return merged


def _micro_batches(run: RunConfig, world_size: int) -> tuple[int, int]:
    """Return the rows of a micro-batch, and how many of them a rank has in a step."""
    rows = run.train.global_batch // world_size
    micro_batch = min(run.train.rows_a_forward, rows)
    return micro_batch, -(-rows // micro_batch)


def merge(base: JSON, over: JSON) -> JSON:
    """``over`` on top of ``base``, section by section; shares no section with them."""
    merged = dict(base)
    for key, value in over.items():
        inner = base.get(key)
        merged[key] = (
            merge(inner if isinstance(inner, dict) else {}, value)
            if isinstance(value, dict)
            else value
        )
    return merged


def check(run: RunConfig) -> None:
    """What can be judged without DeepSpeed, whose import takes seconds; part of a RunConfig's
    validation.

    Raises:
        ConfigError: for the first key of ``engine.deepspeed`` that DeepSpeed does not have, that
            has no effect in this stage, or that a field of ours decides.
    """
    assert isinstance(run.engine, DeepSpeedEngineConfig)
    stage, raw = run.engine.stage, run.engine.deepspeed
    _check_keys(raw, TOP_LEVEL, "")
    if raw.get("log_level", "error") not in LOG_LEVELS:
        raise _error("log_level", raw["log_level"], f"one of {', '.join(LOG_LEVELS)}")
    if not isinstance(raw.get("wall_clock_breakdown", False), bool):
        raise _error("wall_clock_breakdown", raw["wall_clock_breakdown"], "true or false")
    zero = _section(raw, "zero_optimization", "")
    _check_keys(zero, set(ZERO), "zero_optimization.")
    for key, value in zero.items():
        if stage not in ZERO[key]:
            stages = " and ".join(f"zero{number}" for number in ZERO[key])
            raise _error(
                f"zero_optimization.{key}", value, f"nothing: it acts in {stages} only; remove it"
            )
        if stage == 1 and run.train.dtype == "bf16" and not run.engine.offload_optimizer:
            message = (
                "nothing: zero1 in bf16 without offload has its own way of reducing; remove it or "
                "use engine=zero2"
            )
            raise _error(f"zero_optimization.{key}", value, message)
    for key, field in (
        ("offload_optimizer", "offload_optimizer"),
        ("offload_param", "offload_parameters"),
    ):
        if key in zero:
            section = _section(zero, key, "zero_optimization.")
            _check_keys(section, OFFLOAD, f"zero_optimization.{key}.")
            if not getattr(run.engine, field):
                raise _error(
                    f"zero_optimization.{key}",
                    section,
                    f"nothing without offload; set engine.{field}=true",
                )


def _check_keys(section: JSON, known: set[str], prefix: str) -> None:
    for key, value in section.items():
        path = prefix + key
        if path in OWNED:
            raise _error(path, value, f"nothing: {OWNED[path]}")
        if key not in known:
            close = nearest(key, known)
            hint = f"did you mean {close}?" if close else "remove it."
            raise ConfigError(
                f"{PATH}.{path}: no such key; {hint} There are: {', '.join(sorted(known))}"
            )
        if value == "auto":
            raise _error(path, value, "a value; auto is for Hugging Face's Trainer")


def _section(raw: JSON, key: str, prefix: str) -> JSON:
    section = raw.get(key, {})
    if not isinstance(section, dict):
        raise _error(prefix + key, section, "a section of keys and values")
    return section


def _check_values(zero: JSON) -> None:
    """Let DeepSpeed's own models judge the values of the merged section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(strict=True, **zero)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise _error(path, first["input"], first["msg"].removeprefix("Input should be ")) from None


def _error(path: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(f"{PATH}.{path}: found {found!r}, expected {expected}")

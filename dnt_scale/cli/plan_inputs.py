"""What `dnt plan` is asked: the run without its data, the machine, other optimizers."""

from pathlib import Path
from typing import TYPE_CHECKING

from dnt_scale import config, startup
from dnt_scale.config import ConfigError, RunConfig
from dnt_scale.config.hardware import hardware_names, load_hardware

if TYPE_CHECKING:
    import torch

    from cluster.cluster_config import ClusterConfig
    from dnt_scale.tools.planner.machine import Machine

NAMELESS = {"run.name": "plan", "data.path": "data/none"}


def load_run(overrides: list[str], *, gpus: bool) -> RunConfig:
    """Return the run of overrides, which need not name it or its data, with bf16 or fp32 in the
    place of auto.

    Raises:
        ConfigError: as of ``config.load``; or it is in fp8.
    """
    from dnt_scale.distributed import compute_dtype

    given = set(config.typed_keys(overrides)) | {"preset"} & {
        override.partition("=")[0] for override in overrides
    }
    missing = [] if "preset" in given else [k for k in NAMELESS if k not in given]
    run = config.load([*(f"{key}={NAMELESS[key]}" for key in missing), *overrides])
    if run.train.dtype == "fp8":
        raise ConfigError(
            "train.dtype is fp8, of which no speed is known here yet; plan with train.dtype=bf16: "
            "what a rank keeps is the same, and a step is to take no longer"
        )
    if gpus or run.train.dtype != "auto":
        return compute_dtype.expected(run, gpus)
    # for ranks as this machine is, what they would choose
    best = compute_dtype.faster(compute_dtype.bf16_cost(device_of(run)))
    return compute_dtype.with_dtype(run, best)


def device_of(run: RunConfig) -> "torch.device":
    """Return the device of this machine that a rank would take."""
    import torch

    cuda = run.run.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def row_length(run: RunConfig) -> tuple[int, str]:
    """Return the tokens of a row, and where that is from: the set, or the model's context."""
    from dnt_scale.data.sources import load_source

    path = getattr(run.data, "path", None)
    if path is not None and Path(path, "manifest.json").is_file():
        length = load_source(run).unit.a_row
        return length, f"{length:,} tokens, those of {path}"
    length = run.model.context  # type: ignore[attr-defined]
    return length, f"{length:,} tokens, model.context"


def machine_for(
    run: RunConfig,
    seq_len: int,
    site: "ClusterConfig | None",
    gpu: str | None,
    *,
    again: bool,
) -> "Machine":
    """Return the machine that is asked for: GPUs of a type, or ranks as this machine is.

    Raises:
        ConfigError: neither is known.
    """
    from dnt_scale.tools.planner.machine import gpu_machine

    if gpu is not None:
        assert site is not None
        hardware = load_hardware(gpu)
        if not site.gpus_per_node:
            raise ConfigError(
                f"cluster.gpus_per_node is 0, but --gpu is {gpu}; set it to the GPUs of a node"
            )
        return gpu_machine(
            hardware,
            site.nodes,
            site.tasks_per_node,
            run.train.dtype,
            compiled=run.engine.compile,
        )
    from dnt_scale.tools.planner import rates

    device = device_of(run)
    if site is not None and site.gpus_per_node and device.type == "cpu":
        raise ConfigError(
            f"--gpu: cluster.gpus_per_node is {site.gpus_per_node}; say which GPU, "
            f"{', '.join(hardware_names())} or a file"
        )
    if again and device.type == "cpu":
        startup.keep_memory()  # as ranks do
    found = rates.measured(run, seq_len, device, again=again)
    if found is None:
        raise ConfigError(
            f"--gpu: say for which, {', '.join(hardware_names())} or a file; or --measure, to plan "
            "for ranks as this machine is, which was not measured for this model yet"
        )
    nodes, a_node = (site.nodes, site.tasks_per_node) if site else (1, 1)
    return rates.this_machine(found, nodes, a_node, device)


def other_optimizers(
    run: RunConfig, overrides: list[str], *, gpus: bool
) -> tuple[tuple[str, RunConfig], ...]:
    """Return the run with one buffer and with two: as it is asked for, and with the default
    optimizer or AdamW, whichever it is not.
    """
    name = "adamw" if run.optim.algorithm == "msgdw" else "muon_normalized"
    kept = [
        override
        for override in overrides
        if override.lstrip("+~").partition("=")[0].partition(".")[0] != "optim"
    ]
    other = load_run([*kept, f"optim={name}"], gpus=gpus)
    return ((run.optim.algorithm, run), (other.optim.algorithm, other))

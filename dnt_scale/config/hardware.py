"""``configs/hardware/NAME.yaml``: what a GPU can do at most, by its data sheet.

A new GPU, or a site's own links, is one file there, or anywhere, by its path.
"""

from functools import cache
from pathlib import Path

from pydantic import Field, ValidationError

from dnt_scale.config import paths, typed
from dnt_scale.config.base import ConfigError, Strict, Text, nearest
from dnt_scale.config.compose import config_dir


class Hardware(Strict):
    """Peaks of one GPU. 1 GB is 1e9 bytes, a link's speed that of one direction."""

    name: Text = Field(description="of CUDA's name for it, the words that all its kinds have")
    memory_gb: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0, description="dense matmuls, without sparsity")
    fp32_tflops: float = Field(gt=0, description="dense matmuls, without TF32")
    memory_gb_s: float = Field(gt=0, description="of the GPU's memory")
    attention_tflops: float = Field(
        gt=0, description="what flash attention reaches, forward and backward, causal, in bf16"
    )
    link_gb_s: float = Field(gt=0, description="to the other GPUs of its node")
    network_gb_s: float = Field(gt=0, description="to GPUs of other nodes, its share of a node's")


def hardware_names() -> list[str]:
    """Return the names of the files in configs/hardware."""
    return sorted(path.stem for path in (config_dir() / "hardware").glob("*.yaml"))


def load_hardware(choice: str) -> Hardware:
    """Return a GPU by the name of its file in configs/hardware, or by the path of another.

    Raises:
        ConfigError: no such file, an unknown key, a wrong value.
    """
    path = Path(paths.expanded(choice))
    if "/" not in choice and path.suffix not in (".yaml", ".yml"):
        known = hardware_names()
        if choice.lower() not in known:
            near = nearest(choice.lower(), known)
            hint = f"; did you mean {near}?" if near else ";"
            raise ConfigError(
                f"--gpu {choice}: no such GPU{hint} There are: {', '.join(known)}, or give a file"
            )
        return known_hardware()[choice.lower()]
    return _read(path)


@cache
def known_hardware() -> dict[str, Hardware]:
    """Return all GPUs of configs/hardware by the names of their files."""
    return {name: _read(config_dir() / "hardware" / f"{name}.yaml") for name in hardware_names()}


@cache
def hardware_of(gpu: str) -> Hardware | None:
    """Return what is known of a GPU by SLURM's type of it, such as ``h100`` or
    ``nvidia_h100_80gb_hbm3``, or by CUDA's name; None where it is not known. Of several the one of
    which the most is found in that name.
    """
    words = gpu.lower().replace("-", "_").replace(" ", "_").split("_")
    fits = [
        each
        for each in known_hardware().values()
        if all(part in words for part in each.name.removeprefix("NVIDIA ").lower().split())
    ]
    return max(fits, key=lambda each: len(each.name), default=None)


def _read(path: Path) -> Hardware:
    try:
        return Hardware.model_validate(typed.read_yaml(path.read_text("utf-8"), (Hardware,)))
    except OSError as error:
        raise ConfigError(
            f"--gpu: {path} cannot be read ({error.strerror}); expected a file such as "
            f"configs/hardware/h100.yaml"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"--gpu: {path}: {field}: {first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"--gpu: {path}: not readable as YAML ({error})") from None

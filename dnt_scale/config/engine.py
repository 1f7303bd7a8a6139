"""`engine.*`: how a model is spread over devices, by PyTorch or by DeepSpeed."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from dnt_scale.config.base import ConfigError, Size, Strict


class _EngineBase(Strict):
    activation_checkpointing: (
        Literal["none", "full", "selective"] | Annotated[int, Field(ge=2, le=10_000)]
    ) = Field(
        "none",
        description="recompute in backward: every block, all but matmuls and attention, or every "
        "n-th block",
    )
    compile: bool = Field(False, description="torch.compile each block")


class TorchEngineConfig(_EngineBase):
    """FSDP2's fully_shard on a mesh of copies by shards: ddp has one shard a copy, fsdp one
    copy, hsdp both.
    """

    name: Literal["ddp", "fsdp", "hsdp"]
    replicas: Size | None = Field(None, description="hsdp: copies of the model; null: one a node")
    reshard_after_forward: bool = Field(
        True, description="free a block's full weights after its forward"
    )
    prefetch: int = Field(
        1, ge=0, le=10_000, description="blocks gathered ahead of the one that computes"
    )
    cpu_offload: bool = Field(
        False, description="weights, gradients and optimizer state live in the host's memory"
    )

    @model_validator(mode="after")
    def _replicas_are_of_hsdp(self) -> Self:
        if self.replicas is not None and self.name != "hsdp":
            raise ValueError(
                f"replicas is {self.replicas}, which only engine=hsdp has; leave it null"
            )
        return self


class DeepSpeedEngineConfig(_EngineBase):
    """DeepSpeed ZeRO: stage 1 shards the optimizer's state, 2 the gradients too, 3 the weights
    too.
    """

    name: Literal["zero0", "zero1", "zero2", "zero3"]
    offload_optimizer: bool = Field(
        False, description="master weights and optimizer state live in the host's memory"
    )
    offload_parameters: bool = Field(False, description="zero3: the weights too")
    deepspeed: dict[str, Any] = Field(
        {}, description="DeepSpeed's own JSON, merged over what these fields make"
    )

    @property
    def stage(self) -> int:
        return int(self.name[-1])

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "offload_optimizer needs a sharded optimizer; use engine=zero1, zero2 or zero3"
            )
        if self.offload_parameters and self.stage < 3:
            raise ValueError(
                f"offload_parameters needs sharded weights, but name is {self.name}; use "
                "engine=zero3"
            )
        if self.compile and self.stage == 3:
            raise ValueError(
                "compile does not go with zero3, which swaps weights in under each module; use "
                "engine=fsdp"
            )
        if self.activation_checkpointing == "selective" and self.stage == 3:
            raise ValueError(
                "activation_checkpointing is selective, but zero3 gathers weights inside of what "
                "is recomputed; use full, every n-th block, or engine=fsdp"
            )
        return self


EngineConfig = Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="name")]


def copies_of(engine: TorchEngineConfig, world_size: int, nodes: int) -> int:
    """C: all ranks with ddp, one with fsdp, ``replicas`` or one a node with hsdp.

    Raises:
        ConfigError: the copies do not share the ranks equally.
    """
    copies = {"ddp": world_size, "fsdp": 1, "hsdp": engine.replicas or nodes}[engine.name]
    if world_size % copies:
        found = copies if engine.replicas else f"null, one a node of {copies}"
        raise ConfigError(
            f"engine.replicas is {found}, but copies do not share {world_size} ranks equally; "
            f"set it to a divisor of {world_size}, or use engine=fsdp"
        )
    return copies

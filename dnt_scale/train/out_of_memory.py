"""What a run that needs more memory than there is can change."""

from dnt_scale.config import RunConfig
from dnt_scale.distributed.heartbeat import main_thread
from dnt_scale.distributed.host import host
from dnt_scale.distributed.process_group import Ranks


def out_of_memory_message(ranks: Ranks, run: RunConfig) -> str:
    """Where memory ran out, and what of ``run`` to change."""
    advice = (
        [f"a smaller train.micro_batch (it is {run.train.micro_batch})"]
        if run.train.micro_batch != 1
        else []
    )
    if run.engine.activation_checkpointing != "full":
        advice.append("engine.activation_checkpointing=full")
    if run.engine.name in ("ddp", "zero0"):
        advice.append("engine=fsdp")
    droppable = run.optim.gradient_buffer and run.optim.needs_gradient_buffer() is None
    if droppable and run.engine.name in ("ddp", "fsdp", "hsdp"):
        advice.append("optim.gradient_buffer=false")
    advice.append("more ranks")
    return (
        f"out of memory on rank {ranks.rank} ({host()}) at {main_thread.where}; try "
        f"{', '.join(advice)}"
    )

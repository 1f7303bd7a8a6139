"""Engines on the ranks of a test, without the loop around them: build, step, save, load."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnt_scale import checkpoint
from dnt_scale.checkpoint import State
from dnt_scale.config import RunConfig
from dnt_scale.data.token_sets import load_sets
from dnt_scale.data.tokens import token_stream
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine import build as build_engine
from dnt_scale.engine.base import Engine
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.optim.schedule import Schedule
from dnt_scale.optim.update_rule import UpdateRule
from dnt_scale.optim.updates.plain import Plain
from dnt_scale.train.spike_guard import Guard
from testbed.configs import composed
from testbed.run import tiny

STEPS = 10  # warmup, and a schedule from its top to its end
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp"],
    "hsdp": ["engine=hsdp", "engine.replicas=2"],
    "zero0": ["engine=zero0"],
    "zero1": ["engine=zero1"],
    "zero2": ["engine=zero2"],
    "zero3": ["engine=zero3"],
    "zero3+offload": ["engine=zero3_offload"],
}


def overrides_of(label: str, ranks: int) -> list[str]:
    """The overrides that choose an engine; a single rank is one copy of the model."""
    return [*ENGINES[label], *(["engine.replicas=1"] if label == "hsdp" and ranks == 1 else [])]


def model_of(run: RunConfig) -> DNT:
    """The run's model, documents masked where it says so."""
    eos = load_sets(run.data)[0].manifest.eos_id if run.data.document_mask else None
    return DNT(run.model, eos)


@contextmanager
def built(label: str, me: Ranks, data: Path, *overrides: str) -> Iterator[tuple[RunConfig, Engine]]:
    """A tiny run's engine for a block."""
    chosen = overrides_of(label, me.world_size)
    run = composed(*tiny(data, Path("unused"), *chosen, f"train.steps={STEPS}", *overrides))
    engine = build_engine(run, lambda: model_of(run), me, STEPS)
    try:
        yield run, engine
    finally:
        engine.close()


def losses(run: RunConfig, engine: Engine, me: Ranks, first: int, steps: int) -> list[float]:
    """The losses of ``steps`` steps from step ``first`` on."""
    judge = Guard(run.health, run.optim.judged_clip_norm, run.train.max_skipped).judge
    batch = run.train.global_batch
    sources = load_sets(run.data)
    with token_stream(
        sources,
        seed=run.run.seed,
        global_batch=batch,
        rank=me.rank,
        world_size=me.world_size,
        consumed_rows=first * batch,
    ) as stream:
        return [engine.train_step(next(stream)[0], judge).loss for _ in range(steps)]


def save(engine: Engine, me: Ranks, folder: Path) -> Path:
    """A checkpoint of what the engine holds, in ``folder``."""
    scalars = engine.scalars()
    state = State(
        step=int(scalars["step"]),
        consumed_rows=0,
        tokens=0,
        skipped=0,
        seed=0,
        run_id="test",
        manifest_sha256="",
        tokenizer_sha256="",
        world_size=me.world_size,
        config={},
        engine=scalars,
        files={},
    )
    saver = checkpoint.Saver(folder, me, keep=9, keep_every=None, background=False)
    saver.save(state, engine.shards())
    saver.close()
    return folder / f"step-{state.step:08d}"


def load(engine: Engine, me: Ranks, path: Path) -> None:
    checkpoint.read_tensors(path, engine.shards(), me)
    engine.refresh(checkpoint.read_state(path).engine)


# An update of a whole weight in place: (weight, gradient, state, optimizer's section, its group's
# section, lr, decay); the state is the weight's own and empty before the first.
Update = Callable[[Tensor, Tensor, dict[str, Tensor], Any, UpdateRule, float, float], None]


def group_of(run: RunConfig, name: str) -> str:
    """The label of the group that a parameter is in, "" for none."""
    groups = run.optim.groups.items()
    rest = next((label for label, group in groups if group.pattern is None), "")
    return next((label for label, g in groups if g.pattern and re.search(g.pattern, name)), rest)


def clipped_by_group(run: RunConfig, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as `groups.NAME.clip` says: the global ones by their norm, others by their own."""
    found = {}
    for name, grad in grads.items():
        label = group_of(run, name)
        group = run.optim.groups.get(label)
        clip = "global" if group is None or group.clip is None else group.clip
        norm = 0.0
        for other, theirs in grads.items():
            another = run.optim.groups.get(group_of(run, other))
            is_global = another is None or another.clip in (None, "global")
            if group_of(run, other) == label if clip == "group" else is_global:
                norm += float(theirs.double().square().sum())
        bound = group.clip_norm if group and group.clip_norm else run.optim.clip_norm
        assert bound is not None
        found[name] = grad * (1.0 if clip == "none" else min(1.0, bound / norm**0.5))
    return found


def reference_losses(
    run: RunConfig, update: Update, micro_batches: int = 1
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run in plain PyTorch: one process, no engine, gradients of micro-batches summed in fp32.
    Its losses and last fp32 weights.

    All but the rule is written out here: groups, which tensors decay, clipping, the schedule.
    """
    model = model_of(run)
    init_weights(model, run.run.seed)
    weights = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    dtype = torch.bfloat16 if run.train.dtype == "bf16" else torch.float32
    steps = run.train.steps
    assert steps is not None
    schedule = Schedule(run.optim.schedule, steps)
    found = []
    with token_stream(
        load_sets(run.data),
        seed=run.run.seed,
        global_batch=run.train.global_batch,
        rank=0,
        world_size=1,
    ) as stream:
        for step in range(steps):
            batch = next(stream)[0]
            targets = (batch[:, 1:] != IGNORED).sum()
            grads = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            mean = 0.0
            for rows in batch.chunk(micro_batches):
                compute = {name: weight.to(dtype) for name, weight in weights.items()}
                loss = torch.func.functional_call(
                    model, compute, (rows[:, :-1].clamp(min=0), rows[:, 1:])
                )
                parts = torch.autograd.grad(loss / targets, list(weights.values()))
                for name, part in zip(weights, parts, strict=True):
                    grads[name] += part
                mean += float((loss / targets).detach())
            clipped = clipped_by_group(run, grads)
            found.append(mean)
            with torch.no_grad():
                for name, weight in weights.items():
                    group = run.optim.groups.get(group_of(run, name))
                    lr = (
                        run.optim.lr if group is None or group.lr is None else group.lr
                    ) * schedule.factor(step)
                    decay = (
                        run.optim.weight_decay
                        if group is None or group.weight_decay is None
                        else group.weight_decay
                    )
                    rule = group or Plain(pattern=None)
                    wd = decay if weight.ndim > 1 and not rule.fixed_norm else 0.0
                    update(weight, clipped[name], states[name], run.optim, rule, lr, wd)
    return found, {name: weight.detach() for name, weight in weights.items()}

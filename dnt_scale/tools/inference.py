"""What a trained run is for in one process: load a checkpoint of it, measure its loss."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dnt_scale import checkpoint, config
from dnt_scale.checkpoint import State
from dnt_scale.checkpoint.read import complete
from dnt_scale.checkpoint.storage import Storage
from dnt_scale.checkpoint.tensor_shards import TensorShard
from dnt_scale.config import ConfigError, DataSection, RunConfig
from dnt_scale.data.sources import Source
from dnt_scale.distributed import compute_dtype
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.averaging import average_of
from dnt_scale.engine.reductions import EvalSums
from dnt_scale.model.batch import moved
from dnt_scale.model.task import Task, blank_buffers, build_task, fill_buffers
from dnt_scale.record.files import warn


class Trained(NamedTuple):
    """A checkpoint of a run.

    folder: of the run.
    run: its configuration.
    place: of the checkpoint, a folder or a URL.
    state: what the checkpoint says of itself.
    """

    folder: Path
    run: RunConfig
    place: Path | str
    state: State


def whole_source(data: DataSection) -> Source:
    """Return the source of a section. Raises ValueError where a set is damaged."""
    source: Source = data.open()
    return source


def checkpoint_of(run_dir: Path, step: int | None = None) -> Trained:
    """Return a run's checkpoint of a step (None: the newest).

    Raises:
        ValueError: no run or no such checkpoint there, or a damaged one.
    """
    run = config.from_yaml(run_dir / "config.yaml")
    folder = run.checkpoints if run.checkpoint.dir else run_dir / "checkpoints"
    there = complete(Storage(folder))
    if not there:
        raise ConfigError(f"{folder}: no complete checkpoint; train the run until it has saved one")
    if step is not None and step not in there:
        raise ConfigError(
            f"--step: {folder} has no complete checkpoint of step {step}; it has those of "
            f"{', '.join(map(str, there))}"
        )
    chosen = there[max(there) if step is None else step].path
    return Trained(run_dir, run, chosen, checkpoint.read_state(chosen))


def load_checkpoint(
    trained: Trained,
    data: Path | None,
    ranks: Ranks,
    open_source: Callable[[DataSection], Source] = whole_source,
    dtype: torch.dtype | None = None,
    average: bool = True,
) -> tuple[Task, Source]:
    """Return the model with a checkpoint's weights (to be computed with at once), and what the run
    reads. The weights are their average where the checkpoint holds one (``train.ema``), which a
    line tells.

    Args:
        data: a set to read instead of the run's own, made with the same tokenizer and the like.
        open_source: opens what is needed of what the run reads.
        dtype: to compute in; None: that of the run, where this machine is fast in it.
        average: False: the very weights that training goes on with.

    Raises:
        ValueError: a damaged checkpoint, no such set, or one that the model does not know.
    """
    run_dir, run, place, state = trained
    checkpoint.check_files(place, state, ranks)
    source = found_source(run_dir, data, run.data, open_source)
    if problem := source.foreign(state.of_source, place):
        raise ConfigError(f"{source.parts()[0].place}: {problem}")
    task = build_task(run.model, source.rows)
    weights = [(f"model.{name}", tuple(p.shape), p.detach()) for name, p in task.named_parameters()]
    if average and state.averaged:
        weights = [(average_of(name), shape, data) for name, shape, data in weights]
        warn(f"step {state.step}, the moving average of the weights (train.ema)")
    checkpoint.read_tensors(
        place,
        [TensorShard(name, shape, (0,) * len(shape), data) for name, shape, data in weights],
        ranks,
    )
    if dtype is None:
        dtype, line = compute_dtype.for_inference(run.train.dtype, ranks.device)
        if line:
            warn(line)
    for _, parameter in task.named_parameters():
        parameter.data = parameter.data.to(ranks.device, dtype)
    fill_buffers(
        task, blank_buffers(task, run.model.kind), ranks.device
    )  # not cast, as in training
    return task, source


def found_source(
    run_dir: Path, data: Path | None, own: DataSection, open_source: Callable[[DataSection], Source]
) -> Source:
    """Return the set ``data``, else the run's own. Raises ValueError, and tells what to do where
    those have moved.
    """
    if data:
        return open_source(own.at(data))
    try:
        return open_source(own)
    except (ValueError, OSError) as error:
        if not own.gone():
            raise
        alone = len(own.sets()) == 1
        how = (
            "give its new place with --data"
            if alone
            else "measure or take one set alone with --data"
        )
        raise ConfigError(f"{error}; {run_dir} was trained on it: {how}") from None


@torch.inference_mode()
def evaluate(
    trained: Trained, data: Path | None, rows: int | None, ranks: Ranks
) -> dict[str, float]:
    """Return what validation tells on ``rows`` (default: all) evenly spread held-out rows of each
    set, ``val/...``.

    Args:
        data: another set that the model knows; default the run's own.
    """
    run = trained.run
    task, source = load_checkpoint(trained, data, ranks)
    if missing := source.no_validation():
        field = "--data" if data else missing.field
        raise ConfigError(f"{field}: {missing.what}; {missing.remedy}")
    means = {}
    sets = source.validation(rows=rows, micro_batch=run.train.rows_a_forward, rank=0, world_size=1)
    for name, batches in sets.items():
        sums = EvalSums(task, ranks.device)
        for batch in batches:
            sums.add(task.eval_sums(moved(batch, ranks.device)), batch)
        means[name] = sums.means()
    return source.validation_metrics(means)

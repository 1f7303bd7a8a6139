"""``dnt checkpoint convert``: to one safetensors file, and from one; a chunk of a tensor in
memory at a time.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dnt_scale.checkpoint.inspection import (
    bytes_of,
    checkpoints_at,
    problems_of,
    row_chunks,
    values_of,
)
from dnt_scale.checkpoint.progress import Meter
from dnt_scale.checkpoint.read import by_name, complete, read_parts, whole_shape
from dnt_scale.checkpoint.safetensors_header import (
    StoredRegion,
    make_header,
    read_head,
    read_header,
)
from dnt_scale.checkpoint.state import read_state, step_name
from dnt_scale.checkpoint.storage import CheckpointError, Storage, fsync_folder
from dnt_scale.checkpoint.tensor_shards import AVERAGE, WEIGHT, Region
from dnt_scale.checkpoint.write import publish, write_file
from dnt_scale.config import ModelSection

INTERMEDIATE = ".partial-"


def to_file(source: str, out: Path, *, full: bool) -> str:
    """Write the newest checkpoint at ``source`` as one safetensors file, whole or not at all; what
    was written.

    Args:
        full: all tensors as they are, optimizer buffers too, under the checkpoint's names; else
            weights only (their average where there is one), by the parameters' names, without rows
            that only fill them up.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        OSError: the file cannot be written.
    """
    if not out.parent.is_dir():
        raise CheckpointError(
            f"{out}: there is no folder {out.parent} to write it to; make that first"
        )
    if out.is_dir():
        raise CheckpointError(f"{out}: is a folder; expected the name of a file to write")
    folder = checkpoints_at(source)[-1]
    state = read_state(folder.path)
    if problems := problems_of(folder, state):
        raise CheckpointError(problems[0])
    stored = read_parts(folder)
    kind = AVERAGE if state.averaged else WEIGHT
    names = [name for name in stored if full or name.startswith(kind)]
    # all aligned, where some have 2 bytes
    names.sort(key=lambda name: -stored[name][0].dtype.itemsize)
    shapes = {name: whole_shape(stored[name]) for name in names}
    if not full:
        shapes |= _exported(shapes, state.config.get("model"))
    entries = [
        (
            name if full else name.removeprefix(kind),
            stored[name][0].dtype,
            _whole(shapes[name]),
        )
        for name in names
    ]
    more = {"step": str(state.step), "model": json.dumps(state.config.get("model"))}
    target = Storage(out.parent)
    with Meter("writing", sum(bytes_of(stored[name]) for name in names)) as meter:

        def chunks() -> Iterator[memoryview]:
            yield memoryview(make_header(entries, more))
            for name in names:
                for region, values in values_of(folder, stored, name):
                    if shapes[name]:
                        values = values[: max(0, shapes[name][0] - region.offset[0])]
                    yield _bytes(values)
                    meter(values.nbytes)

        partial = out.with_name(INTERMEDIATE + out.name)
        try:
            record = write_file(target, partial.name, chunks(), reused=True)
            partial.rename(out)
            fsync_folder(out.parent)
        finally:
            partial.unlink(missing_ok=True)
    return (
        f"{out}: {len(names)} tensors of step {state.step:,}, {record.bytes:,} bytes, sha256 "
        f"{record.sha256}"
    )


def from_file(weights: Path, overrides: Sequence[str]) -> str:
    """Make the checkpoint of step 0 from which the run that ``overrides`` describe begins; what was
    written.

    The weights are those of the file, by the parameters' names with or without ``model.``; the
    momentum is zero. So is the model, where the file's metadata tells it and ``overrides`` do not.

    Raises:
        ValueError: the run is not described as `dnt train` wants it, its weights are not those in
            the file, or it has a checkpoint already.
        OSError: the file cannot be read, or the checkpoint not written.
    """
    source = Storage(weights.parent)

    def find(wanted: dict[str, tuple[int, ...]], model: ModelSection) -> FoundWeights:
        stored = _weights(source, weights, wanted, model)
        return FoundWeights(
            {name: whole_shape(parts) for name, parts in stored.items()},
            sum(map(bytes_of, stored.values())),
            lambda name: (values for _, values in values_of(source, stored, name)),
        )

    told = read_head(source, weights.name)[1].get("model", "null")
    return begin_from(weights, told, find, overrides, "dnt checkpoint convert")


class FoundWeights(NamedTuple):
    """Weights by the parameters' names, which may lack the rows that only fill them up."""

    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    values: Callable[[str], Iterator[Tensor]]  # whole rows, in order


def begin_from(
    place: Path,
    model: str,
    find: Callable[[dict[str, tuple[int, ...]], ModelSection], FoundWeights],
    overrides: Sequence[str],
    command: str,
    facts: Mapping[str, str] | None = None,
) -> str:
    """Make the checkpoint of step 0 from which the run that ``overrides`` describe begins; what was
    written.

    Args:
        place: where the weights are, for messages.
        model: the settings of their model as JSON, ``null`` where they are not known; the run's,
            but for what ``overrides`` say.
        find: finds the weights of these shapes, of this model. Raises ValueError.
        command: who does it.
        facts: as of ``Source.facts``, what is known of the data that the weights are of.

    Raises:
        ValueError: as ``from_file``, or the run's data is of another tokenizer.
        OSError: the checkpoint cannot be written.
    """
    from dnt_scale import config
    from dnt_scale.model.task import shapes_of
    from dnt_scale.optim.groups import buffer_shapes
    from dnt_scale.record.run_lock import held
    from dnt_scale.train.recorded import Typed
    from dnt_scale.train.resume import starting_state
    from dnt_scale.train.run_start import begin
    from dnt_scale.train.stages import load_stages

    told = _model_told(place, model, overrides)
    run = config.load([*told, *overrides])
    stages = load_stages(run)
    if problem := stages.source.foreign(facts or {}, place):
        raise CheckpointError(f"{stages.source.parts()[0].place}: {problem}")
    folder = Storage(run.checkpoints)
    if complete(folder):
        raise CheckpointError(f"{folder}: holds checkpoints already; take another run.name")
    begun = begin(run, Typed([*told, *overrides]))
    if begun.start.aside:
        raise CheckpointError(f"{run.run.dir}: holds steps of a run already; take another run.name")
    state, _ = starting_state(begun, stages, 1)
    state = state.model_copy(update={"engine": {"step": 0, "updates": 0}})
    wanted = shapes_of(run.model)
    found = find(wanted, run.model)
    buffers = buffer_shapes(wanted, run.optim)
    kinds = [WEIGHT] if run.train.ema is None else [WEIGHT, AVERAGE]

    final = folder / step_name(state.step)
    partial = folder / f"{INTERMEDIATE}{step_name(state.step)}" if folder.local else final
    with held(run.run.dir, command):
        partial.make()
        try:
            with Meter("writing", len(kinds) * found.nbytes) as meter:
                name = "shard-00001-model-00001-of-00001.safetensors"
                chunks = _first_checkpoint(found, wanted, kinds, buffers, meter)
                record = write_file(partial, name, chunks, reused=True)
            publish(partial, final, state.model_copy(update={"files": {name: record}}))
        except BaseException:
            partial.remove_all()
            raise
    same = f"the same settings and {' '.join(told)}" if told else "the same settings"
    return f"{final}: {len(wanted)} weights from {place}; `dnt train` with {same} begins from it"


def _first_checkpoint(
    found: FoundWeights,
    wanted: dict[str, tuple[int, ...]],
    kinds: list[str],
    buffers: dict[str, tuple[int, ...]],
    meter: Callable[[int], None],
) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file of weights, once a kind, and of buffers of zeros; all
    fp32. Rows that only fill a weight up are zeros.
    """
    weights = [(f"{kind}{name}", shape) for kind in kinds for name, shape in wanted.items()]
    shapes = [*weights, *buffers.items()]
    yield memoryview(make_header([(name, torch.float32, _whole(shape)) for name, shape in shapes]))
    for name in list(wanted) * len(kinds):
        for values in found.values(name):
            yield _bytes(values.float())
            meter(values.nbytes)
        rows, *rest = wanted[name]
        if missing := rows - found.shapes[name][0]:
            yield _bytes(torch.zeros(missing, *rest))
    for shape in buffers.values():
        for region in row_chunks(shape):
            yield _bytes(torch.zeros(region.shape))


def _model_told(place: Path, text: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that make the model of ``overrides`` the one that a file's metadata tells, but for
    what they say themselves.

    Raises:
        ValueError: the metadata's model is none, or ``overrides`` describe no run.
    """
    from dnt_scale import config
    from dnt_scale.config.model import AnyModel

    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    if text == "null" or "model" in keys:
        return []
    try:
        told = config.flat(TypeAdapter(AnyModel).validate_json(text))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(["model", *map(str, problem["loc"])])
        raise CheckpointError(
            f"{place}: {where} in its metadata: {problem['msg']}; give the model= that the weights "
            "are of"
        ) from None
    # a name from outside is text of Hydra's language
    name = str(told["name"])
    name = name if re.fullmatch(r"[\w.-]+", name) else "converted"
    chosen = [f"model={name}"] if (config.config_dir() / "model" / f"{name}.yaml").is_file() else []
    others = [
        override
        for override, key in zip(overrides, keys, strict=True)
        if not key.startswith("model.")
    ]
    before = config.flat(config.load([*chosen, *others]).model)
    told["name"] = name
    given = [f"{key}." for key in keys]
    return chosen + [
        f"model.{key}={'null' if value is None else value}"
        for key, value in told.items()
        if value != before.get(key) and not f"model.{key}.".startswith(tuple(given))
    ]


def _weights(
    source: Storage, file: Path, wanted: dict[str, tuple[int, ...]], model: ModelSection
) -> dict[str, list[StoredRegion]]:
    """The parts of a file by the parameters' names. Raises CheckpointError unless they are just
    those wanted, where some may lack the rows that only fill them up.
    """
    found = by_name(read_header(source, file.name))
    if any(name.startswith("model.") for name in found):  # a full one: leave the buffers
        found = {name: parts for name, parts in found.items() if name.startswith("model.")}
    stored = by_name(
        part._replace(name=part.name.removeprefix("model."))
        for parts in found.values()
        for part in parts
    )
    for problem, names in (
        ("it has no", [name for name in wanted if name not in stored]),
        ("the model has no", [name for name in stored if name not in wanted]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise CheckpointError(
                f"{file}: {problem} {names[0]}{more}; give the model= that the weights are of"
            )
    for name, shape in wanted.items():
        part = stored[name][0]
        rows = model.exported_rows(name)
        fitting = {shape} if rows is None else {shape, (rows, *shape[1:])}
        if whole_shape(stored[name]) not in fitting or not part.dtype.is_floating_point:
            raise CheckpointError(
                f"{file}: {name} has shape {whole_shape(stored[name])} and dtype {part.dtype}, "
                f"expected {shape} and floating point; give the model= that the weights are of"
            )
    return stored


def _exported(shapes: dict[str, tuple[int, ...]], settings: object) -> dict[str, tuple[int, ...]]:
    """The shapes of those weights, by the checkpoint's names, that others are given fewer rows of.

    A model that is not known here, of a kind from elsewhere, has none.
    """
    from dnt_scale.config.model import AnyModel

    try:
        model = TypeAdapter(AnyModel).validate_python(settings)
    except ValidationError:
        return {}
    rows = {name: model.exported_rows(name.partition(".")[2]) for name in shapes}
    return {name: (few, *shapes[name][1:]) for name, few in rows.items() if few is not None}


def _whole(shape: tuple[int, ...]) -> Region:
    return Region((0,) * len(shape), shape)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data

"""``dnt checkpoint inspect``, ``verify`` and ``diff``: one process, a chunk of a tensor in
memory at a time.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dnt_scale.checkpoint.progress import Meter
from dnt_scale.checkpoint.read import (
    CHUNK,
    StoredRegions,
    complete,
    gone_latest,
    hole_in,
    not_part,
    overlaps,
    problem_of,
    read_parts,
    read_region,
    tensor_files,
    whole_shape,
    window,
)
from dnt_scale.checkpoint.safetensors_header import StoredRegion
from dnt_scale.checkpoint.state import State, read_state
from dnt_scale.checkpoint.storage import CheckpointError, Storage
from dnt_scale.checkpoint.tensor_shards import Region, first_gap_or_overlap

WORST = 10  # tensors in the table of a diff


def checkpoints_at(path: str) -> list[Storage]:
    """The checkpoints a path or URL means, oldest first: a step's folder, a folder of them, or a
    run.

    Where the link ``latest`` points to a checkpoint that is gone, a line on stderr says so, and it
    means the newest.

    Raises:
        CheckpointError: there is none.
    """
    folder = Storage(path)
    if folder.holds("state.json"):
        return [folder]
    link = (
        folder.local
        if folder.local and folder.local.name == "latest" and folder.local.is_symlink()
        else None
    )
    places = [Storage(link.parent)] if link else [folder, folder / "checkpoints"]
    if folder.local and (folder.local / "config.yaml").is_file():
        from dnt_scale.config import from_yaml

        chosen = from_yaml(folder.local / "config.yaml").checkpoint.dir
        places += [Storage(chosen)] if chosen else []
    for place in places:
        if found := list(complete(place).values()):
            if gone := gone_latest(place):
                print(
                    f"{place}/latest: {gone} is gone; the newest that is there is {found[-1]}",
                    file=sys.stderr,
                )
            return found[-1:] if link else found
    raise CheckpointError(
        f"{path}: no checkpoint there; expected a run's folder, its checkpoints/, or a "
        "step-NNNNNNNN"
    )


def values_of(folder: Storage, stored: StoredRegions, name: str) -> Iterator[tuple[Region, Tensor]]:
    """A whole tensor in pieces, in order of their places: regions of whole rows and their values,
    for a moment each.

    Raises:
        CheckpointError: as ``overlaps``.
    """
    shape = whole_shape(stored[name])
    for region in row_chunks(shape):
        values = torch.empty(region.shape, dtype=stored[name][0].dtype)
        shared = overlaps(folder, stored, name, shape, region)
        for part, both in shared:
            with folder.open(part.file) as file:
                for piece, read in read_region(file, folder, part, both):
                    values[window(piece, region.offset)].copy_(read)
        yield region, values


def row_chunks(shape: tuple[int, ...]) -> Iterator[Region]:
    """Regions of whole rows that make up a tensor."""
    if not shape:
        yield Region((), ())
        return
    rest = shape[1:]
    rows = max(1, CHUNK // (4 * max(1, math.prod(rest))))
    for first in range(0, shape[0], rows):
        yield Region((first, *(0,) * len(rest)), (min(rows, shape[0] - first), *rest))


def bytes_of(parts: list[StoredRegion]) -> int:
    return sum(part.nbytes for part in parts)


def opened(folder: Storage) -> tuple[State, StoredRegions]:
    """A checkpoint's state.json and parts, its files being all there and as long as they should be.

    Raises:
        CheckpointError: a file is missing or has another size; nothing is said of its contents.
    """
    state = read_state(folder.path)
    for name, record in state.files.items():
        size = folder.size(name) if folder.holds(name) else None
        if size != record.bytes:
            found = (
                "missing"
                if size is None
                else f"truncated or changed: {size} bytes, expected {record.bytes}"
            )
            raise CheckpointError(
                f"{folder}/{name}: {found}; `dnt checkpoint verify` looks at all of it"
            )
    return state, read_parts(folder)


def inspect(path: str, *, tensors: bool) -> None:
    """Print what a checkpoint is; with ``tensors``, a table of them, which reads them all."""
    found = checkpoints_at(path)
    folder = found[-1]
    state, stored = opened(folder)
    for key, value in summary(folder, state, stored).items():
        print(f"{key:14} {value}")
    if others := found[:-1]:
        print(f"{'also there':14} {', '.join(str(other).rpartition('/')[2] for other in others)}")
    if not tensors:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "dtype", "parts", "norm", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    with Meter("reading", sum(map(bytes_of, stored.values()))) as meter:
        for name, parts in stored.items():
            numbers = [f"{value:.6g}" for value in measures(folder, stored, name)]
            shape = " x ".join(map(str, whole_shape(parts)))
            table.add_row(
                name, shape, str(parts[0].dtype).removeprefix("torch."), str(len(parts)), *numbers
            )
            meter(bytes_of(parts))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def summary(folder: Storage, state: State, stored: StoredRegions) -> dict[str, str]:
    """What ``inspect`` says of a checkpoint as a whole."""
    weights = [
        math.prod(whole_shape(parts)) for name, parts in stored.items() if name.startswith("model.")
    ]
    kinds = {name.partition(".")[0]: parts[0].dtype for name, parts in stored.items()}
    engine = state.config.get("engine")
    run = state.config.get("run")
    return {
        "checkpoint": str(folder),
        "run": f"{run.get('name') if isinstance(run, dict) else '?'}, id {state.run_id}",
        "step": f"{state.step:,}, {state.skipped:,} of them skipped",
        **{name: f"{count:,}" for name, count in state.of_source.items() if isinstance(count, int)},
        "data position": f"row {state.consumed_rows:,} of the order of seed {state.seed}",
        "parameters": f"{sum(weights):,} in {len(weights)} tensors",
        "holds": ", ".join(
            f"{kind} {str(dtype).removeprefix('torch.')}" for kind, dtype in kinds.items()
        ),
        "bytes": f"{sum(record.bytes for record in state.files.values()):,} in {len(state.files)} "
        "files",
        "written by": f"engine {engine.get('name') if isinstance(engine, dict) else '?'} on "
        f"{state.world_size} ranks",
        "engine": ", ".join(f"{key} {value:g}" for key, value in state.scalars.items()),
    }


def measures(folder: Storage, stored: StoredRegions, name: str) -> tuple[float, float, float]:
    """Norm, minimum and maximum of a tensor; NaN if it holds one."""
    square, low, high = 0.0, math.inf, -math.inf
    for _, values in values_of(folder, stored, name):
        values = values.double()
        square += float(values.square().sum())
        # NaN first: min and max of Python keep what compares to nothing
        low, high = min(float(values.min()), low), max(float(values.max()), high)
    return (
        (math.sqrt(square), low, high) if not math.isnan(square) else (math.nan, math.nan, math.nan)
    )


def verify(path: str) -> dict[str, list[str]]:
    """Re-read every byte of the checkpoints at ``path``: each one's path, and in words what is
    wrong with it.

    Checks each file's size and sha256, that the parts tile every tensor, that each optimizer buffer
    has the shape of its weight or a number for each of its rows, and that no weight lacks one.
    """
    found: dict[str, list[str]] = {}
    for folder in checkpoints_at(path):
        try:
            found[str(folder)] = problems_of(folder, read_state(folder.path))
        except (CheckpointError, OSError) as error:
            found[str(folder)] = [str(error)]
    return found


def problems_of(folder: Storage, state: State) -> list[str]:
    """What is wrong with one checkpoint, every byte of which is read; see ``verify``."""
    found = [not_part(folder, name) for name in tensor_files(folder) if name not in state.files]
    with Meter(
        f"verify {str(folder).rpartition('/')[2]}",
        sum(record.bytes for record in state.files.values()),
    ) as meter:
        found += filter(
            None, (problem_of(folder, name, record, meter) for name, record in state.files.items())
        )
    if found:
        return found
    stored = read_parts(folder)
    for name, parts in stored.items():
        dimensions = {len(part.region.shape) for part in parts}
        if len(dimensions) > 1:
            found.append(f"{folder}: the parts of {name} differ in their number of dimensions")
            continue
        shape = whole_shape(parts)
        whole = Region((0,) * len(shape), shape)
        hole = first_gap_or_overlap(whole, [part.region for part in parts])
        if hole is not None:
            shared = [(part, part.region) for part in parts]
            found.append(f"{folder}: {hole_in(name, hole, shared)}")
    shapes = {name: whole_shape(parts) for name, parts in stored.items()}
    return found + [f"{folder}: {problem}" for problem in buffer_problems(shapes, state)]


def buffer_problems(shapes: Mapping[str, tuple[int, ...]], state: State) -> list[str]:
    """Return what is wrong with the tensors that there are, a line each.

    Args:
        shapes: of whole tensors, by their names in the checkpoint.
        state: where the configuration says whether groups have optimizers, and so buffers, of their
            own; else every weight has a tensor of each kind.
    """
    kinds: dict[str, dict[str, tuple[int, ...]]] = {"model": {}}  # shapes by weight
    for name, shape in shapes.items():
        kind, _, weight = name.partition(".")
        kinds.setdefault(kind, {})[weight] = shape
    weights = kinds.pop("model")
    buffered = {name for buffers in kinds.values() for name in buffers}
    found = [f"no model.{name}" for name in sorted(buffered - weights.keys())]
    own = [isinstance(each, dict) and each.get("optimizer") for each in _groups(state).values()]
    for kind, buffers in kinds.items():
        known = sorted(buffers.keys() & weights.keys())
        # a number for each row, which matrices alone have
        if all(len(weights[name]) > 1 and buffers[name] == weights[name][:1] for name in known):
            continue
        found += [
            f"{kind}.{name} has shape {buffers[name]}, its weight {weights[name]}"
            for name in known
            if buffers[name] != weights[name]
        ]
        if not any(own):
            found += [f"no {kind}.{name}" for name in sorted(weights.keys() - buffers)]
    bare = sorted(weights.keys() - buffered) if any(own) else []
    return found + [f"no buffer of model.{name}" for name in bare]


def _groups(state: State) -> dict[str, object]:
    """Return the recorded ``optim.groups``; empty where the configuration has none."""
    optim = state.config.get("optim")
    groups = optim.get("groups") if isinstance(optim, dict) else None
    return groups if isinstance(groups, dict) else {}


@dataclass(frozen=True)
class Difference:
    """How far a tensor of one checkpoint is from its namesake in another."""

    name: str
    what: str  # "" when the values differ, else what keeps them from being compared
    place: tuple[int, ...] = ()  # of the first element whose bits differ
    pair: tuple[float, float] = (0.0, 0.0)  # the two values there
    largest: float = 0.0  # difference of any element; infinite where only one is a number
    relative: float = 0.0  # norm of the difference / norm of the first
    elements: int = 0  # that differ
    of: int = 0

    def __str__(self) -> str:
        if self.what:
            return f"{self.name}: {self.what}"
        one, other = self.pair
        return f"{self.name}{list(self.place)}: {one!r} and {other!r}, {abs(one - other):.3g} apart"


def differences(
    one: Storage, other: Storage, tell: Callable[[int], None] = lambda count: None
) -> Iterator[Difference]:
    """The tensors in which two checkpoints differ, in the order of the first, bit for bit.

    Raises:
        CheckpointError: one is damaged.
    """
    a, b = opened(one)[1], opened(other)[1]
    for name in itertools.chain(a, (name for name in b if name not in a)):
        if name not in a or name not in b:
            yield Difference(name, f"only in {one if name in a else other}")
            continue
        for what in (lambda parts: whole_shape(parts), lambda parts: parts[0].dtype):
            if what(a[name]) != what(b[name]):
                yield Difference(name, f"{what(a[name])} in {one}, {what(b[name])} in {other}")
                break
        else:
            found = _difference(name, values_of(one, a, name), values_of(other, b, name))
            if found:
                yield found
        tell(bytes_of(a[name]))


Pieces = Iterator[tuple[Region, Tensor]]


def _difference(name: str, one: Pieces, other: Pieces) -> Difference | None:
    place: tuple[int, ...] | None = None
    pair = (0.0, 0.0)
    largest = square = square_apart = 0.0
    elements = of = 0
    for (region, a), (_, b) in zip(one, other, strict=True):
        of += a.numel()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
        unequal = a.view(bits) != b.view(bits)
        count = int(unequal.sum())
        x = a.double()
        square += float(x.square().sum())
        if not count:
            continue
        elements += count
        if place is None:
            first = int(unequal.flatten().to(torch.uint8).argmax())
            inside = [int(index) for index in torch.unravel_index(torch.tensor(first), a.shape)]
            place = tuple(index + start for index, start in zip(inside, region.offset, strict=True))
            pair = (a.flatten()[first].item(), b.flatten()[first].item())
        apart = (x - b.double()).abs()[unequal].nan_to_num(nan=math.inf)
        largest = max(largest, float(apart.max()))
        square_apart += float(apart.square().sum())
    if place is None:
        return None
    relative = math.sqrt(square_apart) / math.sqrt(square) if square else math.inf
    return Difference(name, "", place, pair, largest, relative, elements, of)


def state_differences(one: State, other: State) -> list[str]:
    """The numbers in which two state.json differ: where the run stands, not who ran it."""
    fields = ("step", "consumed_rows", "skipped", "seed", "manifest_sha256", "health")
    pairs = [(field, getattr(one, field), getattr(other, field)) for field in fields]
    a, b = one.of_source, other.of_source
    pairs += [(name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys())]
    names = sorted(one.scalars.keys() | other.scalars.keys())
    pairs += [(f"engine.{name}", one.scalars.get(name), other.scalars.get(name)) for name in names]
    apart = [(name, x, y) for name, x, y in pairs if repr(x) != repr(y)]
    return [
        f"{name}: differs" if name == "health" else f"{name}: {x} and {y}" for name, x, y in apart
    ]


def diff(one: str, other: str) -> bool:
    """Print how two checkpoints (the newest ones at the paths) differ; whether they are equal,
    bit for bit.
    """
    a, b = checkpoints_at(one)[-1], checkpoints_at(other)[-1]
    numbers = state_differences(read_state(a.path), read_state(b.path))
    for line in numbers:
        print(line)
    with Meter("comparing", sum(map(bytes_of, read_parts(a).values()))) as meter:
        found = list(differences(a, b, meter))
    if not found:
        print("tensors: bitwise equal")
        return not numbers
    print(f"first: {found[0]}")
    print(f"tensors that differ: {len(found)}")
    table = Table(box=None, pad_edge=False)
    table.add_column("worst", overflow="fold")
    for column in ("largest", "relative", "elements", "first at"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in sorted((item for item in found if not item.what), key=lambda item: -item.largest)[
        :WORST
    ]:
        numbers_of = (
            f"{item.largest:.3g}",
            f"{item.relative:.3g}",
            f"{item.elements:,} of {item.of:,}",
        )
        table.add_row(item.name, *numbers_of, str(list(item.place)))
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for item in [item for item in found if item.what][:WORST]:
        print(item)
    return False

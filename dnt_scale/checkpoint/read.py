"""Reading: which parts overlap the shards a rank wants, and only their bytes."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.checkpoint.safetensors_header import StoredRegion, read_header
from dnt_scale.checkpoint.state import FileRecord, State, instead_of, step_name, step_of
from dnt_scale.checkpoint.storage import CheckpointError, File, Storage, fill
from dnt_scale.checkpoint.tensor_shards import Region, TensorShard, first_gap_or_overlap, intersect
from dnt_scale.distributed.agree import on_first, together
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.distributed.heartbeat import moving
from dnt_scale.distributed.process_group import Ranks

CHUNK = 1 << 25  # bytes read at a time

StoredRegions = dict[str, list[StoredRegion]]  # by the tensors' names, in the order of the files


def newest(folder: Path | str) -> Path | str | None:
    """The complete checkpoint with the highest step in ``folder``, if any; partial ones do not
    count.

    Raises:
        CheckpointError: a URL that cannot be opened.
        OSError: the folder cannot be read.
    """
    return [None, *(found.path for found in complete(Storage(folder)).values())][-1]


def complete(folder: Storage) -> dict[int, Storage]:
    """The complete checkpoints in a folder by their steps, in order."""
    return {
        step: found
        for step in steps_of(folder)
        if (found := folder / step_name(step)).holds("state.json")
    }


def steps_of(folder: Storage) -> list[int]:
    """The steps, in order, of the folders named exactly step-NNNNNNNN; whatever else lies beside
    them is none.
    """
    steps = {step_of(name): name for name in folder.names()}
    return sorted(
        step for step, name in steps.items() if step is not None and folder.is_folder(name)
    )


def gone_latest(folder: Storage) -> str | None:
    """The name of the checkpoint that a local folder's link ``latest`` points to, if that was
    removed by hand.
    """
    link = folder.local / "latest" if folder.local else None
    return link.readlink().name if link and link.is_symlink() and not link.exists() else None


def read_tensors(path: Path | str, shards: Sequence[TensorShard], ranks: Ranks) -> None:
    """Fill ``shards`` in place from a checkpoint that any engine wrote on any number of ranks. A
    collective.

    Tensors of another dtype than the shard's are converted, rounding to nearest.

    Raises:
        CheckpointError: on every rank: a tensor is missing, has another shape or a hole, or a file
            is damaged.
    """
    try:
        folder = together(ranks, lambda: Storage(path))
        files = on_first(ranks, lambda: tensor_files(folder))
        mine = together(
            ranks,
            lambda: [
                part
                for file in files[ranks.rank :: ranks.world_size]
                for part in read_header(folder, file)
            ],
        )
        of_ranks: list[list[StoredRegion]] = [[] for _ in range(ranks.world_size)]
        dist.all_gather_object(of_ranks, mine)
        stored = by_name(
            sorted(
                (part for parts in of_ranks for part in parts),
                key=lambda part: (part.file, part.begin),
            )
        )
        together(ranks, lambda: fill_shards(folder, stored, shards))
    except AgreedError as error:
        raise CheckpointError(str(error)) from None


def tensor_files(folder: Storage) -> list[str]:
    return [name for name in folder.names() if name.endswith(".safetensors")]


def read_parts(folder: Storage) -> StoredRegions:
    """Every file's parts, for one process. Raises CheckpointError or OSError as ``read_header``
    does.
    """
    stored = by_name(part for file in tensor_files(folder) for part in read_header(folder, file))
    stored.pop("counters", None)  # steps and updates, in the checkpoints of old
    return stored


def by_name(parts: Iterable[StoredRegion]) -> StoredRegions:
    found: StoredRegions = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    return found


def whole_shape(parts: Sequence[StoredRegion]) -> tuple[int, ...]:
    """A tensor's shape: as far as its parts reach."""
    ends = ([a + n for a, n in zip(*part.region, strict=True)] for part in parts)
    return tuple(map(max, zip(*ends, strict=True)))


def fill_shards(folder: Storage, stored: StoredRegions, shards: Sequence[TensorShard]) -> None:
    """Fill shards in place. Raises CheckpointError as ``read_tensors`` does, on this rank only."""
    wanted: list[tuple[StoredRegion, Region, TensorShard]] = []
    for shard in shards:
        wanted += [
            (part, shared, shard)
            for part, shared in overlaps(folder, stored, shard.name, shard.shape, shard.region)
        ]
    wanted.sort(key=lambda item: (item[0].file, item[0].begin))
    for name, items in groupby(wanted, key=lambda item: item[0].file):
        with folder.open(name) as file:
            for part, shared, shard in items:
                for region, values in read_region(file, folder, part, shared):
                    shard.data.detach()[window(region, shard.offset)].copy_(values)
                    moving()


def overlaps(
    folder: Storage, stored: StoredRegions, name: str, shape: tuple[int, ...], wanted: Region
) -> list[tuple[StoredRegion, Region]]:
    """The parts that cover a region of a tensor, and what of it each has.

    Raises:
        CheckpointError: the tensor is missing, has another shape, or a place of the region is not
            there exactly once.
    """
    parts = stored.get(name)
    advice = "resume with the configuration in the run's config.yaml"
    if parts is None:
        raise CheckpointError(
            f"{folder}: does not fit this model and optimizer (it has no {name}); {advice}"
        )
    try:
        found = whole_shape(parts)
    except ValueError:
        raise CheckpointError(
            f"{folder}: damaged: the parts of {name} differ in their number of dimensions"
        ) from None
    if found != shape:
        raise CheckpointError(
            f"{folder}: does not fit this model and optimizer ({name} has shape {found}, expected "
            f"{shape}); {advice}"
        )
    shared = [(part, both) for part in parts if (both := intersect(part.region, wanted))]
    hole = first_gap_or_overlap(wanted, [region for _, region in shared])
    if hole is not None:
        raise CheckpointError(
            f"{folder}: damaged: {hole_in(name, hole, shared)}; {instead_of(folder.path)}"
        )
    return shared


def hole_in(
    name: str, place: tuple[int, ...], shared: Sequence[tuple[StoredRegion, Region]]
) -> str:
    """What is wrong at a place that ``first_gap_or_overlap`` found."""
    element = Region(place, (1,) * len(place))
    times = sum(intersect(region, element) is not None for _, region in shared)
    return f"element {list(place)} of {name} is in {times} parts, expected 1"


def check_files(path: Path | str, state: State, ranks: Ranks) -> None:
    """Compare every file with its recorded size and sha256, the files shared out over the ranks. A
    collective.

    Raises:
        CheckpointError: on every rank, naming the first file that is missing, truncated or changed.
    """
    mine = sorted(state.files)[ranks.rank :: ranks.world_size]

    def check() -> None:
        folder = Storage(path)
        for name in sorted(set(tensor_files(folder)) - state.files.keys()) if ranks.first else []:
            raise CheckpointError(not_part(folder, name))
        for name in mine:
            if problem := problem_of(folder, name, state.files[name], lambda count: moving()):
                raise CheckpointError(problem)

    try:
        together(ranks, check)
    except AgreedError as error:
        raise CheckpointError(f"{error}; {instead_of(path)}") from None


def not_part(folder: Storage, name: str) -> str:
    return f"{folder}/{name}: not part of this checkpoint"


def problem_of(
    folder: Storage, name: str, record: FileRecord, tell: Callable[[int], None] = lambda count: None
) -> str | None:
    """What is wrong with a file, or None; ``tell`` gets the bytes read as it goes on."""
    try:
        size = folder.size(name)
        if size != record.bytes:
            return f"{folder}/{name}: truncated or changed: {size} bytes, expected {record.bytes}"
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, size)))
        with folder.open(name) as file:
            for begin in range(0, size, CHUNK):
                chunk = buffer[: min(CHUNK, size - begin)]
                if not fill(file, chunk):
                    return f"{folder}/{name}: truncated while it was read"
                digest.update(chunk)
                tell(len(chunk))
    except FileNotFoundError:
        return f"{folder}/{name}: missing"
    except OSError as error:
        return f"{folder}/{name}: cannot be read: {error.strerror or error}"
    return (
        None
        if digest.hexdigest() == record.sha256
        else (f"{folder}/{name}: damaged: its sha256 is not the recorded one")
    )


def window(region: Region, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """The slices of a region in what begins at ``origin``."""
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(*region, origin, strict=True))


def read_region(
    file: File, folder: Storage, part: StoredRegion, wanted: Region
) -> Iterator[tuple[Region, Tensor]]:
    """Read a region inside a part, in chunks of whole rows: each one's region and values, in the
    stored dtype.

    Values are a view of a buffer that the next chunk reuses.

    Raises:
        CheckpointError: the file ends before.
    """
    shape = part.region.shape
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    rows = max(1, CHUNK // (part.dtype.itemsize * max(1, strides[0]))) if shape else 1
    buffer = torch.empty(0, dtype=part.dtype)
    for first in range(0, wanted.shape[0], rows) if shape else [0]:
        region = wanted
        if shape:
            count = min(rows, wanted.shape[0] - first)
            region = Region(
                (wanted.offset[0] + first, *wanted.offset[1:]), (count, *wanted.shape[1:])
            )
        start = sum(
            (a - o) * stride
            for a, o, stride in zip(region.offset, part.region.offset, strides, strict=True)
        )
        # columns left out lie between the rows: one read of what is between the first and the last
        # element
        span = sum((n - 1) * stride for n, stride in zip(region.shape, strides, strict=True)) + 1
        if len(buffer) < span:
            buffer = torch.empty(span, dtype=part.dtype)
        file.seek(part.begin + start * part.dtype.itemsize)
        if not fill(file, buffer[:span].view(torch.uint8).numpy().data):
            raise CheckpointError(f"{folder}/{part.file}: truncated: {part.name} is not whole")
        yield region, buffer.as_strided(region.shape, strides)

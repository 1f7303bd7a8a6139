"""The head of a safetensors file: which parts of which tensors it holds, and where.

The offsets are those of torch.distributed.checkpoint's safetensors form (``DCP_SHARDING_INFO``), so
that its HuggingFaceStorageReader reads our files and we read its; a file without them holds whole
tensors.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from dnt_scale.checkpoint.storage import CheckpointError, Storage, fill
from dnt_scale.checkpoint.tensor_shards import Region

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a head; the safetensors library's own limit


class StoredRegion(NamedTuple):
    """A region of the tensor ``name`` in a file, in row-major order from byte ``begin`` of it."""

    name: str
    region: Region
    dtype: torch.dtype
    file: str
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.region.shape) * self.dtype.itemsize


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Saved(BaseModel):
    saved_offsets: tuple[NonNegativeInt, ...]


_HEAD = TypeAdapter(dict[str, _Entry | dict[str, str]])
_OFFSETS = TypeAdapter(dict[str, _Saved])


def make_header(
    entries: Sequence[tuple[str, torch.dtype, Region]], more: Mapping[str, str] | None = None
) -> bytes:
    """The head of a file that holds ``entries``, each name once, end to end; ``more`` is
    metadata beside ours.
    """
    offsets = {name: {"saved_offsets": region.offset} for name, _, region in entries}
    metadata = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(offsets),
        **(more or {}),
    }
    head: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, region in entries:
        begin, end = end, end + math.prod(region.shape) * dtype.itemsize
        head[name] = {"dtype": NAMES[dtype], "shape": region.shape, "data_offsets": (begin, end)}
    assert len(head) == len(entries) + 1, "a name stands twice in a file"
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text


def read_header(folder: Storage, file: str) -> list[StoredRegion]:
    """The parts a file holds, in its order.

    Raises:
        CheckpointError: it is not safetensors, or it is truncated.
        OSError: it cannot be read.
    """
    return read_head(folder, file)[0]


def read_head(folder: Storage, file: str) -> tuple[list[StoredRegion], Mapping[str, str]]:
    """The parts a file holds, in its order, and its metadata. Raises as ``read_header``."""

    def wrong(reason: object) -> CheckpointError:
        return CheckpointError(f"{folder}/{file}: not readable as safetensors: {reason}")

    size = folder.size(file)
    with folder.open(file) as stream:
        length_bytes = bytearray(8)
        if not fill(stream, memoryview(length_bytes)):
            raise wrong(f"{size} bytes are too few")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > min(LONGEST, size - 8):
            raise wrong(f"its head would have {length} bytes, the file has {size}")
        text = bytearray(length)
        fill(stream, memoryview(text))
    try:
        head = _HEAD.validate_json(text)
        found = head.pop("__metadata__", {})
        metadata = found if isinstance(found, dict) else {"DCP_SHARDING_INFO": ""}
        offsets = _OFFSETS.validate_json(metadata.get("DCP_SHARDING_INFO", "{}"))
    except ValidationError as error:
        problem = error.errors()[0]
        raise wrong(f"{'.'.join(map(str, problem['loc'])) or 'head'}: {problem['msg']}") from None
    parts = []
    for name, entry in head.items():
        if isinstance(entry, dict):
            raise wrong(f"{name} has no dtype, shape and place")
        saved = offsets[name].saved_offsets if name in offsets else (0,) * len(entry.shape)
        if entry.dtype not in DTYPES or len(saved) != len(entry.shape):
            raise wrong(f"{name} has dtype {entry.dtype}, shape {entry.shape} and offset {saved}")
        begin, end = entry.data_offsets
        part = StoredRegion(
            name, Region(saved, entry.shape), DTYPES[entry.dtype], file, 8 + length + begin
        )
        if end - begin != part.nbytes or 8 + length + end > size:
            raise wrong(
                f"{name} lies at bytes {begin} to {end} after the head, the file has {size}"
            )
        parts.append(part)
    return parts, metadata

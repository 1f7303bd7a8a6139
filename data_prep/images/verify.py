"""Read an image set again, every byte of it, and compare it with its manifest."""

import hashlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data_prep.images.shards import (
    LABEL_BEFORE,
    ImageManifest,
    ImageShard,
    Index,
    read_index,
    read_manifest,
    sample_key,
    suffix_of,
)
from data_prep.set_files import MANIFEST, TAR_BLOCK, SplitName, file_problem, padded


def verify(folder: Path, progress: Callable[[int], object] | None = None) -> list[str]:
    """Read everything again and compare it with the manifest; `progress` is told the bytes of each
    read.

    Checks the sizes and SHA-256 of tars and indexes, every member's name, place and CRC, that
    labels are those of the index and of a class, and how many images each class has. Images are not
    decoded. Returns the problems, a line each, naming the file and where possible the member; [] if
    it is whole.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    problems: list[str] = []
    for name, split in manifest.splits.items():
        first, labels = 0, Counter[int]()
        bad: list[str] = []
        for shard in split.shards:
            bad += _check_shard(folder, manifest, shard, first, labels, progress)
            first += shard.images
        problems += bad
        problems += [] if bad else _check_counts(manifest, name, labels)
    return problems


def _check_counts(manifest: ImageManifest, split: SplitName, labels: Counter[int]) -> Iterator[str]:
    """Yield the classes that have other numbers of images than the manifest says."""
    for label, each in enumerate(manifest.classes):
        if (expected := each.images.get(split, 0)) != labels[label]:
            yield (
                f"{MANIFEST}: classes.{label}.images.{split} is {expected}, the index holds "
                f"{labels[label]}"
            )


def _check_shard(
    folder: Path,
    manifest: ImageManifest,
    shard: ImageShard,
    first: int,
    labels: Counter[int],
    progress: Callable[[int], object] | None,
) -> Iterator[str]:
    """Yield what is wrong with a tar and its index; its labels are counted in `labels`."""
    path = folder / shard.file
    if problem := file_problem(path, shard.bytes):
        yield problem
    try:
        index = read_index(folder, shard)
    except ValueError as error:
        yield str(error)
        return
    labels.update(index["label"].tolist())
    if not path.is_file():
        return
    digest, problems = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:

            def read(size: int) -> bytes:
                raw = file.read(size)
                digest.update(raw)
                if progress:
                    progress(len(raw))
                return raw

            for problem in _check_members(read, manifest, index, first):
                problems += 1
                yield f"{path}: {problem}"
            _read_rest(file, read)
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}"
        return
    # Where a member is known to be damaged, the whole file's hash says no more.
    if digest.hexdigest() != shard.sha256 and not problems:
        found, expected = digest.hexdigest()[:12], shard.sha256[:12]
        yield f"{path}: SHA-256 is {found}..., the manifest says {expected}..."


def _read_rest(file: IO[bytes], read: Callable[[int], bytes]) -> None:
    while read(1 << 20):
        pass


def _check_members(
    read: Callable[[int], bytes], manifest: ImageManifest, index: Index, first: int
) -> Iterator[str]:
    """Yield what is wrong with the members of a tar, given what reads on in it. Where the file ends
    inside of one it is the last."""
    position = 0
    for number, row in enumerate(index, first):
        offset, size = int(row["offset"]), int(row["size"])
        end = offset + padded(size)
        raw = read(end - position)
        if len(raw) < end - position:
            yield f"{sample_key(number)}: the file ends inside it"
            return
        if problem := _check_sample(raw, offset - position, size, sample_key(number), row):
            yield f"{sample_key(number)}: {problem}"
        elif int(row["label"]) >= len(manifest.classes):
            yield f"{sample_key(number)}: label {row['label']} has no class"
        position = end


def _check_sample(raw: bytes, start: int, size: int, key: str, row: Index) -> str | None:
    """Return what is wrong with a sample, given its bytes in the tar, in which the image begins at
    `start`."""
    data, digits = raw[start : start + size], str(row["label"]).encode()
    if zlib.crc32(data) != int(row["crc32"]):
        return "its image is altered: the CRC-32 is not that of the index"
    at = start - LABEL_BEFORE
    if raw[at : at + len(digits)] != digits:
        return f"its .cls is {raw[at : at + len(digits)]!r}, the index says {row['label']}"
    try:
        expected = [(f"{key}.{suffix_of(data)}", size), (f"{key}.cls", len(digits))]
        for (name, length), place in zip(expected, (start, at), strict=True):
            header = tarfile.TarInfo.frombuf(raw[place - TAR_BLOCK : place], "utf-8", "strict")
            if (header.name, header.size, header.isreg()) != (name, length, True):
                return f"its tar header tells of {header.name!r}, {header.size} bytes"
    except (ValueError, tarfile.HeaderError) as error:
        return f"its tar header or image is damaged ({error})"
    return None

"""From INPUTs to units of images: class folders, tars, parquet and IDX files, here or at a URL."""

import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_prep.images.findings import Finding
from data_prep.images.idx import is_idx_images, labels_path
from data_prep.read.inputs import UNIT_BYTES, unused
from data_prep.read.listing import (
    Found,
    MadeRows,
    Passed,
    last_part,
    list_remote,
    stat_file,
    stat_remote,
    walk,
)
from data_prep.read.pieces import Unit
from data_prep.read.streams import File, file_system, is_http, is_url, packing
from data_prep.read.suffixes import bare_name, describe_suffix, printable
from data_prep.set_files import MADE_BY, SplitName, format_of

IMAGE_SUFFIXES = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())  # noqa: SIM905
UNIT_IMAGES = 1 << 14  # what identifies a unit is put together in memory
SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class ImageInput:
    """One INPUT: its files in units, in reading order, what was passed over, and the split that it
    is, or None where a share of it may become val."""

    name: str
    units: tuple[Unit, ...]
    passed: tuple[Finding, ...]
    split: SplitName | None


class _Listed(NamedTuple):
    name: str
    is_folder: bool
    files: Sequence[Found]
    passed: list[Passed]


def find_inputs(inputs: Sequence[str | Path], val: str | None) -> list[ImageInput]:
    """Find the files behind each INPUT; those of `val` first, so that a copy of one of its images
    in train is the one that goes, where copies are left out.

    In a folder count IDX files, else tars, else parquet, else the images in class folders: FOLDER/
    CLASS/..., sorted by their path. A file reached twice is read once.

    Raises ValueError where an INPUT does not exist, holds no image, or a class folder none.
    """
    seen: set[int] = set()
    used: dict[str, int] = {}
    found = [_find(val, "val", seen, used)] if val else []
    found += [_find(str(item), "train" if val else None, seen, used) for item in inputs]
    if not any(each.units for each in found if each.split != "val"):
        raise ValueError(f"{val}: holds all of the input; name other images to train on")
    return found


def all_units(inputs: Sequence[ImageInput]) -> list[Unit]:
    """Return the units of all INPUTs, in reading order."""
    return [unit for each in inputs for unit in each.units]


def _find(item: str, split: SplitName | None, seen: set[int], used: dict[str, int]) -> ImageInput:
    try:
        listed = _list(item)
    except OSError as error:
        raise ValueError(
            f"{item}: cannot be read: {error.strerror or error}; check the path"
        ) from error
    name = unused(printable(listed.name), used)
    used[name] = 1
    kinds = {_kind_of(file.below) for file in listed.files}
    kind = next((each for each in ("idx", "tar", "parquet", "image") if each in kinds), None)
    passed = [Finding(each.kind, f"{name}/{each.below}", each.detail) for each in listed.passed]
    if kind is None:
        raise ValueError(
            f"{item}: found no images{_such_as(listed)}, expected class folders of "
            f"{' '.join(IMAGE_SUFFIXES[:4])} files, .tar, .parquet, or IDX files such as "
            "train-images-idx3-ubyte.gz with their labels beside them"
        )
    if kind == "image":
        _check_folders(item, listed)
    chosen = array("q")
    for number, found in enumerate(listed.files):
        if (this := _kind_of(found.below)) == kind and (kind != "image" or "/" in found.below):
            real = found.path if is_url(found.path) else os.path.realpath(found.path)
            if (mark := xxhash.xxh3_64_intdigest(os.fsencode(real))) not in seen:
                seen.add(mark)
                chosen.append(number)
        elif this == kind:
            place = _place(listed, name, found)
            passed.append(Finding("no_class", place, "an image in no class folder"))
        elif this != "labels":
            detail = describe_suffix(found.below)
            passed.append(Finding("other_suffix", _place(listed, name, found), detail))

    def make(at: int) -> File:
        found = listed.files[chosen[at]]
        return File(_place(listed, name, found), found.path, kind, found.size, found.stamp)

    units = _units(name, kind, MadeRows(len(chosen), make))
    return ImageInput(name, tuple(units), tuple(sorted(passed)), split)


def _place(listed: _Listed, name: str, found: Found) -> str:
    """Return where a person looks for a file."""
    below = printable(found.below)
    return f"{name}/{below}" if listed.is_folder else below


def _units(name: str, kind: str, files: MadeRows[File]) -> list[Unit]:
    """Return units: neighbouring images of up to UNIT_BYTES together, any other file by itself."""
    if kind == "idx":
        return [Unit(name, (file, _labels_of(file))) for file in files]
    if kind != "image":
        return [Unit(name, (file,)) for file in files]
    ends: list[int] = []
    size = 0
    for number, file in enumerate(files):
        here = number - (ends[-1] if ends else 0)
        if here and (size + file.size > UNIT_BYTES or here == UNIT_IMAGES):
            ends.append(number)
            size = 0
        size += file.size
    bounds = pairwise([0, *ends, len(files)])
    return [Unit(name, files[start:end]) for start, end in bounds if end > start]


def _kind_of(name: str) -> str:
    """Return what a file is by its name: "idx", "labels" of it, "tar", "parquet", "image" or ""."""
    bare = bare_name(name)
    if is_idx_images(name):
        return "idx"
    if re.search(r"idx1-ubyte$", bare):
        return "labels"
    if bare.endswith(".tar"):
        return "tar"
    if packing(name):
        return ""
    return "parquet" if bare.endswith(".parquet") else "image" * bare.endswith(IMAGE_SUFFIXES)


def _labels_of(images: File) -> File:
    """Return the file of labels beside an IDX file of images. Raises ValueError if there is
    none."""
    path = labels_path(images.path)
    try:
        found = _list(path).files[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{images.path}: has no labels beside it, expected {path}; fetch that too"
        ) from error
    return File(labels_path(images.name), found.path, "labels", found.size, found.stamp)


def _check_folders(item: str, listed: _Listed) -> None:
    """Raise ValueError where images lie in no class folders, or a class folder has none."""
    if not listed.is_folder:
        raise ValueError(
            f"{item}: images that are named one by one have no class; give the folder that holds "
            "the class folders"
        )
    names = (file.below for file in listed.files if _kind_of(file.below) == "image")
    classes = {below.split("/")[0] for below in names if "/" in below}
    if not classes:
        images = [file.below for file in listed.files if _kind_of(file.below) == "image"]
        raise ValueError(
            f"{item}: found {len(images):,} images but no class folders, expected "
            f"{item.rstrip('/')}/CLASS/{images[0]}"
        )
    if "train" in classes and classes <= SPLIT_FOLDERS:
        root, others = item.rstrip("/"), sorted(classes - {"train"})
        val = f" --val {root}/{others[0]}" if others else ""
        raise ValueError(
            f"{item}: holds the splits {', '.join(sorted(classes))} rather than classes; give "
            f"{root}/train{val}"
        )
    if not Path(item).is_dir():  # a pattern, or a store, of which most have no empty folders
        return
    for entry in sorted(os.scandir(item), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes:
            raise ValueError(
                f"{entry.path}: a class folder without images, expected files that end in "
                f"{' '.join(IMAGE_SUFFIXES)}; fill or remove it"
            )


def _such_as(listed: _Listed) -> str:
    if not listed.files:
        return ""
    return f" among {len(listed.files):,} files, such as {printable(listed.files[0].below)}"


# --- what lies behind an INPUT --------------------------------------------------------------------


def _list(item: str) -> _Listed:
    """List the files behind an INPUT. Raises ValueError if there is none, OSError."""
    if is_url(item) and not item.startswith("file://"):
        try:
            return _list_remote(item)
        except FileNotFoundError as error:
            raise ValueError(f"{item}: not there, or not to be reached; check the URL") from error
        except ValueError:
            raise
        except Exception as error:  # every remote file system has its own classes
            raise ValueError(
                f"{item}: cannot be read: {type(error).__name__} {error}; check the URL"
            ) from error
    path = Path(item.removeprefix("file://"))
    if item.startswith("~") and not path.exists():
        path = path.expanduser()
    name = path.name if path.name not in ("", "..") else path.resolve().name or "root"
    if path.is_file():
        return _Listed(name, False, [stat_file(name, path)], [])
    if path.is_dir():
        if format_of(path) in MADE_BY:
            raise ValueError(
                f"{item}: a prepared set already; give what it was made of, or go on from it with "
                "--append"
            )
        return _Listed(name, True, *walk(path, ["**"]))
    if not re.search(r"[*?\[]", item):
        raise ValueError(f"{item}: no such file or folder; check the path")
    parts = path.parts
    fixed = next(n for n in range(len(parts), -1, -1) if Path(*parts[:n]).is_dir())
    files, passed = walk(Path(*parts[:fixed]), list(parts[fixed:]))
    return _Listed(Path(*parts[:fixed]).name or "root", True, _some(item, files), passed)


def _list_remote(item: str) -> _Listed:
    fs, path = file_system(item)
    web = is_http(item)
    if re.search(r"[*\[]" if web else r"[*?\[]", path):
        root = re.split(r"[^/]*[*?\[]", path)[0].rstrip("/")
        files, passed = list_remote(fs, root, _files_only(fs.glob(path, detail=True)))
        return _Listed(last_part(root), True, _some(item, files), passed)
    if item.endswith("/") if web else fs.isdir(path):
        root = path.rstrip("/")
        found = _files_only(fs.find(path, detail=True))
        return _Listed(last_part(root), True, *list_remote(fs, root, found))
    name = last_part(path.partition("?")[0] if web else path)
    return _Listed(name, False, [stat_remote(fs, name, path, fs.info(path))], [])


def _files_only(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {path: info for path, info in found.items() if info["type"] == "file"}


def _some(item: str, files: Sequence[Found]) -> Sequence[Found]:
    if not files:
        raise ValueError(
            f"{item}: no file matches this pattern; check it, and quote it for the shell"
        )
    return files

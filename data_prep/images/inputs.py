"""From INPUTs to units of images: class folders, tars, parquet and IDX files, here or at a URL."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.images.findings import Finding
from data_prep.images.idx import is_idx_images, labels_path
from data_prep.read.inputs import UNIT_BYTES, unused
from data_prep.read.listing import (
    Found,
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
    files: list[Found]
    passed: list[Passed]


def find_inputs(inputs: Sequence[str | Path], val: str | None) -> list[ImageInput]:
    """Find the files behind each INPUT; those of `val` first, so that a copy of one of its images
    in train is the one that goes, where copies are left out.

    In a folder count IDX files, else tars, else parquet, else the images in class folders: FOLDER/
    CLASS/..., sorted by their path. A file reached twice is read once.

    Raises ValueError where an INPUT does not exist, holds no image, or a class folder none.
    """
    seen: set[str] = set()
    used: dict[str, int] = {}
    found = [_find(val, "val", seen, used)] if val else []
    found += [_find(str(item), "train" if val else None, seen, used) for item in inputs]
    if not any(each.units for each in found if each.split != "val"):
        raise ValueError(f"{val}: holds all of the input; name other images to train on")
    return found


def all_units(inputs: Sequence[ImageInput]) -> list[Unit]:
    """Return the units of all INPUTs, in reading order."""
    return [unit for each in inputs for unit in each.units]


def _find(item: str, split: SplitName | None, seen: set[str], used: dict[str, int]) -> ImageInput:
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
    files = []
    for found in listed.files:
        below = printable(found.below)
        place = below if not listed.is_folder else f"{name}/{below}"
        if (this := _kind_of(found.below)) == kind and (kind != "image" or "/" in below):
            real = found.path if is_url(found.path) else os.path.realpath(found.path)
            if real not in seen:
                seen.add(real)
                files.append(File(place, found.path, kind, found.size, found.stamp))
        elif this == kind:
            passed.append(Finding("no_class", place, "an image in no class folder"))
        elif this != "labels":
            passed.append(Finding("other_suffix", place, describe_suffix(found.below)))
    return ImageInput(name, tuple(_units(name, files)), tuple(sorted(passed)), split)


def _units(name: str, files: Sequence[File]) -> list[Unit]:
    """Return units: neighbouring images of up to UNIT_BYTES together, any other file by itself."""
    units: list[Unit] = []
    some: list[File] = []
    size = 0
    for file in files:
        if file.kind == "image":
            if some and size + file.size > UNIT_BYTES:
                units.append(Unit(name, tuple(some)))
                some, size = [], 0
            some.append(file)
            size += file.size
        elif file.kind == "idx":
            units.append(Unit(name, (file, _labels_of(file))))
        else:
            units.append(Unit(name, (file,)))
    return [*units, Unit(name, tuple(some))] if some else units


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
    images = [file.below for file in listed.files if _kind_of(file.below) == "image"]
    classes = {below.split("/")[0] for below in images if "/" in below}
    if not classes:
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


def _some(item: str, files: list[Found]) -> list[Found]:
    if not files:
        raise ValueError(
            f"{item}: no file matches this pattern; check it, and quote it for the shell"
        )
    return files

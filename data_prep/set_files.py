"""What every kind of prepared set is on disk: plain tars and a manifest.json that can prove them
whole."""

import hashlib
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.files import write_whole
from data_prep.words import problems_of

MANIFEST = "manifest.json"
PARTIAL = ".dnt-partial"  # where a set is made
TAR_BLOCK = 512
# What makes a set of a format.
MADE_BY = {"dnt-shards": "dnt data prepare", "dnt-images": "dnt data images"}

SplitName = Literal["train", "val"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SetModel(BaseModel):
    """A part of a manifest: frozen, and without fields that are not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


AnyManifest = TypeVar("AnyManifest", bound=SetModel)


class HashingFile:
    """A new file that counts and hashes what goes through it. Raises FileExistsError."""

    def __init__(self, path: Path):
        self._file = path.open("xb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def sync(self) -> None:
        """Wait until all of it is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def new_tar(file: HashingFile) -> tarfile.TarFile:
    """Return a tar that is written to a file."""
    return tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]


def tar_header(name: str, size: int) -> tarfile.TarInfo:
    """Return the header of a member, which depends on its name and size alone: read-only, from
    1970."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "dnt", "dnt"
    return info


def padded(size: int) -> int:
    """Return how many bytes of a tar a member of `size` bytes fills, its header aside."""
    return size + -size % TAR_BLOCK


def shard_name(split: str, number: int) -> str:
    """Return the file name of a split's n-th tar."""
    return f"{split}-{number:06d}.tar"


def file_problem(path: Path, size: int) -> str | None:
    """Return what is wrong with a file of a set, seen from outside: missing or not of `size` bytes;
    else None."""
    if not path.is_file():
        return f"{path}: missing; copy the set again or prepare it again"
    if (found := path.stat().st_size) != size:
        kind = "truncated" if found < size else "altered"
        return (
            f"{path}: {kind}, {found} bytes where the manifest says {size}; copy or prepare the "
            "set again"
        )
    return None


def link_file(source: Path, target: Path) -> None:
    """Give a file another name too, or copy it where the file system has no links."""
    if target.exists():
        return
    try:
        os.link(source.resolve(), target)  # behind a symbolic link lies the file
    except OSError:
        write_whole(target, lambda beside: shutil.copyfile(source, beside))


def write_manifest(folder: Path, manifest: SetModel) -> None:
    """Write manifest.json: the same bytes for the same manifest."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    # Lists of numbers and objects of plain values on one line each: a member is a line, not five.
    text = re.sub(
        r"\[[\d,\s]+\]|\{[^{}\[\]]*\}", lambda found: re.sub(r"\n\s*", " ", found[0]), text
    )
    with Path(folder, MANIFEST).open("wb") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def manifest_sha256(folder: Path) -> str:
    """Return the hex SHA-256 of the manifest file: the identity of a prepared set. Raises
    ValueError if it is not there."""
    return hashlib.sha256(_manifest_bytes(Path(folder), *MADE_BY.values())).hexdigest()


def format_of(folder: Path) -> str | None:
    """Return the format that a folder's manifest names, such as "dnt-images"; None where there is
    none that can be read."""
    try:
        value = json.loads(Path(folder, MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    found = value.get("format") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def read_manifest_as(
    model: type[AnyManifest], folder: Path, format_name: str, version: int
) -> AnyManifest:
    """Read a manifest of this format by itself, without a look at the files beside it.

    Raises ValueError naming the file: no such folder, no manifest, a truncated or altered one,
    another format or version.
    """
    path = folder / MANIFEST
    raw = _manifest_bytes(folder, MADE_BY[format_name])
    try:
        value = json.loads(raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: truncated or damaged ({error}); copy the set again or prepare it again"
        ) from error
    found = (value.get("format"), value.get("version")) if isinstance(value, dict) else (None, None)
    if found != (format_name, version):
        advice = "prepare the set again with this release"
        if found[0] != format_name and found[0] in MADE_BY:
            advice = (
                f"this set is made by `{MADE_BY[found[0]]}`, give one made by "
                f"`{MADE_BY[format_name]}`"
            )
        raise ValueError(
            f"{path}: found format {found[0]!r} version {found[1]!r}, expected {format_name!r} "
            f"version {version}; {advice}"
        )
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = problems_of(error)[0]
        where = ".".join(first.field)
        given = f" (found {first.found!r:.60})" if where else ""
        raise ValueError(
            f"{path}: {f'{where}: ' if where else ''}{first.message}{given}; copy the set again or "
            "prepare it again"
        ) from error


def check_equal(what: str, found: object, expected: object) -> None:
    """Raise ValueError where a number of a manifest is not what others say."""
    if found != expected:
        raise ValueError(f"{what} is {found}, expected {expected}")


def _manifest_bytes(folder: Path, *makers: str) -> bytes:
    path = folder / MANIFEST
    made_by = " or ".join(f"`{maker}`" for maker in makers)
    try:
        return path.read_bytes()
    except OSError as error:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected one made by {made_by}") from error
        reason = "no manifest here" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path}: {reason}; expected a folder made by {made_by}") from error

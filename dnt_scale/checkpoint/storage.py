"""Where checkpoints lie: a local folder, or an fsspec URL such as s3://bucket/run."""

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from dnt_scale.distributed.errors import AgreedError, AgreedFault


class CheckpointError(AgreedError):
    """A checkpoint cannot be written or read; every rank raises it. The message names it and
    says what to do.
    """


class CheckpointFault(AgreedFault, CheckpointError):
    """The same of a disk or a file server that fails: another try may go well."""


def is_url(path: Path | str) -> bool:
    return isinstance(path, str) and "://" in path


class _Remote:
    """An fsspec file whose faults are OSErrors, whatever class its file system gives them."""

    def __init__(self, file: Any, folder: object) -> None:
        self._file, self._folder = file, folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)

        def guarded(*arguments: Any) -> Any:
            with _as_os_errors(self._folder):
                return found(*arguments)

        return guarded


@contextlib.contextmanager
def _as_os_errors(folder: object) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every remote file system has its own classes
        found = OSError(f"{folder}: {type(error).__name__} {error}".strip())
        found.errno = errno.EREMOTEIO
        raise found from error


File = io.FileIO | _Remote


class Storage:
    """A folder, here or at a URL, and the few things done with one.

    Methods raise OSError, FileNotFoundError where a name is not there, as local files do; a remote
    file system's own exceptions become OSError.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises CheckpointError for a URL whose file system is unknown or not installed."""
        self.path: Path | str = str(path).rstrip("/") if is_url(path) else Path(path)
        self._fs: Any = None
        self._root = str(path)
        if is_url(path):
            self._fs, self._root = _file_system(str(path))

    @property
    def local(self) -> Path | None:
        """The folder, if it is here and not at a URL."""
        return self.path if isinstance(self.path, Path) else None

    def __truediv__(self, name: str) -> Self:
        return type(self)(f"{self.path}/{name}" if is_url(self.path) else Path(self.path, name))

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """Sorted names of what the folder holds; none if there is no folder."""
        if self._fs is None:
            return (
                sorted(path.name for path in Path(self._root).iterdir())
                if Path(self._root).is_dir()
                else []
            )
        with _as_os_errors(self):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def size(self, name: str) -> int:
        if self._fs is None:
            return Path(self._root, name).stat().st_size
        with _as_os_errors(self):
            return int(self._fs.info(self._inside(name))["size"])

    def read(self, name: str) -> bytes:
        """A small file's contents."""
        with self.open(name) as file:
            return file.read()

    def holds(self, name: str) -> bool:
        """Whether there is such a file."""
        if self._fs is None:
            return Path(self._root, name).is_file()
        with _as_os_errors(self):
            self._fs.invalidate_cache()
            return bool(self._fs.isfile(self._inside(name)))

    def is_folder(self, name: str) -> bool:
        """Whether ``name`` may be a folder of its own: no file, no link. At a URL all names may."""
        return self._fs is not None or (
            Path(self._root, name).is_dir() and not Path(self._root, name).is_symlink()
        )

    def open(self, name: str) -> File:
        """A file to be read from any place; at a URL each read fetches just what it asks for."""
        if self._fs is None:
            return Path(self._root, name).open("rb", buffering=0)
        with _as_os_errors(self):
            return _Remote(self._fs.open(self._inside(name), "rb", cache_type="none"), self)

    def create(self, name: str) -> File:
        """A new file to be written from front to end; ``finish`` makes it durable."""
        if self._fs is None:
            return Path(self._root, name).open("wb", buffering=0)
        with _as_os_errors(self):
            return _Remote(self._fs.open(self._inside(name), "wb"), self)

    def make(self) -> None:
        if self._fs is None:
            Path(self._root).mkdir(parents=True, exist_ok=True)
        else:
            with _as_os_errors(self):
                self._fs.makedirs(self._root, exist_ok=True)

    def probe(self) -> None:
        """Make the folder, and write and remove a file in it, to find whether that can be done."""
        self.make()
        with self.create(".probe") as file:
            write_all(file, memoryview(b"may be removed"))
            finish(file)
        self.remove(".probe")

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        if self._fs is None:
            Path(self._root, name).unlink(missing_ok=True)
        elif self.holds(name):
            with _as_os_errors(self):
                self._fs.rm_file(self._inside(name))

    def remove_all(self) -> None:
        """Remove the folder and what is in it; at a URL ``state.json`` first, so that what is
        left is no checkpoint.
        """
        if self._fs is None:
            shutil.rmtree(self._root, ignore_errors=True)
            return
        self.remove("state.json")
        with _as_os_errors(self), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def _inside(self, name: str) -> str:
        return f"{self._root}/{name}"


def finish(file: File) -> None:
    """Make a file of ``create`` durable and close it."""
    if not isinstance(file, _Remote):
        os.fsync(file.fileno())
    file.close()


def fsync_folder(path: Path) -> None:
    """Make the names in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: File, data: memoryview) -> None:
    """Write every byte: an unbuffered file may take less at a time."""
    while data:
        written = file.write(data)
        data = data[written:]


def fill(file: File, data: memoryview) -> bool:
    """Read until ``data`` is full; False if the file ends before."""
    while data:
        count = file.readinto(data)
        if not count:
            return False
        data = data[count:]
    return True


def forget(file: File) -> None:
    """Drop what the page cache holds of a durable file, so that the next read is of the disk."""
    if not isinstance(file, _Remote) and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = urlsplit(url).scheme
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        raise CheckpointError(
            f"{url}: {protocol}:// needs a package that is not here; pip install {package}"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{url}: {error}; expected a folder, s3://, gs:// or another of fsspec's"
        ) from error
    return fs, str(path).rstrip("/")

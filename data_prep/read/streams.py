"""The bytes of one input file, here or at a URL, unpacked and streamed; damage is always an error."""

import bz2
import contextlib
import gzip
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import zstandard

PACKED = (".gz", ".zst", ".bz2", ".xz")
CHUNK = 1 << 18
# zstd can turn 4 bytes into 128 KiB, and its decoder gives back all that it can: it gets little at a time.
ZSTD_CHUNK = 1 << 12
ZSTD_LITTLE = 1 << 8
# Some published dumps were packed with `zstd --long=31`; only they take that much memory.
ZSTD_WINDOW = 1 << 31

Kind = Literal["text", "jsonl", "parquet"]


class File(NamedTuple):
    """One input file.

    name: what a person sees, below the INPUT ("books/a.txt"), printable; never the way to the INPUT.
    path: what is opened, a local path or a URL.
    size: bytes as stored, 0 if a server does not tell.
    stamp: changes when the file does: the time of its last change, or what the server gives as ETag or the like.
    """

    name: str
    path: str
    kind: Kind
    size: int
    stamp: str


class Stored:
    """A file as it is stored, to be read; `position` is the number of bytes read or skipped so far.

    Raises ValueError naming the file if it cannot be read or is not as long as it was.
    """

    def __init__(self, file: File, start: int = 0):
        self._file = file
        self.position = start
        with self._errors():
            self.raw = open_file(file.path)
            if start:
                self.raw.seek(start)

    def read(self, size: int = -1) -> bytes:
        with self._errors():
            data: bytes = self.raw.read(size)
        self.position += len(data)
        if not data and size and self._file.size and self.position != self._file.size:
            raise ValueError(
                f"{self._file.path}: found {self.position:,} bytes, expected {self._file.size:,}: it was changed while "
                "it was read, or the connection broke; run the command again"
            )
        return data

    def close(self) -> None:
        self.raw.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every remote file system has its own classes
            why = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
            raise ValueError(f"{self._file.path}: cannot be read: {why}; check the file, then run again") from error


def is_url(path: str) -> bool:
    """Whether a path is one that fsspec opens, such as s3://bucket/file."""
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises ValueError if there is none for it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = urlsplit(url).scheme
    options = {}
    if protocol in ("http", "https"):
        import aiohttp

        # The default ends a download after five minutes.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=300)}
    try:
        fs, path = url_to_fs(url, **options)
        return fs, path
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        raise ValueError(f"{url}: {protocol}:// needs a package that is not here; pip install {package}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; expected a path, s3://, gs://, https:// or another of fsspec's") from error


def open_file(path: str) -> Any:
    """A file opened for reading bytes; one from a web server can only be read from its beginning."""
    if not is_url(path):
        return Path(path).open("rb", buffering=0)
    fs, inside = file_system(path)
    return fs.open(inside, "rb", **({"block_size": 0} if is_http(path) else {}))


@contextlib.contextmanager
def seekable(file: File) -> Iterator[IO[bytes]]:
    """A file opened for reading from any place. One at a URL is copied to a temporary file, as not every server can do
    that. Raises ValueError if it cannot be read."""
    with contextlib.closing(Stored(file)) as stored:
        if not is_url(file.path):
            yield stored.raw
            return
        with tempfile.TemporaryFile() as copy:
            while data := stored.read(CHUNK):
                copy.write(data)
            copy.seek(0)
            yield copy


def is_http(path: str) -> bool:
    """Whether a path is a URL of a web server."""
    return urlsplit(path).scheme in ("http", "https") if is_url(path) else False


def unpacked(file: File, stored: Stored) -> Iterator[bytes]:
    """The bytes of a file in chunks that are never empty, after decompression by the file's suffix (.gz .zst .bz2 .xz,
    of any number of members).

    Raises ValueError naming the file for an archive that is damaged or cut short, and how far it was good.
    """
    good = 0
    try:
        for chunk in _UNPACKERS.get(packing(file.name), _plain)(stored):
            if chunk:
                good += len(chunk)
                yield chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise ValueError(
            f"{file.path}: damaged after {good:,} unpacked bytes: {error}; "
            f"expected a whole {packing(file.name)} file, make it again"
        ) from error


def packing(name: str) -> str:
    """The suffix that tells how a file is compressed, or ""."""
    return next((suffix for suffix in PACKED if name.lower().endswith(suffix)), "")


def _plain(stored: Stored) -> Iterator[bytes]:
    return iter(lambda: stored.read(CHUNK), b"")


def _gzip(stored: Stored) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stored) as unzipped:  # type: ignore[call-overload]  # which asks for more than it uses
        yield from iter(lambda: unzipped.read(CHUNK), b"")


def _members(
    new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: bytes
) -> Callable[[Stored], Iterator[bytes]]:
    # The library's own file classes take what follows the last whole member for padding, whatever it is.
    def unpack(stored: Stored) -> Iterator[bytes]:
        while data := stored.read(CHUNK):
            while data := data.lstrip(padding):
                decoder = new()
                while not decoder.eof:
                    if decoder.needs_input and not (data := data or stored.read(CHUNK)):
                        raise EOFError("the last member is cut short")
                    yield decoder.decompress(data, CHUNK)
                    data = b""
                data = decoder.unused_data

    return unpack


def _zstd(stored: Stored) -> Iterator[bytes]:
    # Frame by frame: the library's own stream_reader takes a truncated file for a short one.
    frame, size = None, ZSTD_LITTLE
    while chunk := stored.read(size):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            data = frame.decompress(chunk)
            size = ZSTD_CHUNK if len(data) < 4 * CHUNK else ZSTD_LITTLE
            yield data
            chunk = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last frame is cut short")


_UNPACKERS: dict[str, Callable[[Stored], Iterator[bytes]]] = {
    ".gz": _gzip,
    ".zst": _zstd,
    ".bz2": _members(bz2.BZ2Decompressor, b""),
    ".xz": _members(lzma.LZMADecompressor, b"\0"),
}

"""The bytes of one input file, here or at a URL, unpacked and streamed; damage is always an
error."""

import bz2
import contextlib
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import zstandard

PACKED = (".gz", ".zst", ".bz2", ".xz")
CHUNK = 1 << 18
# A decoder gets little at a time: zstd can turn 4 bytes into 128 KiB and gives back all that it
# can, and of what holds the damage nothing comes back. At the beginning still less, so that the
# place of damage is true in a small file too.
LITTLE = 1 << 8
SLICE = 1 << 12
# More than this after the last whole member is no signature, line end or padding of a tape.
TRAILING_BYTES = 1 << 16
# Some published dumps were packed with `zstd --long=31`; only they take that much memory.
ZSTD_WINDOW = 1 << 31


class File(NamedTuple):
    """One input file.

    name: what a person sees, below the INPUT ("books/a.txt"), printable; never the way to the
    INPUT.
    path: what is opened, a local path or a URL.
    kind: "text", "jsonl", "json" (JSON lines or other JSON, whose content decides), or one of
        data_prep.read.formats.ROW_FORMATS.
    size: bytes as stored, 0 if a server does not tell.
    stamp: changes when the file does: the time of its last change, or what the server gives as ETag
    or the like.
    """

    name: str
    path: str
    kind: str
    size: int
    stamp: str


class Stored:
    """A file as it is stored, to be read; `position` is the number of bytes read or skipped so far,
    `trailing` how many were found after the last whole member of an archive.

    Raises ValueError naming the file if it cannot be read or is not as long as it was.
    """

    def __init__(self, file: File, start: int = 0):
        self._file = file
        self.position = start
        self.trailing = 0
        self._ahead = b""
        with self._errors():
            self.raw = open_file(file.path)
            if start:
                self.raw.seek(start)

    def peek(self, size: int) -> bytes:
        """Return the next bytes, up to `size`, which the next `read` gives too."""
        while len(self._ahead) < size and (more := self._read(size - len(self._ahead))):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, none at the end only."""
        data, self._ahead = self._ahead, b""
        data = data or self._read(size)
        self.position += len(data)
        if not data and size and self._file.size and self.position != self._file.size:
            raise ValueError(
                f"{self._file.path}: found {self.position:,} bytes, expected {self._file.size:,}: "
                "it was changed while it was read, or the connection broke; run the command again"
            )
        return data

    def close(self) -> None:
        """Close the file."""
        self.raw.close()

    def _read(self, size: int) -> bytes:
        with self._errors():
            data: bytes = self.raw.read(size)
        return data

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every remote file system has its own classes
            why = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
            raise ValueError(
                f"{self._file.path}: cannot be read: {why}; check the file, then run again"
            ) from error


def is_url(path: str) -> bool:
    """Whether a path is one that fsspec opens, such as s3://bucket/file."""
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it. Raises ValueError if there is
    none for it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = urlsplit(url).scheme
    options = {}
    if protocol in ("http", "https"):
        import aiohttp

        # The default ends a download after five minutes.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=300)
        }
    try:
        fs, path = url_to_fs(url, **options)
        return fs, path
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        raise ValueError(
            f"{url}: {protocol}:// needs a package that is not here; pip install {package}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url}: {error}; expected a path, s3://, gs://, https:// or another of fsspec's"
        ) from error


def open_file(path: str) -> Any:
    """Open a file for reading bytes; one from a web server can only be read from its beginning."""
    if not is_url(path):
        return Path(path).open("rb", buffering=0)
    fs, inside = file_system(path)
    return fs.open(inside, "rb", **({"block_size": 0} if is_http(path) else {}))


@contextlib.contextmanager
def seekable(file: File) -> Iterator[IO[bytes]]:
    """Open a file for reading from any place. One at a URL is copied to a temporary file, as not
    every server can do that. Raises ValueError if it cannot be read."""
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
    """Yield the bytes of a file in chunks that are never empty, after decompression by the file's
    suffix (.gz .zst .bz2 .xz, of any number of members).

    What follows the last whole member and begins none is counted in `stored.trailing`, up to
    TRAILING_BYTES. Raises ValueError naming the file for an archive that is damaged or cut short,
    and how far it was good.
    """
    archive = _ARCHIVES.get(packing(file.name))
    if archive is None:
        yield from iter(lambda: stored.read(CHUNK), b"")
        return
    good, members = 0, _Members(archive, stored)
    try:
        for chunk in members:
            if chunk:
                good += len(chunk)
                yield chunk
    except _DAMAGE as error:
        raise ValueError(
            f"{file.path}: damaged after {good:,} unpacked bytes: {error}, at byte "
            f"{members.position:,} or a little before; expected a whole {packing(file.name)} file, "
            "make it again"
        ) from error


def packing(name: str) -> str:
    """Return the suffix that tells how a file is compressed, or ""."""
    return next((suffix for suffix in PACKED if name.lower().endswith(suffix)), "")


_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _Decoder(Protocol):
    """Unpacks one member, as those of bz2 and lzma: no more than `limit` bytes at a time, the rest
    when asked again.

    `eof` once the member is whole; then `unused_data` is what follows it.
    """

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, limit: int, /) -> bytes: ...


class _Gzip:
    """zlib's decoder of a gzip member."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    def decompress(self, data: bytes, limit: int, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, limit)


class _Zstd:
    """zstd's decoder of a frame, which knows no limit: it is given little."""

    needs_input = True

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data

    def decompress(self, data: bytes, limit: int, /) -> bytes:
        return self._zstd.decompress(data)


class _Archive(NamedTuple):
    """How a kind of compressed file is read: what unpacks a member, what each begins with, what
    else may stand there, and what pads members."""

    new: Callable[[], _Decoder]
    magic: bytes
    other: re.Pattern[bytes] | None = None
    padding: bytes = b""

    def begins(self, data: bytes) -> bool:
        """Whether a member begins here, perhaps one that is cut short within its first bytes."""
        return data[: len(self.magic)] == self.magic[: len(data)] or bool(
            self.other and self.other.match(data)
        )


# The second are skippable frames.
# The second are those of .lzma.
_ARCHIVES = {
    ".gz": _Archive(_Gzip, b"\x1f\x8b\x08", padding=b"\0"),
    ".zst": _Archive(_Zstd, b"\x28\xb5\x2f\xfd", re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")),
    ".bz2": _Archive(bz2.BZ2Decompressor, b"BZh"),
    ".xz": _Archive(lzma.LZMADecompressor, b"\xfd7zXZ\0", re.compile(rb"\x5d\0\0"), padding=b"\0"),
}


class _Members:
    """The unpacked bytes of all members of an archive, in chunks; `position` is how much of the
    file was unpacked.

    The libraries' own file classes take what follows the last whole member for padding, whatever it
    is; zstd's takes a truncated file for a short one.
    """

    def __init__(self, archive: _Archive, stored: Stored):
        self.position = 0
        self._archive = archive
        self._stored = stored
        self._held, self._at = b"", 0

    def __iter__(self) -> Iterator[bytes]:
        whole = 0
        while first := self._next(len(self._archive.magic)):
            if whole and self._archive.padding == first[:1]:
                self._skip(len(first) - len(first.lstrip(self._archive.padding)))
            elif self._archive.begins(first):
                yield from self._member()
                whole += 1
            elif whole:
                self._stored.trailing = self._trailing()
                return
            else:
                raise OSError(f"no member begins with {first!r}")

    def _member(self) -> Iterator[bytes]:
        decoder, unpacked = self._archive.new(), b""
        while not decoder.eof:
            data = b""
            if decoder.needs_input:
                size = (
                    LITTLE
                    if len(unpacked) > CHUNK
                    else min(SLICE, max(LITTLE, self.position // 16))
                )
                if not (data := self._next(size)):
                    raise EOFError("the last member is cut short")
                self._skip(len(data))
            unpacked = decoder.decompress(data, CHUNK)
            yield unpacked
        self._skip(-len(decoder.unused_data))

    def _trailing(self) -> int:
        """Return how many bytes follow the last whole member. Raises OSError where they are one
        that is damaged, or hold one."""
        rest, magic = self._next(TRAILING_BYTES + 1), self._archive.magic
        if len(rest) > TRAILING_BYTES or magic in rest or self._unpacks(magic + rest[len(magic) :]):
            raise OSError(f"no member begins with {rest[: len(magic)]!r}")
        return len(rest)

    def _unpacks(self, data: bytes) -> bool:
        try:
            decoder = self._archive.new()
            return bool(decoder.decompress(data, CHUNK)) or decoder.eof
        except _DAMAGE:
            return False

    def _next(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end."""
        while len(self._held) - self._at < size and (more := self._stored.read(CHUNK)):
            # What was taken last stays: a decoder may give it back.
            before = max(0, self._at - SLICE)
            self._held, self._at = self._held[before:] + more, self._at - before
        return self._held[self._at : self._at + size]

    def _skip(self, size: int) -> None:
        self._at += size
        self.position += size

"""The work folder of a set in the making: what is finished stays through kill -9, and the next run
finds it.

Everything in it is named by a key, a hash of all that decides its content, and is renamed into
place when it is whole. So there is no log to replay: what exists under the right name is done, and
anything else is made.
"""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep import shards
from data_prep.files import file_lock, free_bytes, sync
from data_prep.shards import PARTIAL

OUR_FILES = re.compile(
    r"(train|val)-\d{6,}\.(tar|idx\.npy)|tokenizer\.model|fingerprints\.npy|report\.(html|json)|rejects\.jsonl"
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def key(*parts: Any) -> str:
    """Return a name for what depends on `parts` (anything JSON can hold) and on nothing else."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextlib.contextmanager
def work_folder(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Make and lock the work folder in `out`: alone, or `shared` by the tasks of one plan. It is
    kept if the block fails, unless it holds nothing.

    Raises ValueError if `out` is a file, holds a set or another program's files, is in use, or
    cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder or a new name; choose another --out")
    _refuse_a_set(out)
    partial = out / PARTIAL
    if (ours := our_files(out)) and not partial.exists():
        raise ValueError(
            f"{out}: holds {ours[0].name} but no {shards.MANIFEST}; move it away or choose another "
            "--out"
        )
    created = not out.exists()
    try:
        with contextlib.ExitStack() as stack:
            try:
                partial.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(partial / "lock", shared=shared))
            except BlockingIOError as error:
                raise ValueError(
                    f"{out}: another process is preparing a set here, or a task of it still runs; "
                    "wait for it, or choose another --out"
                ) from error
            _refuse_a_set(out)  # another run may have ended between the first look and the lock
            try:
                yield partial
            finally:
                # Another task may be about to write there.
                if not shared and not any(
                    path.is_file() and path.name != "lock" for path in partial.rglob("*")
                ):
                    shutil.rmtree(partial, ignore_errors=True)
                    if created:
                        with contextlib.suppress(OSError):
                            out.rmdir()
    except OSError as error:
        kept = (
            f" Finished parts are kept in {partial}: the same command goes on from them."
            if partial.is_dir()
            else ""
        )
        if error.errno not in DISK_FULL:
            raise ValueError(
                f"{error.filename or out}: cannot be read or written: {error.strerror or error}; "
                f"check the path, then run again.{kept}"
            ) from error
        raise ValueError(
            f"{out}: the disk is full or a limit is reached ({error.strerror}; {free_bytes(out):,} "
            f"bytes free); free some space or choose another --out.{kept}"
        ) from error


def publish(out: Path, files: Iterable[Path], manifest: Path) -> None:
    """Put finished files into `out`, the manifest last, and remove the work folder.

    Linked, not moved, where the file system can: a kill in between leaves the work whole and the
    next run begins here.
    """
    for path in our_files(out):
        path.unlink()
    for path in files:
        try:
            os.link(path, out / path.name)
        except OSError:
            shutil.move(path, out / path.name)
    sync(out)
    manifest.rename(out / shards.MANIFEST)
    sync(out)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def spool_stdin(work: Path) -> Path:
    """Write standard input to a file of the work folder, named by its content: .jsonl if it begins
    with "{", else .txt."""
    digest, first = hashlib.sha256(), b""
    spool = work / "stdin.tmp"
    with spool.open("wb") as file:
        while block := sys.stdin.buffer.read(1 << 20):
            first = first or block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            digest.update(block)
            file.write(block)
    path = work / f"stdin-{digest.hexdigest()[:12]}.{'jsonl' if first == b'{' else 'txt'}"
    spool.rename(path)
    os.utime(path, (0, 0))  # the same content gives the same plan
    return path


def our_files(out: Path) -> list[Path]:
    """Return what an earlier run may have put into `out`."""
    return (
        sorted(path for path in out.iterdir() if OUR_FILES.fullmatch(path.name))
        if out.is_dir()
        else []
    )


def _refuse_a_set(out: Path) -> None:
    if (out / shards.MANIFEST).exists():
        # A run that was killed right after its manifest has left it.
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        raise ValueError(
            f"{out}: already holds a prepared set; choose another --out, or delete that one first"
        )

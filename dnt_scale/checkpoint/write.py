"""Saving: copy what this rank owns, write it while training goes on, then let all ranks agree that
it is whole.

    save()    main thread    an earlier save is committed; this rank's parts are copied into host
                             memory; the thread starts
    (writer)  this rank's    writes and hashes, fsyncs, reads back what is on disk and compares
    commit()  main thread    all ranks tell each other how it went; rank 0 writes state.json and
                             renames the folder

At a URL there is no rename: the files come first, and state.json last makes them a checkpoint.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dnt_scale.checkpoint.read import complete
from dnt_scale.checkpoint.safetensors_header import make_header
from dnt_scale.checkpoint.state import FileRecord, State, step_name, step_of
from dnt_scale.checkpoint.storage import (
    CheckpointError,
    CheckpointFault,
    Storage,
    fill,
    finish,
    forget,
    fsync_folder,
    write_all,
)
from dnt_scale.checkpoint.tensor_shards import TensorShard, shard_to_write
from dnt_scale.distributed.agree import on_first
from dnt_scale.distributed.errors import AgreedError, is_fault
from dnt_scale.distributed.heartbeat import moving
from dnt_scale.distributed.process_group import Ranks

CHUNK = 1 << 23  # bytes written, hashed or compared at a time
LOOK_S = 0.1  # between two looks at a writer that is waited for
NICENESS = 15  # of the writer: where all cores train, it gets some 3 % of one


class _Stopped(Exception):
    """The save is given up."""


@dataclass(frozen=True)
class _File:
    """A file to be written: its bytes, in two pieces of memory."""

    name: str
    head: memoryview
    data: memoryview

    def chunks(self) -> Iterator[memoryview]:
        for piece in (self.head, self.data):
            for begin in range(0, len(piece), CHUNK):
                yield piece[begin : begin + CHUNK]


class Saver:
    """Writes a run's checkpoints into ``folder``, which is here or at a URL.

    All ranks call ``save`` and ``commit`` together, on their main threads; the threads hold no
    collective.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints whose step is a multiple stay too.
        background: return from ``save`` when the copy is made, else when the checkpoint is in
            place.
        in_place: called on rank 0 with the step of each checkpoint that is in place now.
    """

    def __init__(
        self,
        folder: Path | str,
        ranks: Ranks,
        *,
        keep: int,
        keep_every: int | None = None,
        background: bool = True,
        in_place: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder = Storage(folder)
        self.ranks = ranks
        self.keep = keep
        self.keep_every = keep_every
        self.background = background
        self.in_place = in_place
        self.written: int | None = None  # step of the last one that is in place, of this saver's
        self.read_by_others: int | None = None  # step of one that is not removed meanwhile
        self._state: State | None = None  # of the save that is not committed
        self._buffer = torch.empty(0, dtype=torch.uint8)  # reused: the next save needs as much
        self._files: list[_File] = []
        self._writer: threading.Thread | None = None
        self._cleaner: threading.Thread | None = None
        self._outcome: dict[str, FileRecord] | CheckpointError = {}
        self._done = 0  # bytes written and read back
        self._stop = threading.Event()

    @property
    def busy(self) -> bool:
        """This rank's thread is at work."""
        return self._writer is not None and self._writer.is_alive()

    @property
    def pending(self) -> bool:
        """A save is not committed; the same on all ranks."""
        return self._state is not None

    def save(self, state: State, shards: Sequence[TensorShard]) -> None:
        """Begin to write a checkpoint of ``state.step``; with ``background`` False, end it too. A
        collective.

        Raises:
            CheckpointError: on every rank, when it or the save before it could not be written.
        """
        self.commit(wait=True)
        self._state = state
        try:
            on_first(self.ranks, self._fresh)
        except AgreedError as error:
            self._state = None
            raise CheckpointError(str(error)) from None
        self._files = self.stage(shards)
        self._writer = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._writer.start()
        if not self.background:
            self.commit(wait=True)

    def commit(self, *, wait: bool = False) -> Path | str | None:
        """Agree that all ranks have written, and put the checkpoint in place; its path, or None
        without one. A collective, to be called when no rank is busy.

        Args:
            wait: until the threads have written and read back.

        Raises:
            CheckpointError: on every rank, when any could not write, and nothing partial is left;
                or the checkpoint is in place, and an older one could not be removed.
        """
        if self._state is None:
            return None
        assert wait or not self.busy
        self._wait()
        outcomes: list[dict[str, FileRecord] | CheckpointError] = [
            {} for _ in range(self.ranks.world_size)
        ]
        dist.all_gather_object(outcomes, self._outcome)
        state, self._state = self._state, None
        try:
            records: dict[str, FileRecord] = {}
            for outcome in outcomes:
                if isinstance(outcome, CheckpointError):
                    raise outcome
                records |= outcome
            whole = state.model_copy(update={"files": records})
            on_first(self.ranks, lambda: self._publish(whole))
            self.written = state.step
        except AgreedError as error:
            with contextlib.suppress(AgreedError):
                on_first(self.ranks, self._partial(state).remove_all)
            raise CheckpointError(str(error)) from None
        try:
            on_first(self.ranks, lambda: self._retire(state.step))
        except AgreedError as error:
            raise CheckpointError(str(error)) from None
        return (self.folder / step_name(state.step)).path

    def _wait(self) -> None:
        """For the thread; as long as it gets on, so does the main thread in the watchdog's eyes."""
        assert self._writer is not None
        before = self._done
        while self._writer.is_alive():
            self._writer.join(LOOK_S)
            if self._done != before:
                before = self._done
                moving()

    def close(self) -> None:
        """Stop the thread and remove what this rank wrote of an uncommitted save. No collective:
        errors end here too.
        """
        self._stop.set()
        if self._writer:
            self._writer.join()
        if self._cleaner:
            self._cleaner.join()
        if self._state is None:
            return
        partial = self._partial(self._state)
        with contextlib.suppress(OSError):
            for file in self._files:
                partial.remove(file.name)
            if partial.local:
                partial.local.rmdir()  # the last rank to end finds it empty

    def _partial(self, state: State) -> Storage:
        name = step_name(state.step)
        return self.folder / (f".partial-{name}" if self.folder.local else name)

    def _fresh(self) -> None:
        """Make the folder to write into, and remove what killed saves have left."""
        if self._cleaner:
            self._cleaner.join()
        assert self._state is not None
        partial = self._partial(self._state)
        try:
            if self.folder.local:
                for leftover in self.folder.local.glob(".*-step-*"):
                    # whatever else has such a name is not ours
                    if leftover.is_dir() and not leftover.is_symlink():
                        shutil.rmtree(leftover)
            else:
                whole = complete(self.folder).keys() - {self._state.step}
                for name in self.folder.names():
                    if step_of(name) not in {None, *whole}:
                        (self.folder / name).remove_all()
            partial.make()
        except OSError as error:
            raise CheckpointError(_explain(error, partial)) from None

    def stage(self, shards: Sequence[TensorShard]) -> list[_File]:
        """What this rank writes, copied into host memory as its files will have it."""
        parts = [part for part in map(shard_to_write, shards) if part is not None]
        # the largest shard of a tensor goes into the first file, more of them into a second and
        # third; and where elements have 4 bytes before those of 2, all are aligned
        parts.sort(key=lambda part: part.data.numel(), reverse=True)
        numbers: dict[str, Iterator[int]] = {}
        groups: dict[int, list[TensorShard]] = {}
        for part in parts:
            groups.setdefault(next(numbers.setdefault(part.name, count())), []).append(part)
        order = {shard.name: place for place, shard in enumerate(shards)}
        for group in groups.values():
            group.sort(key=lambda part: (-part.data.itemsize, order[part.name]))

        sizes = [sum(part.data.nbytes for part in group) for group in groups.values()]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // 64) * 64)
        if len(self._buffer) < starts[-1]:
            self._buffer = torch.empty(
                starts[-1], dtype=torch.uint8, pin_memory=self.ranks.device.type == "cuda"
            )
        files = []
        for number, (group, start, size) in enumerate(
            zip(groups.values(), starts, sizes, strict=False), 1
        ):
            place = start
            for part in group:
                target = (
                    self._buffer[place : place + part.data.nbytes]
                    .view(part.data.dtype)
                    .view(part.data.shape)
                )
                target.copy_(part.data.detach(), non_blocking=True)
                place += part.data.nbytes
            head = make_header([(part.name, part.data.dtype, part.region) for part in group])
            counted = f"{number:05d}-of-{len(groups):05d}"
            name = f"shard-{self.ranks.rank + 1:05d}-model-{counted}.safetensors"
            files.append(_File(name, memoryview(head), _bytes(self._buffer[start : start + size])))
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return files

    def _work(self) -> None:
        """The thread: write, hash, fsync, then compare. ``_outcome`` is the files' records, or
        what went wrong.
        """
        assert self._state is not None
        partial = self._partial(self._state)
        if self.background and sys.platform == "linux":
            os.nice(NICENESS)  # Linux's is of this thread and those it starts
        try:
            records = {
                file.name: write_file(partial, file.name, self._unstopped(file.chunks()))
                for file in self._files
            }
            for file in self._files:
                self._read_back(partial, file)
            self._outcome = records
        except Exception as error:  # told by commit, on the main thread
            kind = CheckpointFault if is_fault(error) else CheckpointError
            self._outcome = kind(_explain(error, partial, f" on rank {self.ranks.rank}"))

    def _unstopped(self, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        for chunk in chunks:
            if self._stop.is_set():
                raise _Stopped
            yield chunk
            self._done += len(chunk)

    def _read_back(self, partial: Storage, file: _File) -> None:
        found = np.empty(CHUNK, dtype=np.uint8)
        with partial.open(file.name) as stream:
            forget(stream)
            for expected in self._unstopped(file.chunks()):
                part = found[: len(expected)]
                # numpy compares without the interpreter's lock
                if not fill(stream, part.data) or not np.array_equal(
                    part, np.frombuffer(expected, np.uint8)
                ):
                    raise OSError(errno.EIO, "what is on disk is not what was written")
            forget(stream)

    def _publish(self, state: State) -> None:
        partial = self._partial(state)
        try:
            publish(partial, self.folder / step_name(state.step), state)
            self.in_place(state.step)
        except OSError as error:
            raise CheckpointError(_explain(error, partial)) from None

    def _retire(self, newest: int) -> None:
        """Take old checkpoints away; their bytes go in a thread, for that takes a file system a
        while.
        """
        try:
            steps = [step for step in complete(self.folder) if step <= newest]
            doomed = [
                self.folder / step_name(step)
                for step in steps[: -self.keep]
                if (not self.keep_every or step % self.keep_every) and step != self.read_by_others
            ]
            for old in doomed:
                if old.local:
                    old.local.rename(old.local.with_name(f".old-{old.local.name}"))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / step_name(newest)}: is in place, but older checkpoints could not "
                f"be removed: {error}; mend that, or set checkpoint.keep higher, and run the same "
                "command again"
            ) from None
        if self.folder.local:
            doomed = [Storage(path) for path in self.folder.local.glob(".old-step-*")]

        def clean() -> None:
            for old in doomed:
                with contextlib.suppress(OSError):  # the next save tries again
                    old.remove_all()

        self._cleaner = threading.Thread(target=clean, name="retention")
        self._cleaner.start()


def write_file(
    folder: Storage, name: str, chunks: Iterable[memoryview], *, reused: bool = False
) -> FileRecord:
    """Write a durable file and hash it, the hash in a thread of its own.

    Args:
        reused: a chunk's memory holds the next one when that is asked for.

    Raises:
        OSError: it could not be written.
    """
    digest, size = hashlib.sha256(), 0
    hasher = ThreadPoolExecutor(1)
    try:
        with folder.create(name) as file:
            for chunk in chunks:
                hashed = hasher.submit(digest.update, chunk)
                write_all(file, chunk)
                size += len(chunk)
                if reused:
                    hashed.result()
            finish(file)
        hasher.shutdown()  # waits
    finally:
        hasher.shutdown(cancel_futures=True)
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def publish(partial: Storage, final: Storage, state: State) -> None:
    """Write state.json beside the files it names, and put the folder in place: whole or not at all,
    crashes included.

    Raises:
        OSError: it could not be written.
    """
    text = json.dumps(state.model_dump(mode="json"), indent=2).encode()
    with partial.create("state.json") as file:
        write_all(file, memoryview(text))
        finish(file)
    if not (partial.local and final.local):
        return
    fsync_folder(partial.local)
    # a resumed run writes newer steps again
    if final.local.is_dir() and not final.local.is_symlink():
        final.local.rename(final.local.with_name(f".old-{final.local.name}"))
    elif os.path.lexists(final.local):  # somebody's file or link of that name
        final.local.rename(_free(final.local.with_name(f"{final.local.name}.not-a-checkpoint")))
    partial.local.rename(final.local)
    link = final.local.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(final.local.name)
    link.rename(final.local.with_name("latest"))
    fsync_folder(final.local.parent)


def _free(path: Path) -> Path:
    """The path, or the first with a number after it that nothing has."""
    names = (path.with_name(f"{path.name}{(number and f'-{number}') or ''}") for number in count())
    return next(name for name in names if not os.path.lexists(name))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().data


def _explain(failure: Exception, path: Storage, where: str = "") -> str:
    if (
        isinstance(failure, OSError)
        and failure.errno in (errno.ENOSPC, errno.EDQUOT)
        and path.local
    ):
        free = shutil.disk_usage(path.local.parent).free
        return (
            f"{path}: disk full while saving{where} ({free / 1e6:.1f} MB free); the previous "
            "checkpoint is whole: free some space, or set checkpoint.keep=1, and run the same "
            "command again"
        )
    return f"{path}: could not be written{where}: {type(failure).__name__}: {failure}"

"""One canonical checkpoint, whoever wrote it, on however many ranks.

    checkpoints/step-00001000/
      shard-00001-model-00001-of-00001.safetensors   a rank's rows of every tensor, with their offsets
      state.json                                     where the run stands, and each file's size and sha256
    checkpoints/latest -> step-00001000

Tensors are fp32, keyed model.NAME, momentum_buffer.NAME (exp_avg.NAME and exp_avg_sq.NAME for AdamW), written
and resharded by torch.distributed.checkpoint in its safetensors form: there is no pickle to load. A checkpoint is
written into a hidden folder, fsynced and renamed, so that a crash leaves the previous one whole.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from dnt_scale.ranks import AgreedError, Ranks, on_first, together

FORMAT = "dnt-checkpoint"
VERSION = 1


class CheckpointError(AgreedError):
    """A checkpoint cannot be written or read; every rank raises it. The message names it and says what to do."""


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class State(BaseModel):
    """``state.json``: everything a resumed run needs beside the tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT
    version: int = VERSION
    step: int
    consumed_rows: int
    tokens: int
    skipped: int
    seed: int  # the run's only randomness: initial weights and data order are functions of it
    run_id: str
    manifest_sha256: str  # of a mixture, of what decides its rows
    sets: dict[str, str] = {}  # the manifests' sha256 by the sets' names; not in the checkpoints of old
    tokenizer_sha256: str
    world_size: int
    config: dict[str, object]
    files: dict[str, FileRecord]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write DTensors (every rank its shard) and plain tensors (one rank) as safetensors. A collective.

    Raises:
        CheckpointError: on every rank, when any rank could not write; names the reason.
    """
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        raise CheckpointError(_explain_write(failure, path, f" on rank {rank}")) from None


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint written on any number of ranks. A collective.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is not safetensors.
    """
    try:
        state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        reason = str(failure).splitlines()[0]
        raise CheckpointError(
            f"{path}: does not fit this model and optimizer ({reason}, on rank {rank}); "
            "resume with the configuration in the run's config.yaml"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: a shard is not readable as safetensors: {error}") from None


def write(folder: Path, state: State, save: Callable[[Path], None], ranks: Ranks, *, keep: int) -> Path:
    """Write ``folder``/step-N atomically, point ``latest`` at it, and remove all but the ``keep`` newest.

    Args:
        save: ``Engine.save``.

    Raises:
        CheckpointError: on every rank; the previous checkpoint is whole and nothing partial is left.
    """
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".partial-{final.name}"
    try:
        on_first(ranks, lambda: _explained(partial, lambda: _fresh(partial)))
        save(partial)
        # a rank's own files: another's may not be in this node's view of a shared folder yet
        own = f"shard-{ranks.rank + 1:05d}-*.safetensors"
        mine = together(ranks, lambda: {path.name: _record(path, sync=True) for path in sorted(partial.glob(own))})
        records: list[dict[str, FileRecord]] = [{} for _ in range(ranks.world_size)]
        dist.all_gather_object(records, mine)
        complete = state.model_copy(update={"files": {k: v for part in records for k, v in part.items()}})
        on_first(ranks, lambda: _explained(partial, lambda: _publish(partial, final, complete, keep)))
    except AgreedError as error:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(str(error)) from None
    return final


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in ``folder``, if any; partial ones do not count."""
    complete = [path for path in folder.glob("step-*") if (path / "state.json").is_file()]
    return max(complete, default=None, key=lambda path: path.name)


def read_state(path: Path) -> State:
    """``state.json`` of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, truncated, or of another format or version.
    """
    file = path / "state.json"
    advice = f"remove {path} to go on from an older checkpoint"
    try:
        state = State.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; expected a checkpoint folder step-NNNNNNNN") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "JSON"
        raise CheckpointError(f"{file}: damaged ({where}: {problem['msg']}); {advice}") from None
    if any(Path(name).name != name for name in state.files):
        raise CheckpointError(f"{file}: names a file outside its folder; {advice}")
    if (state.format, state.version) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{file}: is {state.format} version {state.version}, expected {FORMAT} version {VERSION}; {advice}"
        )
    return state


def check_files(path: Path, state: State, ranks: Ranks) -> None:
    """Compare every file with its recorded size and sha256, the files shared out over the ranks. A collective.

    Raises:
        CheckpointError: on every rank, naming the first file that is missing, truncated or changed.
    """
    found = {file.name for file in path.glob("*.safetensors")}
    mine = sorted(state.files.items())[ranks.rank :: ranks.world_size]

    def check() -> None:
        for name in sorted(found - state.files.keys()) if ranks.first else []:
            raise CheckpointError(f"{path / name}: not part of this checkpoint")
        for problem in filter(None, (_problem(path / name, record) for name, record in mine)):
            raise CheckpointError(problem)

    try:
        together(ranks, check)
    except AgreedError as error:
        raise CheckpointError(f"{error}; remove {path} to go on from an older checkpoint") from None


def _problem(file: Path, record: FileRecord) -> str | None:
    if not file.is_file():
        return f"{file}: missing"
    size = file.stat().st_size
    if size != record.bytes:
        return f"{file}: truncated or changed: {size} bytes, expected {record.bytes}"
    if _record(file, sync=False).sha256 != record.sha256:
        return f"{file}: damaged: its sha256 is not the recorded one"
    return None


def _record(file: Path, *, sync: bool) -> FileRecord:
    with file.open("rb") as stream:
        if sync:  # torch's writer calls fsync before its own buffer is flushed
            os.fsync(stream.fileno())
        return FileRecord(bytes=file.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def _fresh(partial: Path) -> None:
    for leftover in partial.parent.glob(".*-step-*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _publish(partial: Path, final: Path, state: State, keep: int) -> None:
    with (partial / "state.json").open("w") as stream:
        json.dump(state.model_dump(mode="json"), stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_folder(partial)
    if final.exists():  # a resumed run that lost its newer steps writes them again
        final.rename(final.with_name(f".old-{final.name}"))
    partial.rename(final)
    link = final.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.rename(final.with_name("latest"))
    fsync_folder(final.parent)
    complete = sorted(path for path in final.parent.glob("step-*") if path.name <= final.name)
    for path in complete[:-keep]:
        path.rename(path.with_name(f".old-{path.name}"))
    for path in final.parent.glob(".old-step-*"):
        shutil.rmtree(path)


def fsync_folder(path: Path) -> None:
    """Make the names in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(path: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise CheckpointError(_explain_write(error, path, "")) from None


def _explain_write(failure: BaseException, path: Path, where: str) -> str:
    full = isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(failure) or "os error 28" in str(failure)
    if full:
        free = shutil.disk_usage(path.parent).free
        return (
            f"{path}: disk full while saving{where} ({free / 1e6:.1f} MB free); the previous checkpoint is whole: "
            "free some space, or set checkpoint.keep=1, and run the same command again"
        )
    return f"{path}: could not be written{where}: {type(failure).__name__}: {failure}"

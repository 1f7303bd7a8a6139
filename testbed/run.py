"""Real training processes for tests, and what they leave on disk.

A rank runs `dnt_scale.train` as `__main__` with torchrun's variables, as `python -m
dnt_scale.train` would, and takes real signals. It is forked from a server that has torch imported
already (testbed/rank_server.py); `python` and `torchrun` start the same module the long way.
"""

import gc
import hashlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from data_prep.shards import (
    BLOCK_ROWS,
    Manifest,
    Options,
    SourceInfo,
    Split,
    SplitName,
    TokenizerInfo,
    shard_name,
    write_manifest,
    write_shard,
)
from dnt_scale.distributed import rendezvous
from dnt_scale.train import loop
from dnt_scale.train.hooks import Hook, records
from dnt_scale.train.setup import Training
from testbed.ports import free_port
from testbed.rank_server import RankProcess
from testbed.waiting import until

# else DeepSpeed looks for devices when it is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
GROUP = "DNT_TEST_GROUP"  # names a folder that a group of ranks shares
PLOTS = {"DNT_TEST_PLOTS": "1"}  # the rank draws its run's plots: a third of a tiny run's time
# a run that only has to be there leaves the processors to those it waits for: seconds a step
IDLING = {"DNT_TEST_PAUSE_S": "0.3"}
OTHERS_MAY_TAKE_S = 100.0  # once a rank has failed; rank 0 may wait a minute for MLflow's sender

TINY_MODEL = [
    "model=dnt_nano",
    "model.layers=2",
    "model.width=64",
    "model.heads=2",
    "model.vocab_size=512",
    "model.context=64",
]
STEPS = 20
# 20 steps of 8 rows of 64 tokens: about a second. A momentum that works without a gradient buffer
# too; the learning rate is a tenth of its file's, where fp32 rounding grows by less than a factor
# of ten in 20 steps.
TINY_RUN = [
    *TINY_MODEL,
    "run.name=tiny",
    "run.device=cpu",
    "optim=msgdw_r",
    "optim.lr=0.1",
    "optim.schedule.warmup_steps=2",
    f"train.steps={STEPS}",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.dtype=fp32",
    "eval.every=5",
    "eval.rows=10",
    "checkpoint.every=6",
    "tracking.enabled=false",
]


def tiny(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny run; later ones win."""
    return [*TINY_RUN, f"data.path={data}", f"run.dir={run_dir}", *overrides]


@dataclass(frozen=True)
class Finished:
    """What the ranks ended with. A code of -n: killed by signal n."""

    codes: list[int | None]
    out: str
    err: str

    @property
    def code(self) -> int | None:
        """The exit code that all ranks agree on."""
        assert len(set(self.codes)) == 1, f"ranks ended with {self.codes}\n{self.err}"
        return self.codes[0]

    def ok(self) -> "Finished":
        assert self.code == 0, self.err
        return self

    def error(self) -> str:
        """The one `error:` line about what the user has to mend: exit code 2 on every rank, no
        traceback.
        """
        return self._line(2)

    def fault(self) -> str:
        """The one `error:` line about what another try may not meet: exit code 1 on every rank,
        no traceback.
        """
        return self._line(1)

    def _line(self, code: int) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert self.code == code, f"exit code {self.codes}\n{self.err}"
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err, self.err
        return lines[0]


class Ranks:
    """Processes that run one module together; started by `start`."""

    def __init__(
        self,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        ranks: int,
        env: Mapping[str, str],
        file_limit: int = resource.RLIM_INFINITY,
    ):
        self._logs = tempfile.TemporaryDirectory(prefix="dnt-ranks-")
        common = {**ENVIRONMENT, GROUP: self._logs.name}
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            mine = {
                **common,
                "MASTER_ADDR": "127.0.0.1",
                **{k: str(v) for k, v in group.items()},
                **env,
            }
            log = Path(self._logs.name, str(rank))
            process = RankProcess(
                target=_be_rank, args=(log, mine, file_limit, target, arguments), daemon=True
            )
            process.start()
            self.processes.append(process)

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that are alive."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, number)

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 900.0) -> Finished:
        """Wait for all ranks. When one fails the others get a while to notice, as under
        torchrun.
        """
        deadline = time.monotonic() + timeout
        while waiting := [
            process.sentinel for process in self.processes if process.exitcode is None
        ]:
            wait_for(waiting, timeout=1.0)
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + OTHERS_MAY_TAKE_S)
            if time.monotonic() > deadline:
                self.kill()
        for process in self.processes:
            process.join()
        out, err = (
            "".join(self.read(rank, name) for rank in range(len(self.processes)))
            for name in ("out", "err")
        )
        return Finished([process.exitcode for process in self.processes], out, err)

    def read(self, rank: int, name: str) -> str:
        path = Path(self._logs.name, f"{rank}.{name}")
        return path.read_text() if path.exists() else ""


class Pause(Hook):
    """Waits before each step."""

    def before_step(self, run: Training) -> None:
        time.sleep(float(os.environ["DNT_TEST_PAUSE_S"]))


def _be_rank(
    log: Path,
    env: Mapping[str, str],
    file_limit: int,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        with log.with_suffix(f".{name}").open("wb") as file:
            os.dup2(file.fileno(), stream)
    assert "testbed.warm" in sys.modules, "the server of ranks could not import what ranks need"
    os.environ.update(env)
    gc.freeze()  # all that was imported stays: no collection need look at it
    torch.set_num_threads(1)  # torch was imported before OMP_NUM_THREADS was set
    if not env.keys() >= PLOTS.keys():
        records.plot_run = lambda run_dir: run_dir  # type: ignore[assignment, misc]
    if "DNT_TEST_PAUSE_S" in env:
        loop.HOOKS = (*loop.HOOKS, Pause)  # type: ignore[attr-defined]
    rendezvous.SAY_S = 600.0  # on a loaded machine ranks start seconds apart, which is no news here
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    target(*arguments)


def _run_module(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(
    overrides: Sequence[str],
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    file_limit: int = resource.RLIM_INFINITY,
) -> Ranks:
    """Start `python -m dnt_scale.train` on `ranks` ranks; no file they write may exceed
    `file_limit` bytes.
    """
    return Ranks(_run_module, ("dnt_scale.train", overrides), ranks, env or {}, file_limit)


def train(
    overrides: Sequence[str],
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    file_limit: int = resource.RLIM_INFINITY,
) -> Finished:
    """`start`, and wait for the end."""
    return start(overrides, ranks, env, file_limit).wait()


def stop_midway(
    overrides: Sequence[str],
    run_dir: Path,
    act: Callable[[Ranks], None],
    ranks: int = 2,
    after: int = 1,
) -> Finished:
    """Start a run of STEPS and `act` on it at a random step from `after` on; again when it was
    too quick to be hit.
    """
    for _ in range(20):
        moment = random.randrange(after, STEPS - 6)
        group = start(overrides, ranks)
        until(
            lambda group=group, moment=moment: (
                steps_written(run_dir) >= moment or not group.running
            ),
            every=0.001,
        )
        act(group)
        finished = group.wait()
        if 0 < steps_written(run_dir) < STEPS:
            return finished
        shutil.rmtree(run_dir)
    raise AssertionError(f"never stopped before its end:\n{finished.err}")


def dnt(*arguments: object) -> Finished:
    """Run the `dnt` command in a process of its own."""
    return Ranks(
        _run_module, ("dnt_scale.cli", [str(argument) for argument in arguments]), 1, {}
    ).wait()


def call(
    function: Callable[..., None],
    *arguments: Any,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Call a module-level function on every rank."""
    return Ranks(function, arguments, ranks, env or {}).wait()


def python(*arguments: object, env: Mapping[str, str] | None = None) -> Finished:
    """A fresh interpreter, as a user starts it: `python("-m", "dnt_scale.train", ...)`."""
    command = [sys.executable, *(str(argument) for argument in arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        out, err = process.communicate()
    return Finished([process.returncode], out, err)


def synthetic_set(
    folder: Path, vocab_size: int = 512, val: bool = True, seq_len: int = 64, seed: int = 0
) -> Path:
    """A set of made-up tokens that depend on nothing but the arguments; its tokenizer is a file of
    a few bytes.

    A token goes on to one of four others, so that there is something to learn.
    """
    folder.mkdir()
    splits: dict[SplitName, Split] = {}
    names: tuple[SplitName, ...] = ("train", "val") if val else ("train",)
    for name, tokens in zip(names, (60_000, 5_000), strict=False):
        choice = np.random.Philox(key=tokens + seed).random_raw(tokens) % 4
        ids = np.zeros(tokens, dtype=np.uint16)
        for place in range(1, tokens):
            ids[place] = (
                0
                if place % 250 == 249
                else 1 + (3 * int(ids[place - 1]) + int(choice[place])) % (vocab_size - 1)
            )
        splits[name] = write_split(
            folder, name, np.concatenate([[0], ids]).astype(np.uint16), seq_len
        )
    tokenizer = f"no tokenizer of {vocab_size} pieces".encode()
    (folder / "tokenizer.model").write_bytes(tokenizer)
    documents, text_bytes = (
        sum(getattr(split, f) for split in splits.values()) for f in ("documents", "text_bytes")
    )
    manifest = Manifest(
        format="dnt-shards",
        version=1,
        dtype="uint16",
        seq_len=seq_len,
        tokenizer=TokenizerInfo(
            file="tokenizer.model",
            sha256=hashlib.sha256(tokenizer).hexdigest(),
            vocab_size=vocab_size,
            round_trip=False,
        ),
        eos_id=0,
        options=Options(
            vocab_size=None,
            kind=None,
            sample_bytes=None,
            val_fraction=0.1 if val else 0.0,
            shard_bytes=50_000,
        ),
        sources=(
            SourceInfo(
                name="made up", documents=documents, text_bytes=text_bytes, replaced=0, empty=0
            ),
        ),
        splits=splits,
    )
    write_manifest(folder, manifest)
    return folder


def write_split(folder: Path, name: SplitName, stream: np.ndarray, seq_len: int) -> Split:
    """A split of packing "concat" out of a stream of tokens (n,) that begins with eos, 0; each
    block is a shard.
    """
    rows = (len(stream) - 1) // seq_len
    blocks = np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]
    shards = []
    for number, start in enumerate(range(0, rows, BLOCK_ROWS)):
        file = shard_name(name, number)
        shards.append(
            write_shard(folder / file, file, [blocks[start : start + BLOCK_ROWS]], number)
        )
    return Split(
        documents=int((stream[1:] == 0).sum()),
        tokens=len(stream) - 1,
        text_bytes=3 * (len(stream) - 1),
        rows=rows,
        tail=tuple(stream[rows * seq_len :].tolist()),
        shards=tuple(shards),
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without the fields that tell the time. JSON keeps every bit
    of a float.
    """
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("time", "tokens_per_s")}
        for line in lines
    ]


def steps_written(run_dir: Path) -> int:
    """The last step of which metrics.jsonl holds a whole line; -1 before the first."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else -1


def complete_checkpoints(run_dir: Path) -> list[str]:
    """Names of the checkpoints that are in place, after checking every byte of them against
    their state.json.
    """
    names = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        state = json.loads((folder / "state.json").read_text())
        assert folder.name == f"step-{state['step']:08d}"
        assert {path.name for path in folder.iterdir()} == {"state.json", *state["files"]}
        for name, record in state["files"].items():
            data = (folder / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (
                record["bytes"],
                record["sha256"],
            ), name
        names.append(folder.name)
    return names


def can_mount() -> bool:
    """Whether this user may mount a tmpfs; it takes root."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "dnt", folder], capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: the pieces of all files at the offsets they record,
    each element once.
    """
    pieces: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        for name, piece in load_file(path).items():
            pieces.setdefault(name, []).append((offsets[name]["saved_offsets"], piece))
    whole = {}
    for name, parts in pieces.items():
        ends = [
            [o + s for o, s in zip(offset, piece.shape, strict=True)] for offset, piece in parts
        ]
        shape = [max(end) for end in zip(*ends, strict=True)]
        whole[name], filled = (
            torch.empty(shape, dtype=parts[0][1].dtype),
            torch.zeros(shape, dtype=torch.int32),
        )
        for (offset, piece), end in zip(parts, ends, strict=True):
            place = tuple(slice(*window) for window in zip(offset, end, strict=True))
            whole[name][place] = piece
            filled[place] += 1
        assert (filled == 1).all(), f"{name}: not tiled by its pieces"
    return whole


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()

"""What may happen while a set is made: kill -9, Ctrl-C, a full or read-only disk, input that
vanishes or is damaged.

Each ends in one clear line or none, with no set; and the same command then makes the very bytes of
an undisturbed run.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rich.console import Console

from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare
from data_prep.read import inputs, pieces
from data_prep.shards import PARTIAL, Packing, load_manifest
from data_prep.verify import verify
from testbed.corpus import contents, python_source_files, small_set
from tests.helpers.kills import killed, watch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
SMALL = {"PIECE_BYTES": (pieces, 30_000), "UNIT_BYTES": (inputs, 200_000)}


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (module, value) in SMALL.items():
        monkeypatch.setattr(module, name, value)


PRELOAD = ["data_prep.train_tokenizer", "data_prep.pipeline", "data_prep.dedup", "rensa"]


def kill(options: PrepareOptions, last: int) -> None:
    killed(prepare, options, SMALL, last, PRELOAD)


def every_stage(folder: Path, limit_bytes: int = 200_000) -> PrepareOptions:
    """Options of a run in which every stage has work: three kinds of input, rules, near duplicates,
    both splits."""
    files = python_source_files(limit_bytes)
    whole = [path.read_bytes().decode("utf-8", "replace") for path in files]
    texts = [text[at : at + 3000] for text in whole for at in range(0, len(text), 3000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in [*texts, *texts[::5]]]
    (folder / "plain.jsonl").write_bytes(b"".join(lines[::2]))
    (folder / "packed.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(lines[1::2]))
    )
    (folder / "files").mkdir()
    for number, text in enumerate(texts[:40]):
        (folder / "files" / f"{number:02}.py").write_text(text.replace("self", "me", 2))
    return PrepareOptions(
        inputs=[folder / "plain.jsonl", folder / "packed.jsonl.zst", folder / "files"],
        out=folder / "out",
        vocab_size=500,
        seq_len=64,
        val_fraction=0.1,
        rules=ROOT / "configs" / "clean" / "light.yaml",
        dedup="near",
        shard_bytes=60_000,
        workers=1,
    )


# What is about to be done to a file of this name when the kill comes, at one of the times that this
# is done.
KILLS: dict[Packing, str] = {
    "concat": "lock tokenizer- 000000. 000001. whole band- keep- rejects lead- train- report "
    "manifest",
    "best_fit": "lead- train- train- val- tokenizer.model fingerprints report manifest",
}


@pytest.mark.parametrize(("packing", "stages"), [("concat", 4), ("best_fit", 2)])
def test_kill_9_at_any_moment_and_a_rerun_make_the_same_bytes(
    tmp_path: Path, packing: Packing, stages: int
) -> None:
    """Up to packing a run does the same whatever the packing."""
    options = dataclasses.replace(every_stage(tmp_path), packing=packing)
    steps: list[str] = []
    stop = watch(options.out, steps.append)
    prepare(options, QUIET)
    stop()
    whole = contents(options.out)
    draw = random.Random(0)
    reached = set()
    for name in KILLS[packing].split():
        shutil.rmtree(options.out)
        number = draw.choice([number for number, step in enumerate(steps) if step.startswith(name)])
        kill(options, number)
        left = {path.name[:5] for path in options.out.rglob("*") if path.is_file()}
        reached.add(frozenset(left))
        if not (options.out / "manifest.json").exists():
            with pytest.raises(ValueError, match=r"manifest|no such folder"):
                load_manifest(options.out)
            prepare(options, QUIET)
        else:
            with pytest.raises(ValueError, match="already holds a prepared set"):
                prepare(options, QUIET)
        assert contents(options.out) == whole, (
            f"kill before step {number}, {steps[number]}, which left {sorted(left)}"
        )
    assert len(reached) >= stages, "the kills did not reach different stages"


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    options = every_stage(tmp_path)
    steps: list[str] = []
    stop = watch(options.out, steps.append)
    prepare(options, QUIET)
    stop()
    shutil.rmtree(options.out)
    written = [number for number, name in enumerate(steps) if name.endswith(".tmp.npz")]
    kill(options, written[len(written) // 2])
    done = {
        path: path.stat().st_mtime_ns
        for path in (options.out / PARTIAL).rglob("*")
        if path.suffix in (".npz", ".model")
    }
    keep: dict[Path, int] = {}

    class Watching(Console):
        def print(self, *args: Any, **settings: Any) -> None:
            if "tokenise" in str(args[0]):  # the stage has ended
                keep.update({path: path.stat().st_mtime_ns for path in done if path.exists()})

    prepare(options, Watching(quiet=True))
    assert len(done) >= 5
    assert keep == done


SIZES = {"limit_bytes": 1_000_000, "shard_bytes": 70_000, "workers": 2}
SCRIPT = f"""
import sys, time
from pathlib import Path
import data_prep.read.pieces
from data_prep.chunk_files import Journal
from testbed.corpus import small_set

made, was_made = [], Journal.was_made

def wait_after_three(journal, unit):
    was_made(journal, unit)
    made.append(unit)
    if len(made) == 3:
        Path("reached").touch()
        while not Path("go-on").exists():
            time.sleep(0.01)

if __name__ == "__main__":
    data_prep.read.pieces.PIECE_BYTES = {SMALL["PIECE_BYTES"][1]}
    Journal.was_made = wait_after_three
    small_set(Path(sys.argv[1]), **{SIZES})
"""


@pytest.fixture(scope="module")
def with_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What SCRIPT makes if nothing happens to it."""
    out = tmp_path_factory.mktemp("with-workers") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", SMALL["PIECE_BYTES"][1])
        small_set(out, **SIZES)
    return contents(out)


def start_script(folder: Path) -> subprocess.Popen[bytes]:
    """SCRIPT at the point where three chunks are made, and its workers are at work on more; a file
    go-on lets it go."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(folder / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    while not (folder / "reached").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_a_run_with_workers_that_is_stopped_goes_on_and_leaves_no_process(
    with_workers: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    process = start_script(tmp_path)
    if how == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode
    assert how == "kill" or said.decode().count("KeyboardInterrupt") == 1
    with pytest.raises(ValueError, match="manifest"):
        load_manifest(out)
    while alive(process.pid):  # or the test hangs, which is a failure too
        time.sleep(0.05)
    small_set(out, **SIZES)
    assert contents(out) == with_workers


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


Disk = Callable[..., None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Disk]]:
    """A small file system of its own, and a function that mounts it anew with other options; needs
    root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount") or ""
    start = [mount, "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if not mount or subprocess.run(start, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")

    def remount(options: str) -> None:
        subprocess.run([mount, "-o", f"remount,{options}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, value) in SMALL.items():
            patch.setattr(module, name, value)
        small_set(out, limit_bytes=500_000, val_fraction=0.3)
    return contents(out)


@pytest.mark.parametrize(
    ("kilobytes", "workers"), [(8, 1), (60, 2), (300, 1), (400, 2), (600, 1), (800, 1)]
)
def test_a_full_disk(
    disk: tuple[Path, Disk], undisturbed: dict[str, bytes], kilobytes: int, workers: int
) -> None:
    folder, remount = disk
    remount(f"size={kilobytes}k")
    with pytest.raises(
        ValueError, match=r"the disk is full .* bytes free.* choose another --out"
    ) as caught:
        small_set(folder / "set", limit_bytes=500_000, val_fraction=0.3, workers=workers)
    assert str(folder / "set") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in (folder / "set").glob("*") if path.name != PARTIAL]
    remount("size=50m")
    small_set(folder / "set", limit_bytes=500_000, val_fraction=0.3, workers=workers)
    assert contents(folder / "set") == undisturbed


def test_a_read_only_disk(disk: tuple[Path, Disk], tmp_path: Path) -> None:
    folder, remount = disk
    remount("ro,size=50m")
    with pytest.raises(
        ValueError, match=r"cannot be read or written: Read-only file system; check the path"
    ) as caught:
        small_set(folder / "set", limit_bytes=100_000, val_fraction=0.3)
    assert str(folder / "set") in str(caught.value)
    remount("rw")
    assert not list(folder.iterdir())
    small_set(folder / "set", limit_bytes=100_000, val_fraction=0.3)
    assert verify(folder / "set") == []


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match="the disk is full or a limit is reached"):
            small_set(tmp_path / "out", limit_bytes=500_000, val_fraction=0.3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    small_set(tmp_path / "out", limit_bytes=500_000, val_fraction=0.3)
    assert verify(tmp_path / "out") == []


@pytest.fixture(scope="module")
def all_stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `every_stage` makes if nothing happens to it."""
    options = every_stage(tmp_path_factory.mktemp("all-stages"))
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, value) in SMALL.items():
            patch.setattr(module, name, value)
        prepare(options, QUIET)
    return contents(options.out)


def test_input_that_is_damaged_and_then_mended(
    all_stages: dict[str, bytes], tmp_path: Path
) -> None:
    options = every_stage(tmp_path)
    path = tmp_path / "packed.jsonl.zst"
    good, stat = path.read_bytes(), path.stat()
    for bad in (good[: len(good) // 2], good[:3000] + bytes(100) + good[3100:], b"not zstd"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"packed\.jsonl\.zst: ") as caught:
            prepare(options, QUIET)
        assert len(str(caught.value).splitlines()) == 1
        assert not (options.out / "manifest.json").exists()
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare(options, QUIET)
    assert contents(options.out) == all_stages


def test_input_that_vanishes_and_comes_back(all_stages: dict[str, bytes], tmp_path: Path) -> None:
    options = every_stage(tmp_path)
    path = tmp_path / "packed.jsonl.zst"
    aside = tmp_path / "aside"

    class Taking(Console):
        """Takes a file away once the tokenizer is learnt, while the first units are still to be
        read again."""

        def print(self, *args: Any, **settings: Any) -> None:
            if "learn" in str(args[0]) and path.exists():
                path.rename(aside)

    with pytest.raises(ValueError, match=r"packed\.jsonl\.zst: .*No such file") as caught:
        prepare(options, Taking(quiet=True))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"packed\.jsonl\.zst: no such file or folder"):
        prepare(options, QUIET)
    assert not (options.out / "manifest.json").exists()
    aside.rename(path)
    prepare(options, QUIET)
    assert contents(options.out) == all_stages


def test_input_that_grows_while_it_is_read(tmp_path: Path) -> None:
    options = every_stage(tmp_path, 400_000)  # several units, of which the last one grows
    path = tmp_path / "plain.jsonl"

    class Growing(Console):
        def print(self, *args: Any, **settings: Any) -> None:
            if "learn" in str(args[0]):
                with path.open("a") as file:
                    file.write('{"text": "one more"}\n')

    with pytest.raises(
        ValueError, match="the corpus changed while it was read; run the command again"
    ):
        prepare(options, Growing(quiet=True))
    prepare(options, QUIET)
    assert verify(options.out) == []


def test_a_killed_worker(with_workers: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_script(tmp_path)
    server = next(pid for pid in children(process.pid) if "forkserver" in command_of(pid))
    os.kill(children(server)[0], signal.SIGKILL)
    (tmp_path / "go-on").touch()
    _, said = process.communicate(timeout=120)
    assert process.returncode
    assert b"a worker process was killed, perhaps for want of memory; use fewer --workers" in said
    small_set(out, **SIZES)
    assert contents(out) == with_workers


def children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()

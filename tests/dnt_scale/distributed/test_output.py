"""Output that breaks, blocks or is not there: a command that works goes on, one that only shows
something ends.
"""

import fcntl
import io
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dnt_scale.distributed.output import HELD_BYTES, Output
from dnt_scale.train.signals import stop_signals
from testbed.run import STEPS, Ranks, _run_module, metrics, steps_written, tiny
from testbed.waiting import until


def no_reader() -> tuple[int, int | None]:
    reads, writes = os.pipe()
    os.close(reads)
    return writes, None


def does_not_read() -> tuple[int, int | None]:
    reads, writes = os.pipe()
    return writes, reads


def does_not_wait() -> tuple[int, int | None]:
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    return writes, reads


def full_disk() -> tuple[int, int | None]:
    return os.open("/dev/full", os.O_WRONLY), None


def dead_terminal() -> tuple[int, int | None]:
    master, slave = pty.openpty()
    os.close(master)
    return slave, None


def stopped_terminal() -> tuple[int, int | None]:
    """As with Ctrl-S."""
    master, slave = pty.openpty()
    termios.tcflow(slave, termios.TCOOFF)
    return slave, master


def closed() -> tuple[int, int | None]:
    reads, writes = os.pipe()
    os.close(reads)
    os.close(writes)
    return writes, None


BROKEN = (
    no_reader,
    does_not_read,
    does_not_wait,
    full_disk,
    dead_terminal,
    stopped_terminal,
    closed,
)


@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_that_output_meets_is_an_error_or_holds_up(
    kind: Callable[[], tuple[int, int | None]],
) -> None:
    writes, reads = kind()
    output = Output(writes, shows=False)
    text = io.TextIOWrapper(output, "ascii", "backslashreplace", write_through=True)
    for number in range(64):
        print(f"línea {number}", "x" * (2 * HELD_BYTES // 64), file=text, flush=True)
    output.drain(0.01)
    for descriptor in (reads, writes):
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


def test_a_reader_that_comes_back_reads_on() -> None:
    reads, writes = os.pipe()
    output = Output(writes, shows=False)
    sent = [b"%06d " % number * 100 for number in range(1000)]
    for part in sent:
        output.write(part)
    found = b""
    while len(found) < len(b"".join(sent)):
        found += os.read(reads, 1 << 16)
    assert found == b"".join(sent)
    output.write(b"again")
    assert os.read(reads, 9) == b"again"


def hang_up(overrides: list[str], run_dir: Path, ignored: bool) -> None:
    """Train on a terminal of its own, which goes after some steps."""
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.setsid()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(slave, descriptor)
    os.close(slave)

    def go() -> None:
        until(lambda: steps_written(run_dir) >= 3)
        os.close(master)

    threading.Thread(target=go, daemon=True).start()
    _run_module("dnt_scale.train", overrides)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_costs_no_step(corpus, reference, tmp_path, ignored):
    """It also reads nothing all the time. As `nohup` has it, the run goes on to its end."""
    run_dir = tmp_path / "run"
    more = (
        []
        if ignored
        else ["train.steps=100000", "checkpoint.every=0", "optim.schedule.name=constant"]
    )
    finished = Ranks(hang_up, (tiny(corpus, run_dir, *more), run_dir, ignored), 1, {}).wait()
    assert finished.code == (0 if ignored else 128 + signal.SIGHUP)
    lines, steps = metrics(run_dir), steps_written(run_dir)
    assert (run_dir / "checkpoints" / "latest").resolve().name == f"step-{steps:08d}"
    assert (steps == STEPS) if ignored else (3 <= steps == lines[-1]["step"])


def closed_streams(overrides: list[str]) -> None:
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    # as Python has it
    sys.stdin = sys.__stdin__ = sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = None
    _run_module("dnt_scale.train", overrides)


def broken_streams(overrides: list[str]) -> None:
    for descriptor, kind in ((1, no_reader), (2, full_disk)):
        os.dup2(kind()[0], descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _run_module("dnt_scale.train", overrides)


@pytest.mark.parametrize("begin", [closed_streams, broken_streams])
def test_training_needs_no_output(corpus, tmp_path, begin):
    run_dir = tmp_path / "run"
    Ranks(begin, (tiny(corpus, run_dir, "train.steps=4"),), 1, {}).wait().ok()
    assert [line["step"] for line in metrics(run_dir)] == [0, 1, 2, 3, 4]


@pytest.fixture
def signals() -> Iterator[None]:
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("before", "counted"), [(signal.SIG_DFL, [signal.SIGHUP] * 2), (signal.SIG_IGN, [])]
)
def test_a_hangup_stops_unless_it_is_ignored(before, counted):
    signal.signal(signal.SIGHUP, before)
    with stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert received == counted
    signal.raise_signal(signal.SIGHUP)  # once more, from the shell


def dnt(
    *arguments: object, env: dict[str, str] | None = None, **streams: object
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dnt_scale.cli", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(
        command, text=True, timeout=120, env={**os.environ, **(env or {})}, **streams
    )


def test_a_command_that_shows_something_ends_with_its_reader(corpus):
    for arguments in (["data", "info", corpus], ["--help"]):
        writes, _ = no_reader()
        done = dnt(*arguments, stdout=writes)
        os.close(writes)
        assert (done.returncode, done.stderr) == (141, ""), arguments
    with Path("/dev/full").open("w") as full:
        done = dnt("data", "info", corpus, stdout=full)
        assert (done.returncode, done.stderr) == (
            2,
            "error: [Errno 28] standard output: No space left on device\n",
        )
        assert dnt("data", "info", corpus / "no", stderr=full).returncode == 2


def test_a_poor_terminal_shows_everything(corpus, tmp_path):
    """Its encoding lacks characters; it has a column, or is dumb."""
    (tmp_path / "año").mkdir()
    env = {
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "1",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "LC_ALL": "C",
    }
    done = dnt("data", "info", tmp_path / "año", env=env)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and "a\\xf1o" in done.stderr
    ), done.stderr
    shown = re.findall(r"[\w.,]+", dnt("data", "info", corpus).stdout)
    assert len(shown) > 20
    for columns in "01":
        done = dnt("data", "info", corpus, env={**env, "COLUMNS": columns})
        assert (done.returncode, re.findall(r"[\w.,]+", done.stdout)) == (0, shown)


def test_a_working_folder_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    command = (
        f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && exec "{sys.executable}" -P -m '
        "dnt_scale.cli jobs"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "error: the working folder is gone (No such file or directory); `cd` to one that exists\n"
    )

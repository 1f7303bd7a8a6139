import errno
import os
import re
import resource
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dnt_scale.distributed import process_group
from dnt_scale.distributed.errors import AgreedError, Fault, exit_status, lost_peer, out_of_memory
from dnt_scale.distributed.heartbeat import beat, moving
from dnt_scale.distributed.watchdog import LastPulse, Watchdog, watching
from testbed.run import Ranks

HANG_S = 2.0
NEVER = 600.0


def group(function, folder: Path, *arguments, ranks: int) -> Ranks:
    return Ranks(function, (folder, *arguments), ranks, {})


def told(message: str, hosts) -> None:
    print(f"told {message} of {list(hosts)}")


def run(folder: Path, act=lambda me, step: None, steps=10**9, hang_s=HANG_S, pause_s=0.0) -> None:
    """Steps of a collective; the file `folder`/RANK says that a rank is at step 3."""
    me = process_group.start("cpu")
    try:
        with watching(me, hang_s, told):
            for step in range(1, steps + 1):
                beat(f"step {step}")
                act(me, step)
                time.sleep(pause_s)
                dist.all_reduce(torch.ones(10))
                if step == 3:
                    (folder / str(me.rank)).touch()
    except RuntimeError as error:
        assert lost_peer(error), error
        print(f"rank {me.rank}: lost a peer")
        raise SystemExit(3) from None
    except MemoryError:
        raise SystemExit(4) from None
    except KeyboardInterrupt:
        raise SystemExit(5) from None
    process_group.stop()


def at_step_3(group: Ranks, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < len(group.processes):
        assert time.monotonic() < deadline and group.running
        time.sleep(0.01)


def message(finished, *, culprit: int) -> str:
    """The one line, after checking that all but the culprit ended with 1 and the culprit with 1
    or by SIGKILL.
    """
    lines = [line for line in finished.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, finished.err
    for rank, code in enumerate(finished.codes):
        assert code in ((1, -signal.SIGKILL) if rank == culprit else (1,)), (
            finished.codes,
            finished.err,
        )
    assert lines[0].startswith(f"error: rank {culprit} ("), lines[0]
    said, ends, advice = lines[0].removeprefix("error: ").partition("; all ranks end")
    assert ends and advice == "; the same command goes on from the newest checkpoint"
    assert finished.out == f"told {said} of {[socket.gethostname()]}\n"
    return lines[0]


@pytest.mark.parametrize(("ranks", "culprit"), [(2, 1), (2, 0), (4, 2)])
def test_a_stopped_rank_is_named_and_killed(tmp_path, ranks, culprit):
    running = group(run, tmp_path, ranks=ranks)
    at_step_3(running, tmp_path)
    running.kill(signal.SIGSTOP, culprit)
    finished = running.wait()
    assert "no sign of life for" in message(finished, culprit=culprit)
    assert finished.codes[culprit] == -signal.SIGKILL


@pytest.mark.parametrize(("ranks", "culprit"), [(2, 0), (4, 3)])
def test_a_killed_rank_is_named(tmp_path, ranks, culprit):
    running = group(run, tmp_path, nothing, 10**9, NEVER, ranks=ranks)
    at_step_3(running, tmp_path)
    running.kill(signal.SIGKILL, culprit)
    assert "died (last heard of at " in message(running.wait(), culprit=culprit)


def nothing(me, step) -> None:
    pass


def sleep_on_1(me, step) -> None:
    if (me.rank, step) == (1, 4):
        time.sleep(NEVER)


def sleep_on_0(me, step) -> None:
    if (me.rank, step) == (0, 4):
        time.sleep(NEVER)


@pytest.mark.parametrize(("ranks", "act", "culprit"), [(2, sleep_on_0, 0), (4, sleep_on_1, 1)])
def test_a_rank_that_does_not_come_to_the_collective_is_named(tmp_path, ranks, act, culprit):
    line = message(group(run, tmp_path, act, ranks=ranks).wait(), culprit=culprit)
    assert re.search(r"has not moved since step 4, \d+ s ago", line)
    assert act.__name__ in line and "the others wait for it" in line


def sleep_on_0_and_1(me, step) -> None:
    if me.rank < 2 and step == 4:
        time.sleep(NEVER)


def test_several_ranks_that_do_not_come_are_named(tmp_path):
    line = message(group(run, tmp_path, sleep_on_0_and_1, ranks=3).wait(), culprit=0)
    assert re.search(
        r"\) and rank 1 \(.*have not moved since step 4, \d+ s ago \(the first is in ", line
    )
    assert "; the others wait for them" in line


def move_on_1(me, step) -> None:
    for _ in range(30 if (me.rank, step) == (1, 4) else 0):
        moving()
        time.sleep(0.1)


def test_a_long_step_that_gets_on_is_no_hang(tmp_path):
    finished = group(run, tmp_path, move_on_1, 6, 1.5, ranks=2).wait()
    assert finished.codes == [0, 0] and not finished.err


def test_who_waited_for_a_slow_rank_is_not_blamed_when_that_goes_on():
    """Pulses are read at different times: a rank just set free may seem to be behind the one it
    has waited for.
    """
    with process_group.alone() as me:
        watch = Watchdog(me, 10.0, None)
        watch.stop()
    pulse = watch.seen[0].pulse

    def at(read: float, entered: int, moved: float):
        watch.read = read
        watch.seen = {
            0: LastPulse(replace(pulse, collectives=5, left=False), read, 0.0),
            1: LastPulse(replace(pulse, collectives=entered, moves=7, left=False), read, moved),
        }
        return watch._furthest_behind()

    assert at(30.0, 4, 29.0) is None  # it is slow, and gets on
    assert at(31.0, 7, 31.0) is None
    assert at(40.0, 7, 31.0) is None
    message = at(41.0, 7, 31.0).message
    assert message.startswith("rank 0 (") and ", 10 s ago (it is in " in message
    assert at(50.0, 5, 31.0) is None
    message = at(60.0, 5, 31.0).message  # in the same collective: who moved more often is not ahead
    assert " and rank 1 (" in message and "have not moved since " in message


def test_a_process_alone_that_does_not_move_ends(tmp_path):
    line = message(group(run, tmp_path, sleep_on_0, ranks=1).wait(), culprit=0)
    assert re.search(r"has not moved since step 4, \d+ s ago", line) and "others" not in line


def test_no_false_alarm_for_a_slow_group(tmp_path):
    # longer than hang_s, all in all
    finished = group(run, tmp_path, nothing, 6, 2.5, 0.7, ranks=2).wait()
    assert finished.codes == [0, 0] and not finished.err


def test_no_false_alarm_for_a_group_that_was_stopped_and_goes_on(tmp_path):
    running = group(run, tmp_path, nothing, 40, 2.5, 0.1, ranks=2)
    at_step_3(running, tmp_path)
    running.kill(signal.SIGSTOP)
    time.sleep(4)
    running.kill(signal.SIGCONT)
    finished = running.wait()
    assert finished.codes == [0, 0] and not finished.err


def slow_end(folder: Path) -> None:
    me = process_group.start("cpu")
    with watching(me, 2.0):
        time.sleep(0 if me.first else 1)
    process_group.stop()


def test_a_rank_that_is_done_first_is_no_death(tmp_path):
    finished = group(slow_end, tmp_path, ranks=3).wait()
    assert finished.codes == [0, 0, 0] and not finished.err


def fail_on_1(me, step) -> None:
    if (me.rank, step) == (1, 4):
        raise MemoryError


def fail_on_0(me, step) -> None:
    if (me.rank, step) == (0, 4):
        raise MemoryError
    if step == 4:
        time.sleep(NEVER)  # as in a collective that does not notice


def exhaust_on_1(me, step) -> None:
    if (me.rank, step) == (1, 4):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        try:
            torch.ones(1 << 28)
        except RuntimeError as error:
            assert out_of_memory(error)
            raise MemoryError from error
    if step == 4:
        time.sleep(NEVER)


@pytest.mark.parametrize("act", [fail_on_1, exhaust_on_1])
def test_a_rank_that_fails_by_itself_ends_the_others_who_name_it(tmp_path, act):
    finished = group(run, tmp_path, act, 10**9, NEVER, ranks=4).wait()
    assert finished.codes == [2, 4, 2, 2], finished.err  # 2: to be mended first
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: rank 1 (") and "ended at step 4: out of memory" in line
    assert line.endswith("; all ranks end")
    message = line.removeprefix("error: ").removesuffix("; all ranks end")
    assert finished.out == f"told {message} of []\n"  # no host is at fault


def test_rank_0_that_fails_by_itself_reports_it_itself(tmp_path):
    finished = group(run, tmp_path, fail_on_0, 10**9, NEVER, ranks=2).wait()
    assert finished.codes == [4, 2] and "error:" not in finished.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a setting"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (OSError(errno.EIO, "Input/output error"), 1),
        (Fault("a node"), 1),
        (MemoryError(), 2),
        (KeyError("a bug"), 1),
    ],
)
def test_the_others_end_with_the_status_of_the_rank_that_failed(error, status):
    assert exit_status(error) == status


def interrupt_0(me, step) -> None:
    if (me.rank, step) == (0, 4):
        raise KeyboardInterrupt


def test_an_interrupted_rank_is_no_death(tmp_path):
    finished = group(run, tmp_path, interrupt_0, 10**9, NEVER, ranks=2).wait()
    assert finished.codes == [5, 3] and "error:" not in finished.err


def fail_on_all(me, step) -> None:
    if step == 4:
        raise MemoryError


def test_what_is_wrong_on_all_ranks_is_reported_by_the_first(tmp_path):
    finished = group(run, tmp_path, fail_on_all, 10**9, NEVER, ranks=3).wait()
    # 4: to be reported by its main thread
    assert finished.codes[0] == 4 and "error:" not in finished.err


def agree(folder: Path) -> None:
    me = process_group.start("cpu")
    code = 1
    try:
        with watching(me, NEVER):
            raise AgreedError
    except AgreedError:
        if me.first:
            time.sleep(0.1)
            code = len(list(folder.iterdir()))
        (folder / str(me.rank)).touch()
    raise SystemExit(code)


def test_what_all_ranks_raise_is_printed_before_one_of_them_ends(tmp_path):
    finished = group(agree, tmp_path, ranks=3).wait()
    assert finished.codes[0] == 0, finished.err
    assert "error:" not in finished.err


def test_what_is_out_of_memory():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
    try:
        with pytest.raises(RuntimeError) as of_torch:
            torch.ones(1 << 28)
        with pytest.raises(MemoryError) as of_numpy:
            np.ones(1 << 28)
        with pytest.raises(MemoryError) as of_python:
            bytearray(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert all(out_of_memory(found.value) for found in (of_torch, of_numpy, of_python))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("DefaultCPUAllocator"))

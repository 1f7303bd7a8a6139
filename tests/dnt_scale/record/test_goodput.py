"""Where a run's allocated time went: against a simulated run that knows it, and against real
ones.
"""

import io
import math
import os
import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dnt_scale.record import timeline
from dnt_scale.record.goodput import Parts, breakdown, metrics, table
from dnt_scale.train.rank import main
from testbed.run import Ranks, call, complete_checkpoints, steps_written, tiny
from testbed.waiting import until

T0 = 1.79e9


@dataclass
class Cluster:
    """A run on a made-up cluster: its timeline, and where each second went."""

    now: float = T0
    events: list[dict] = field(default_factory=list)
    spent: list[dict[str, float]] = field(default_factory=list)
    queues: list[float] = field(default_factory=list)
    saved: int = 0  # the step of the newest checkpoint
    # attempt, step, seconds: those that stand
    done: list[tuple[int, int, float]] = field(default_factory=list)

    def tell(self, event: str, attempt: str, at: float | None = None, **fields: object) -> None:
        self.events.append(
            {"event": event, "time": self.now if at is None else at, "attempt": attempt, **fields}
        )

    def attempt(self, plan: dict, launcher: bool) -> None:
        number, name = len(self.spent), f"7.{len(self.spent)}"
        spent = dict.fromkeys((part.name for part in fields(Parts)), 0.0)
        queued = self.now
        self.now += plan["queue"]
        self.queues.append(plan["queue"] if launcher else 0.0)
        began = self.now
        if launcher:
            self.tell("allocated", name, nodes=["node1"], ranks=1, queued=queued, started=began)
        self.now += plan["start_up"] / 2
        self.tell("start", name, launched=began if not launcher else began + 0.1, ranks=1)
        if plan["steps"] is None:  # it does not get to its first step
            spent["start_up"] += plan["start_up"] / 2
        else:
            self.now += plan["start_up"] / 2 + plan["restore"]
            spent["start_up"], spent["restore"] = plan["start_up"], plan["restore"]
            self.tell("ready", name, step=self.saved, restored=plan["restore"])
            self.train(plan, number, name, spent)
        if plan["end"] == "killed":  # held, silently, until SLURM queues it again
            silent = plan["silent"] if launcher else 0.0
            spent["stall" if plan["steps"] is not None else "start_up"] += silent
            self.now += silent
            if launcher:
                self.tell("ended", name, self.now + 1e4, status="killed", until=self.now)
        elif launcher:
            self.now += 0.5
            spent["stall" if plan["steps"] is not None else "start_up"] += 0.5
            self.tell("ended", name, status="stopped", until=self.now)
        self.spent.append(spent)

    def train(self, plan: dict, number: int, name: str, spent: dict[str, float]) -> None:
        self.done = [work for work in self.done if work[1] <= self.saved]
        seconds = {"step": 0.0, "eval": 0.0, "save": 0.0}
        step = self.saved
        for _ in range(plan["steps"]):
            step += 1
            self.done.append((number, step, plan["pace"]))
            for kind, length in (("step", plan["pace"]), ("eval", plan["eval"])):
                self.now += length
                seconds[kind] += length
            self.now += plan["overhead"]
            spent["overhead"] += plan["overhead"]
            if step % plan["every"] == 0:
                self.now += plan["save"]
                seconds["save"] += plan["save"]
                self.saved = step
            self.tell("progress", name, step=step, seconds=dict(seconds))
        if plan["end"] == "stopped":
            self.now += plan["save"]
            seconds["save"] += plan["save"]
            self.saved = step
            self.tell("progress", name, step=step, seconds=dict(seconds))
            self.tell("end", name, outcome="KILLED", step=step)
        spent["eval"], spent["checkpoint"], spent["lost"] = (
            seconds["eval"],
            seconds["save"],
            seconds["step"],
        )

    def truth(self) -> list[dict[str, float]]:
        for number, _, seconds in self.done:
            self.spent[number]["training"] += seconds
            self.spent[number]["lost"] -= seconds
        return self.spent


seconds = st.floats(0.0, 500.0, allow_subnormal=False)
plans = st.fixed_dictionaries(
    {
        "queue": seconds,
        "start_up": st.floats(1.0, 500.0),
        "restore": seconds,
        "steps": st.none() | st.integers(0, 12),
        "pace": st.floats(0.01, 100.0),
        "eval": seconds,
        "save": seconds,
        "overhead": st.floats(0.0, 1.0),
        "every": st.integers(1, 5),
        "end": st.sampled_from(["stopped", "killed"]),
        "silent": seconds,
    }
)


@settings(deadline=None)
@given(st.lists(plans, min_size=1, max_size=5), st.booleans())
def test_a_run_that_tells_every_step_is_accounted_for_to_the_microsecond(attempts, launcher):
    cluster = Cluster()
    for plan in attempts:
        cluster.attempt(plan, launcher)
    if launcher:
        cluster.attempt({**attempts[0], "end": "stopped"}, launcher)
    found = breakdown(cluster.events, cluster.now + 1000.0)
    for attempt, queue, spent in zip(found.attempts, cluster.queues, cluster.truth(), strict=True):
        assert attempt.queue == pytest.approx(queue, abs=1e-5)
        for part, expected in spent.items():
            assert getattr(attempt.parts, part) == pytest.approx(expected, abs=1e-5), (
                attempt.name,
                part,
            )


@settings(deadline=None)
@given(st.data(), st.lists(plans, min_size=1, max_size=5), st.booleans())
def test_whatever_the_timeline_lacks_the_parts_add_up(tmp_path_factory, data, attempts, launcher):
    """Events lost, out of order and at wrong times, and a file cut off anywhere."""
    cluster = Cluster()
    for plan in attempts:
        cluster.attempt(plan, launcher)
    numbers = range(len(cluster.events))
    order = data.draw(st.permutations(numbers) if data.draw(st.booleans()) else st.just(numbers))
    missing = data.draw(st.sets(st.sampled_from(numbers)))
    shift = st.floats(-1e3, 1e3) if data.draw(st.booleans()) else st.just(0.0)
    file = timeline.path(tmp_path_factory.mktemp("run"))
    for number in order:
        if number not in missing:
            rest = {
                **cluster.events[number],
                "time": cluster.events[number]["time"] + data.draw(shift),
            }
            timeline.append(file.parents[1], rest.pop("event"), **rest)
    if file.exists():
        os.truncate(file, max(0, file.stat().st_size - data.draw(st.integers(0, 300))))
    events = timeline.read(file.parents[1])
    now = cluster.now + data.draw(st.floats(-1e3, 1e3))
    found = breakdown(events, now)
    total = found.total
    for parts in [total, *(attempt.parts for attempt in found.attempts)]:
        every = [getattr(parts, part.name) for part in fields(Parts)]
        assert min(every) >= 0.0 and math.fsum(every) == parts.allocated
        assert 0.0 <= parts.goodput <= 1.0
    assert all(attempt.queue >= 0.0 and attempt.lost_steps >= 0 for attempt in found.attempts)
    assert table(found).row_count == len(found.attempts) + (len(found.attempts) > 1)
    moments = [
        event[key]
        for event in events
        for key in ("time", "started", "launched", "until")
        if key in event
    ]
    assert total.allocated <= max([now, *moments]) - min([now, *moments]) + 1e-5  # no second twice


def train_telling_every_step(overrides: list[str]) -> None:

    timeline.PROGRESS_EVERY_FIRST_S = 0.0
    sys.exit(main(overrides))


@pytest.fixture(scope="module")
def eventful(corpus, tmp_path_factory):
    """The folder of a run that was killed between its checkpoints of steps 8 and 16, then stopped,
    then went on to its end; and the steps it had written when it was killed and stopped."""
    for _ in range(10):
        run_dir = tmp_path_factory.mktemp("eventful") / "run"
        overrides = tiny(
            corpus, run_dir, "checkpoint.background=false", "checkpoint.every=8", "train.steps=24"
        )
        killed = signalled(overrides, run_dir, signal.SIGKILL)
        if 10 <= killed < 16 and complete_checkpoints(run_dir) == ["step-00000008"]:
            stopped = signalled(overrides, run_dir, signal.SIGTERM)
            if stopped < 24:
                call(train_telling_every_step, overrides).ok()
                return run_dir, killed, stopped
    raise AssertionError("never hit in time")


def signalled(overrides: list[str], run_dir: Path, number: int) -> int:
    """Start the run, send it a signal once it has told of step 10 or a later one, and return the
    last step it wrote.
    """
    before = len(timeline.read(run_dir))

    def told_of_ten() -> bool:
        return any(event.get("step", 0) >= 10 for event in timeline.read(run_dir)[before:])

    group = Ranks(train_telling_every_step, (overrides,), 1, {})
    until(lambda: told_of_ten() or not group.running)
    group.kill(number)
    finished = group.wait()
    assert finished.code in (0, -number, 128 + number), finished.err
    return steps_written(run_dir)


def test_a_killed_run_lost_the_steps_since_its_checkpoint(eventful):
    run_dir, killed, stopped = eventful
    events = timeline.read(run_dir)
    found = breakdown(events, events[-1]["time"])
    first, second, third = found.attempts
    assert [attempt.status for attempt in found.attempts] == ["killed", "stopped", "finished"]
    # killed between the lines of a step
    assert first.first == 0 and first.last in (killed - 1, killed)
    assert first.lost_steps == first.last - 8 > 0
    assert [(attempt.first, attempt.last) for attempt in (second, third)] == [
        (8, stopped),
        (stopped, 24),
    ]
    steps = {name: {} for name in (first.name, second.name, third.name)}
    for event in events:
        if event["event"] == "progress":
            steps[event["attempt"]][event["step"]] = event["seconds"]["step"]
    assert first.parts.training == pytest.approx(steps[first.name][8])
    assert first.parts.lost == pytest.approx(steps[first.name][first.last] - steps[first.name][8])
    for attempt in (second, third):  # a signal that it heard of, and none
        assert attempt.parts.training == pytest.approx(steps[attempt.name][attempt.last])
        assert attempt.parts.lost == 0.0 and attempt.lost_steps == 0
        assert attempt.parts.restore > 0.0
    for part in ("start_up", "eval", "checkpoint", "overhead"):
        assert getattr(third.parts, part) > 0.0


def test_steps_that_only_metrics_jsonl_knew_of_are_lost_steps_too():
    cluster = Cluster()
    for attempt, at, begin, more in (
        ("7.0", T0, 0, {}),
        ("7.1", T0 + 100, 50, {"logged": {"step": 80, "time": T0 + 91}}),
    ):
        cluster.tell("allocated", attempt, at, nodes=["node1"], ranks=2, queued=at, started=at)
        cluster.tell("start", attempt, at, launched=at, ranks=2, **more)
        cluster.tell("ready", attempt, at + 10, step=begin, restored=0.0)
        cluster.tell(
            "progress",
            attempt,
            at + 51,
            step=begin + 40,
            seconds={"step": 40.0, "eval": 1.0, "save": 0.0},
        )
    first = breakdown(cluster.events, T0 + 151).attempts[0]
    assert (first.last, first.lost_steps) == (80, 30)
    assert first.parts == Parts(50.0, 10.0, 0.0, 30.0, 1.0, 0.0, 0.0, 0.0)
    cluster.events[-3]["logged"]["time"] = T0 + 71  # no more than there was time for
    assert breakdown(cluster.events, T0 + 151).attempts[0].parts.lost == pytest.approx(
        60.0 - 40.0 - 20.0 * 10 / 40
    )


def test_a_beginning_by_a_coarse_clock_takes_nothing_from_the_attempt_before_it():
    cluster = Cluster()
    for attempt, at, launched, begin in (("a", T0, T0 - 1, 0), ("b", T0 + 50, T0 + 39, 20)):
        cluster.tell("start", attempt, at, launched=launched, ranks=1)
        cluster.tell("ready", attempt, at, step=begin, restored=0.0)
        cluster.tell(
            "progress",
            attempt,
            at + 40,
            step=begin + 40,
            seconds={"step": 40.0, "eval": 0.0, "save": 0.0},
        )
    first, second = breakdown(cluster.events, T0 + 91).attempts
    assert (first.parts.training, first.parts.lost, first.parts.stall) == (20.0, 20.0, 0.0)
    assert second.parts.start_up == 10.0


def test_what_mlflow_is_told_of_it(eventful):
    run_dir, _, _ = eventful
    found = breakdown(timeline.read(run_dir), 0.0)
    sent = metrics(run_dir)
    assert sent.keys() == {
        "goodput/" + name
        for name in (
            *("total", "attempt", "attempts", "queue_s", "start_up_s", "restore_s", "training_s"),
            *("lost_s", "eval_s", "checkpoint_s", "overhead_s", "stall_s"),
        )
    }
    assert sent["goodput/attempts"] == 3 and sent["goodput/queue_s"] == 0.0
    assert sent["goodput/training_s"] == found.total.training > sent["goodput/lost_s"] > 0.0
    assert sent["goodput/total"] == found.total.training / found.total.allocated
    assert sent["goodput/attempt"] == found.attempts[-1].parts.goodput


def test_before_the_first_attempt_there_is_nothing_to_tell(tmp_path):
    assert metrics(tmp_path) == {}
    timeline.append(tmp_path, "submitted", attempt="7", job="7", nodes=2, ranks=2)
    assert metrics(tmp_path) == {}


def test_a_hang_is_stall_and_a_run_that_just_spoke_is_not():
    cluster = Cluster()
    cluster.tell("allocated", "7.0", T0 + 2, nodes=["node1"], ranks=2, queued=T0 - 9, started=T0)
    cluster.tell("start", "7.0", T0 + 10, launched=T0 + 3, ranks=2)
    cluster.tell("ready", "7.0", T0 + 20, step=0, restored=0.0)
    cluster.tell(
        "progress", "7.0", T0 + 101, step=70, seconds={"step": 70.0, "eval": 6.0, "save": 4.0}
    )
    events = cluster.events
    fine = breakdown(events, T0 + 109).attempts[0]
    assert (fine.status, fine.queue, fine.parts) == (
        "running",
        9.0,
        Parts(70.0, 20.0, 0.0, 0.0, 6.0, 4.0, 1.0, 0.0),
    )
    hung = breakdown(events, T0 + 500).attempts[0]
    assert (hung.status, hung.parts) == (
        "silent",
        Parts(70.0, 20.0, 0.0, 0.0, 6.0, 4.0, 1.0, 399.0),
    )
    told = {
        "event": "lost",
        "time": T0 + 700,
        "attempt": "7.0",
        "message": "rank 1 hung",
        "hosts": ["node2"],
    }
    assert breakdown([*events, told], T0 + 701).attempts[0].parts.stall == 599.0
    # on another machine's clock, that of rank 1 without a launcher, which names its attempts by
    # itself
    plain = [event for event in events if event["event"] != "allocated"]
    assert (
        breakdown([*plain, {**told, "attempt": "node2-17"}], T0 + 9e9).attempts[0].parts.stall
        == 599.0
    )


def test_steps_that_two_attempts_lost_and_steps_that_nobody_told_of():
    def attempt(name: str, at: float, first: int, last: int) -> list[dict]:
        seconds = {"step": 2.0 * (last - first), "eval": 0.0, "save": 0.0}
        return [
            {"event": "start", "time": at, "attempt": name, "launched": at, "ranks": 1},
            {"event": "ready", "time": at, "attempt": name, "step": first, "restored": 0.0},
            {
                "event": "progress",
                "time": at + seconds["step"],
                "attempt": name,
                "step": last,
                "seconds": seconds,
            },
            {"event": "lost", "time": at + 900, "attempt": name, "message": "", "hosts": []},
        ]

    # the second goes on from a checkpoint that came after the first one's last word; the third goes
    # far back
    events = [
        *attempt("a", T0, 0, 100),
        *attempt("b", T0 + 1000, 110, 130),
        *attempt("c", T0 + 2000, 40, 60),
    ]
    first, second, third = breakdown(events, T0 + 3000).attempts
    assert (first.last, first.lost_steps, first.parts.training, first.parts.lost) == (
        110,
        70,
        80.0,
        140.0,
    )
    assert (second.last, second.lost_steps, second.parts.training, second.parts.lost) == (
        130,
        20,
        0.0,
        40.0,
    )
    assert (third.last, third.lost_steps, third.parts.training, third.parts.lost) == (
        60,
        0,
        40.0,
        0.0,
    )
    assert first.parts.stall == 900.0 - 220.0


def test_the_table_of_a_long_run_fits_a_terminal():
    cluster = Cluster()
    plan = {
        "queue": 300.0,
        "start_up": 60.0,
        "restore": 20.0,
        "steps": 5000,
        "pace": 2.0,
        "eval": 0.01,
        "save": 3.0,
    }
    plan |= {"every": 700, "silent": 55.0, "overhead": 0.002}
    for end in ("stopped", "killed", "stopped"):
        cluster.attempt({**plan, "end": end}, launcher=True)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(breakdown(cluster.events, cluster.now)))
    text = console.export_text()
    words = text.split()
    assert {"7.1", "killed", "5000-10000", "200", "steps", "total"} <= {*words}
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text

"""`logs/timeline-HOST.jsonl`: what it tells of a run that ended well, was stopped, or was
killed.
"""

import os
import time

import pytest

from dnt_scale.distributed.host import start_ticks
from dnt_scale.record import timeline
from dnt_scale.record.timeline import Clock
from testbed.run import STEPS, tiny, train


def kinds(events: list[timeline.Event]) -> list[str]:
    """The events' names but for checkpoints in place, several of progress in a row as one."""
    names = [event["event"] for event in events if event["event"] != "saved"]
    return [
        name
        for name, before in zip(names, ["", *names], strict=False)
        if (name, before) != ("progress",) * 2
    ]


def test_a_run_from_its_start_to_its_end(reference):
    events = timeline.read(reference)
    assert kinds(events) == ["start", "ready", "progress", "end"]
    assert [event["step"] for event in events if event["event"] == "saved"] == [6, 12, 18, STEPS]
    start, ready, *progress, end = events = [event for event in events if event["event"] != "saved"]
    assert start["ranks"] == 2 and ready["step"] == 0
    assert (end["outcome"], end["step"], progress[-1]["step"]) == ("FINISHED", STEPS, STEPS)
    assert len({event["attempt"] for event in events}) == 1
    times = [start["launched"], *(event["time"] for event in events)]
    assert times == sorted(times)
    spent = [event["seconds"] for event in progress]
    for kind in ("step", "eval", "save"):
        assert spent[-1][kind] > 0 and [seconds[kind] for seconds in spent] == sorted(
            s[kind] for s in spent
        )
    assert sum(spent[-1].values()) <= end["time"] - ready["time"]


def test_a_killed_run_has_no_end(killed):
    events = timeline.read(killed)
    assert kinds(events) == ["start", "ready", "progress"]
    assert next(event["step"] for event in events if event["event"] == "saved") == 3


def test_the_next_attempt_goes_on_below_a_torn_line(corpus, finished_run):
    path = timeline.path(finished_run)
    before = timeline.read(finished_run)
    torn = path.read_bytes()[:-9]
    path.write_bytes(torn)
    train(tiny(corpus, finished_run, "train.steps=22"), ranks=2, env={"DNT_ATTEMPT": "77.1"}).ok()
    assert path.read_bytes().startswith(torn + b"\n{")
    events = timeline.read(finished_run)
    assert events[: len(before) - 1] == before[:-1]
    later = events[len(before) - 1 :]
    assert kinds(later) == ["start", "ready", "progress", "end"]
    assert {event["attempt"] for event in later} == {"77.1"}
    assert later[1]["step"] == STEPS and later[1]["restored"] > 0
    assert (later[-1]["outcome"], later[-1]["step"]) == ("FINISHED", 22)


def test_a_timeline_that_cannot_be_written_ends_no_run(tmp_path):
    assert timeline.read(tmp_path) == []
    Clock(tmp_path, silent=True).tell("end")
    assert not any(tmp_path.iterdir())
    (tmp_path / "logs").touch()
    with pytest.raises(OSError):
        timeline.append(tmp_path, "start", attempt="a")
    Clock(tmp_path, silent=False).tell("end")
    assert timeline.read(tmp_path) == []


def test_what_is_no_event_is_left_out(tmp_path):
    timeline.append(tmp_path, "start", attempt="a", ranks=2)
    with timeline.path(tmp_path).open("ab") as file:
        file.write(b'[1]\n{"event": "end"}\n\xff\n')
    timeline.append(tmp_path, "end", attempt="a", step=3)
    assert [(event["event"], event.get("step")) for event in timeline.read(tmp_path)] == [
        ("start", None),
        ("end", 3),
    ]


def test_a_process_says_when_it_was_started_by_the_clock_that_its_events_have(monkeypatch):
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    booted = 5.0 + ticks / os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(
        time, "clock_gettime", lambda clock: booted if clock == time.CLOCK_BOOTTIME else 0.0
    )
    monkeypatch.setattr(time, "time", lambda: 1.79e9)
    assert timeline.launched() == pytest.approx(1.79e9 - 5.0, abs=1e-3)

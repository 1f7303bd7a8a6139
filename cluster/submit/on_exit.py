"""``python -m cluster.submit.on_exit FOLDER STATUS``: what the batch script runs once its srun has
ended with STATUS.

Decides whether the run is finished, goes on in this job (requeued) or a new one, or ends here; and
writes that down. SLURM may be about to kill the job, KillWait seconds (30 by default) after it
began to: nothing slow is imported here.
"""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster import run_record, slurm, sweep_jobs
from cluster.run_record import EndStatus, Next
from cluster.watch import run_state
from dnt_scale import startup
from dnt_scale.distributed import output
from dnt_scale.record import timeline
from dnt_scale.record.finalize import finalize_run

TAIL_BYTES = 1 << 20  # so much of a log's end is read
# SLURM may send --signal this much before its time.
SIGNAL_EARLY_S = 60.0
SIGNALLED = "Killed|Segmentation fault|Bus error|Aborted"
FIRST_END = r"^srun: error: (?:(\S+): tasks? \S+: (.*)|Node failure on (\S+).*)$"
STOPS = {
    128 + number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
}


@dataclass(frozen=True)
class Facts:
    """All that the decision depends on."""

    outcome: str | None  # training's last word: FINISHED, FAILED, KILLED
    exits: frozenset[int]  # exit statuses of the ranks that ended by themselves
    all_ended: bool  # every rank did
    srun: int  # srun's exit status
    cancelled: bool  # by `dnt cancel`
    slurm_ends_it: (
        bool  # SLURM is ending the job: a requeue, a cancellation, the time limit, a lost node
    )
    slurm_requeues_it: bool
    out_of_time: bool
    nearly_over: bool  # its time is, or was
    stepped: bool  # it came to its first step
    node_down: bool
    preempted: bool
    crashes: int  # in a row without a new checkpoint, this one included if it is one
    max_crashes: int


@dataclass(frozen=True)
class Decision:
    status: EndStatus
    goes_on: bool
    reason: str


def decide(facts: Facts) -> Decision:
    """Return what became of an attempt, and whether the run goes on."""
    if facts.outcome == "FINISHED":
        return Decision("finished", False, "the token budget is spent")
    if facts.cancelled:
        return Decision("cancelled", False, "dnt cancel")
    stopped = facts.outcome == "KILLED" or (
        facts.all_ended and bool(facts.exits & STOPS) and 1 not in facts.exits
    )
    if facts.slurm_requeues_it:
        return Decision("stopped" if stopped else "killed", True, "SLURM requeued the job")
    if facts.slurm_ends_it and not (facts.out_of_time or facts.node_down or facts.preempted):
        return Decision("cancelled", False, "the job was cancelled")
    if 2 in facts.exits:
        return Decision(
            "refused",
            False,
            "an error that has to be mended first; see `dnt logs`, then `dnt resubmit`",
        )
    if stopped and (facts.preempted or facts.stepped or not facts.nearly_over):
        why = "its time was up" if facts.nearly_over else "by a signal"
        return Decision("stopped", True, "preempted" if facts.preempted else why)
    if facts.crashes >= facts.max_crashes:
        return Decision(
            "crashed",
            False,
            f"{facts.crashes} crashes in a row without a new checkpoint (cluster.max_crashes)",
        )
    if facts.nearly_over and not facts.stepped:
        return Decision("crashed", True, "its time was up before the first step (cluster.time)")
    return Decision("crashed", True, f"exit status {facts.srun}")


def gather_facts(
    run_dir: Path, submission: run_record.Submission, attempt: str, srun_status: int
) -> Facts:
    events = timeline.read(run_dir)
    end = run_record.last_event(events, "end", attempt)
    exits = {status for _, status in run_record.read_exits(run_dir, attempt).values()}
    now = ask_slurm()
    ends_it = now is not None and now.state != "RUNNING"
    warned = time.time() + submission.cluster.signal_s + SIGNAL_EARLY_S
    this_crash = {"event": "ended", "time": time.time(), "attempt": attempt, "status": "crashed"}
    return Facts(
        outcome=end["outcome"] if end else None,
        exits=frozenset(exits),
        all_ended=len(run_record.read_exits(run_dir, attempt)) == submission.cluster.ranks,
        srun=srun_status,
        cancelled=submission.cancelled,
        slurm_ends_it=ends_it,
        node_down=now is not None and now.reason.startswith("Node"),
        slurm_requeues_it=now is not None
        and now.restarts > int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        out_of_time=now is not None and now.reason == "TimeLimit",
        nearly_over=now is not None
        and (now.reason == "TimeLimit" or (not ends_it and 0 < now.ends < warned)),
        stepped=run_record.last_event(events, "ready", attempt) is not None,
        preempted=now is not None and now.preempted,
        crashes=run_record.crashes_in_a_row(
            [*events, this_crash], run_record.newest_checkpoint(submission)
        ),
        max_crashes=submission.cluster.max_crashes,
    )


def main(run_dir: Path, srun_status: int) -> int:
    """Decide what is next for the run, do that and write it down; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # SLURM's, on its way to ending the job
    attempt = slurm.this_attempt()
    submission = run_record.read_submission(run_dir)
    end = run_record.last_event(timeline.read(run_dir), "ended", attempt)
    if end and end["next"] == "none":  # it did not begin, see cluster.job.rank_main
        finalize(run_dir, submission, end["status"])
        return 0
    facts = gather_facts(run_dir, submission, attempt, srun_status)
    decision = decide(facts)
    blamed, why = find_blamed(run_dir, submission, attempt, facts, decision)
    reason = f"{decision.reason}: {why}" if why else decision.reason
    then, words = go_on(run_dir, submission, facts, blamed) if decision.goes_on else ("none", "")
    if decision.goes_on and then == "none":
        reason = f"{reason}; {words}"
    record_end(run_dir, attempt, decision.status, then, reason, blamed)
    if then == "none":
        finalize(run_dir, submission, decision.status)
    elif words:
        print(f"dnt: {words}", flush=True)
    return 0


def find_blamed(
    run_dir: Path,
    submission: run_record.Submission,
    attempt: str,
    facts: Facts,
    decision: Decision,
) -> tuple[list[str], str]:
    """Return the hosts at fault for the end of an attempt, and why: by a rank's word, else srun's,
    else because theirs alone failed. None where nothing failed, or nobody knows."""
    # Ranks that stop for a signal may miss each other too, which is nobody's fault.
    failed = decision.status in ("crashed", "killed")
    if not failed or (facts.nearly_over and not facts.stepped):
        return [], ""
    blamed, why = run_record.blamed_hosts(timeline.read(run_dir), attempt)
    if not why:
        blamed, why = find_killed_host(submission.logs / f"{slurm.this_job()}_0_log.out")
    if not why:
        blamed, why = find_failed_host(run_record.read_exits(run_dir, attempt))
    return blamed, why


def go_on(
    run_dir: Path, submission: run_record.Submission, facts: Facts, blamed: list[str]
) -> tuple[Next, str]:
    """Let a job go on with the run, without nodes that failed too often, unless SLURM did.

    Returns:
        As :func:`requeue_or_resubmit`.
    """
    if facts.slurm_requeues_it:
        return "requeued", ""
    this_end = {"event": "ended", "time": time.time(), "attempt": "", "blamed": blamed}
    excluded = run_state.nodes_to_leave_out(
        submission.cluster, [*timeline.read(run_dir), this_end], submission.excluded
    )
    return requeue_or_resubmit(run_dir, submission, excluded)


def record_end(
    run_dir: Path,
    attempt: str,
    status: EndStatus,
    then: Next,
    reason: str,
    blamed: list[str],
) -> None:
    """Write down how the attempt ended and what is next, and print it."""
    try:
        run_record.record_end(run_dir, attempt, status, then, reason, blamed)
    except OSError as error:  # a full disk: `dnt jobs` finds the end out
        print(f"dnt: {error}", flush=True)
    print(f"dnt: attempt {attempt} {status} ({reason}); {_NEXT_IN_WORDS[then]}", flush=True)


def finalize(run_dir: Path, submission: run_record.Submission, status: EndStatus) -> None:
    """Let MLflow have the true end of a run with which nothing goes on, and of its sweep."""
    finalize_run(run_dir, run_record.MLFLOW_STATUS[status])
    if submission.parent:
        sweep_jobs.finalize_sweep(run_dir.parent)


def ask_slurm() -> slurm.Job | None:
    """Return SLURM's word on this job; None where it does not answer in a minute, and the run goes
    on without it."""
    for pause in (2, 5, 10, 20, 0):
        try:
            return slurm.job(slurm.this_job())
        except slurm.SlurmError as error:
            print(f"dnt: {error}", flush=True)
            time.sleep(pause)
    return None


def requeue_or_resubmit(
    run_dir: Path, submission: run_record.Submission, excluded: list[str]
) -> tuple[Next, str]:
    """Requeue this job or, where that is not permitted or other nodes are wanted, submit another
    one.

    A busy or restarting controller is asked again, over some minutes.

    Returns:
        What goes on, and what there is to say about it: a new job's number, or why nothing does.
    """
    this, words = slurm.this_job(), ""
    for pause in (0, 5, 15, 30, 60, 120):
        time.sleep(pause)
        try:
            if submission.cluster.requeue and excluded == submission.excluded:
                slurm.requeue(this)
                return "requeued", ""
        except slurm.SlurmError as error:
            print(f"dnt: {error}; submitting a new job instead", flush=True)
        # This imports submitit, for which a job that is being killed may have no time.
        from cluster.submit.single_run import enqueue

        run_record.update_submission(run_dir, partial(leaving_out, nodes=excluded))
        try:
            job = enqueue(run_dir, by_user=False).job
            return "resubmitted", f"job {job} goes on" + (
                f", without {', '.join(excluded)}" if excluded else ""
            )
        except slurm.SlurmError as error:
            words = str(error)
            print(f"dnt: {words}", flush=True)
        excluded = submission.excluded  # it may be these that SLURM refuses
        run_record.update_submission(run_dir, partial(leaving_out, nodes=excluded))
    return "none", words


def leaving_out(submission: run_record.Submission, nodes: list[str]) -> run_record.Submission:
    return submission.model_copy(update={"excluded": nodes})


def find_killed_host(log: Path) -> tuple[list[str], str]:
    """Return the host of the first rank that a signal ended in the newest attempt, and srun's words
    for it, from the log.

    srun then ends the other ranks, often before they can say which one they miss.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return [], ""
    attempt = text[max(0, text.rfind("Starting with JobEnvironment")) :]
    found = re.search(FIRST_END, attempt, re.MULTILINE)  # srun kills the others after it
    if found is None or not re.match(f"{SIGNALLED}|$", found[2] or ""):
        return [], ""
    return [found[1] or found[3]], found[0].removeprefix("srun: error: ")


def find_failed_host(exits: dict[int, tuple[str, int]]) -> tuple[list[str], str]:
    """Return the host whose ranks alone failed by themselves, as those of a dead GPU do; srun ended
    the others."""
    hosts = {host for host, status in exits.values() if status == 1}
    if len(hosts) != 1 or hosts == {host for host, _ in exits.values()}:
        return [], ""
    return list(hosts), f"a rank on {min(hosts)} failed"


_NEXT_IN_WORDS: dict[Next, str] = {
    "requeued": "this job is requeued",
    "resubmitted": "a new job goes on",
    "none": "nothing goes on by itself",
}


if __name__ == "__main__":
    startup.leave_folder_out()
    output.guard()  # a full disk takes no line more
    sys.exit(main(sweep_jobs.run_of_task(Path(sys.argv[1])), int(sys.argv[2])))

"""Measure checkpoints on tasks of lm-evaluation-harness, every ``eval.tasks.every`` steps.

`dnt lm-eval` does it, in a process of rank 0's that training does not wait for: on the CPU, since a
GPU that trains has no memory to spare, and with what time the ranks leave. Its results lie in the
run folder and go to trackers as those of the command do.
"""

import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress

from dnt_scale.distributed.agree import highest
from dnt_scale.distributed.heartbeat import moving
from dnt_scale.record.sender_process import module_command, sender_environment
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.launch import complaint
from dnt_scale.train.setup import Step, Training

LOG = "logs/lm-eval.log"  # of the run folder: what the last measurement said
POLL_S = 0.2
NICENESS = 10  # training goes first
LIMIT = 500  # characters of a reason


class EvalTasks(Hook):
    """Measures one checkpoint at a time, once it is in place; it is not removed meanwhile.

    A step whose turn comes while an earlier one is still measured is left out, but the run's last
    step, which is waited for.
    """

    def __init__(self) -> None:
        self.due: int | None = None  # the step whose checkpoint is measured once it is in place
        self.step = 0  # that is measured
        self.process: subprocess.Popen[bytes] | None = None  # rank 0's

    def after_step(self, run: Training, step: Step) -> None:
        """Begin where a checkpoint is in place; the one of the last step is for later."""
        every = run.config.eval.tasks.every
        if not every:
            return
        self.look(run)
        self.begin_if_written(run)  # an earlier step's, which may have taken until now
        if step.number % every == 0:
            self.due = step.number
        if not (step.last or run.halted):
            self.begin_if_written(run)  # this step's, without checkpoint.background

    def after_training(self, run: Training) -> None:
        """Wait for what is measured, and measure the last checkpoint; not where a signal ends the
        run. A collective.
        """
        if not run.config.eval.tasks.every or run.stopped_by:
            return
        if self.waited(run) and self.due is not None:
            self.begin(run)
            self.waited(run)

    def close(self, run: Training) -> None:
        """End the process that is still at work, and tell what was not measured."""
        self.look(run)
        left = [self.due] if self.due is not None else []
        if self.process:
            left.insert(0, self.step)
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for step in left:
            command = shlex.join(["dnt", *words(run, step)])
            say(run, step, f"not measured, for the run ends; `{command}` does that")

    def begin_if_written(self, run: Training) -> None:
        """Begin with the checkpoint that is due if it is in place, unless an earlier one is still
        measured.
        """
        if self.due is None or run.saver.written != self.due or run.stopped_by:
            return
        if self.process:
            say(run, self.due, f"left out, for step {self.step} is still being measured")
            self.due = None
        else:
            self.begin(run)

    def begin(self, run: Training) -> None:
        """Start to measure the checkpoint that is due, on rank 0."""
        assert self.due is not None
        self.step, self.due = self.due, None
        if not run.ranks.first:
            return
        first = f"from dnt_scale import startup; startup.end_with_parent({os.getpid()})"
        command = module_command("dnt_scale.cli", *words(run, self.step), first=first)
        log = run.config.run.dir / LOG
        try:
            log.parent.mkdir(exist_ok=True)
            with log.open("wb") as out:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=sender_environment(),
                    process_group=0,  # a Ctrl-C that is meant for training misses it
                )
        except OSError as error:  # training goes on
            say(run, self.step, f"not measured: {error}")
            return
        run.saver.read_by_others = self.step
        with suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PGRP, self.process.pid, NICENESS)

    def look(self, run: Training) -> None:
        """Tell how the process went, where it has ended."""
        if self.process is None or (status := self.process.poll()) is None:
            return
        self.process = run.saver.read_by_others = None
        if status == 0:
            say(run, self.step, "measured, see lm_eval.jsonl")
        elif status < 0:
            say(run, self.step, f"not measured: killed ({signal.Signals(-status).name})")
        else:
            reason = " ".join(complaint(run.config.run.dir / LOG).split())
            say(run, self.step, f"not measured: {reason[:LIMIT]}; see {LOG}")

    def waited(self, run: Training) -> bool:
        """Wait for the process, and return whether no signal came meanwhile. A collective."""
        told = False
        with run.clock.spending("eval"):
            while True:
                self.look(run)
                signals = int(bool(run.signals))
                at_work, stopped = highest(int(self.process is not None), signals)
                if stopped or not at_work:
                    return not stopped
                if not told:
                    say(run, self.step, f"waiting until it is measured, as {LOG} tells")
                    told = True
                moving()
                time.sleep(POLL_S)


def words(run: Training, step: int) -> list[str]:
    """Return the words of `dnt` that measure a checkpoint."""
    tasks = run.config.eval.tasks
    limit = [] if tasks.limit is None else ["--limit", str(tasks.limit)]
    folder = str(run.config.run.dir.absolute())
    return ["lm-eval", folder, "--step", str(step), "--tasks", *tasks.names, *limit]


def say(run: Training, step: int, what: str) -> None:
    """Show a line, on rank 0."""
    run.progress.say(f"eval.tasks: step {step}: {what}")

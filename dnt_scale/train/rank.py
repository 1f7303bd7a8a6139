"""Be one rank of a run: ``torchrun ... -m dnt_scale.train``, ``srun python -m dnt_scale.train``,
``dnt train``.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dnt_scale import config, startup
from dnt_scale.config import RunConfig
from dnt_scale.distributed import output, process_group, threads
from dnt_scale.distributed.errors import AgreedError, Fault, exit_status, lost_peer, out_of_memory
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.distributed.watchdog import watching
from dnt_scale.record.files import warn
from dnt_scale.record.timeline import telling
from dnt_scale.train.loop import train
from dnt_scale.train.out_of_memory import out_of_memory_message
from dnt_scale.train.recorded import Typed
from dnt_scale.train.run_start import begun_on_all, check_no_job, only_writer

FROM_STEP = "--from-step="


def main(words: list[str], check_no_job: Callable[[Path], None] = check_no_job) -> int:
    """Train what ``words``, overrides and ``--fresh`` or ``--from-step=N``, describe, and return
    the exit status, see ``run_rank``.
    """
    output.guard()
    rank = 0
    overrides = overrides_of(words)
    try:
        startup.check_folder()
        rank, _, _ = process_group.environment()
        run = config.load(overrides)
        from_step = earlier_step(words)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        else:
            # Most often all find the same, and torchrun ends them as soon as the first has ended.
            time.sleep(1.0)
            print(f"rank {rank}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return run_rank(
        run,
        typed=Typed(overrides),
        fresh=asked_anew(words),
        from_step=from_step,
        check_no_job=check_no_job,
    )


def asked_anew(words: Sequence[str]) -> bool:
    """Whether to begin anew, at a first start."""
    return "--fresh" in words and first_start("--fresh")


def overrides_of(words: Sequence[str]) -> list[str]:
    """Return the words of a command without what it says of its start alone."""
    return [word for word in words if word != "--fresh" and not word.startswith(FROM_STEP)]


def earlier_step(words: Sequence[str]) -> int | None:
    """Return the step of ``--from-step=N``, None without it. Raises ConfigError for no number, or
    beside ``--fresh``.
    """
    given = [word.removeprefix(FROM_STEP) for word in words if word.startswith(FROM_STEP)]
    if not given:
        return None
    if "--fresh" in words:
        raise config.ConfigError(
            "--from-step: goes on with a run, and --fresh begins one anew; give one of them"
        )
    if not (given[-1].isascii() and given[-1].isdigit()):
        raise config.ConfigError(f"--from-step: found {given[-1]!r}, expected a step, such as 800")
    return int(given[-1]) if first_start("--from-step") else None


def first_start(option: str) -> bool:
    """Whether an option counts that is for the first start: not where a launcher restarts what it
    has begun.
    """
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if (count := os.environ.get(name, "0")) not in ("", "0"):
            warn(
                f"{option} is for the first start; this is restart {count} ({name}), which goes on"
            )
            return False
    return True


def run_rank(
    run: RunConfig,
    before: Callable[[Ranks], None] | None = None,
    *,
    typed: Typed = Typed(whole=True),  # noqa: B008
    fresh: bool = False,
    from_step: int | None = None,
    check_no_job: Callable[[Path], None] = check_no_job,
) -> int:
    """Be one rank of ``run``: meet the others, train, and return the exit status.

    Args:
        before: called once the ranks have met and no other process writes the run folder, before
            anything else.
        typed: what was typed to get ``run``; the rest is as the run's checkpoint records it.
        fresh: move aside what an earlier run has left, and begin at step 0.
        from_step: move aside what came after this step, and go on from there.
        check_no_job: see ``only_writer``.

    Returns:
        0 when the run is complete; 1 after a fault that another try may not meet (a lost rank, a
        hang); 2 after an error that the user has to mend; 128 + n when signal n stopped the run,
        with a checkpoint.
    """
    output.guard()
    rank = 0
    try:
        rank, _, _ = process_group.environment()
        ranks = process_group.start(run.run.device, run.health.hang_s)
        if ranks.device.type == "cpu":
            startup.keep_memory()
        with (
            watching(ranks, run.health.hang_s, telling(run.run.dir)),
            only_writer(run, ranks, check_no_job),
        ):
            threads.share_cpus(ranks)
            if before:
                before(ranks)
            begun = begun_on_all(run, ranks, typed, fresh=fresh, from_step=from_step)
            run = begun.run
            status = train(begun, ranks)
    except AgreedError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        status = exit_status(error)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        speaker = "" if rank == 0 else f"rank {rank}: "
        if out_of_memory(error):
            print(f"{speaker}error: {out_of_memory_message(ranks, run)}", file=sys.stderr)
        elif isinstance(error, ValueError | OSError):
            print(f"{speaker}error: {error}", file=sys.stderr)
        elif isinstance(error, RuntimeError) and lost_peer(error):
            reason = str(error).splitlines()[0]
            print(
                f"rank {rank}: stopped, for another rank ended before it ({reason})",
                file=sys.stderr,
            )
            error = Fault(reason)
        else:
            raise
        status = exit_status(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    process_group.stop()
    return status

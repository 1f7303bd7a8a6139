"""`dnt data prepare --cluster` and `dnt data images --cluster`: for text a job that trains the
tokenizer, then an array of tasks, and a job that puts the parts together.

They do what the same command does without ``--cluster``, in the same work folder and to the same
bytes. What they need, and what became of them, lies beside the set, for its owner only:

    .SET.prepare/prepare.json        what was asked for, and the jobs (:class:`PrepareOrder`)
    .SET.prepare/jobs/code/ slurm/   the packages as they were then, and the logs, as in a run's
    .SET.prepare/ended/PART.json     how a part ended last: status, message
"""

import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import submitit
from pydantic import Discriminator, Tag, ValidationError

from cluster import cluster_config, run_record, slurm
from cluster.cluster_config import ClusterConfig
from cluster.run_record import RecordError, Submission
from cluster.slurm import Job
from cluster.submit import checks, single_run
from cluster.submit.data_prep_kinds import (
    AnyOptions,
    kind_of,
    option_tag,
    places,
    trains_tokenizer,
)
from data_prep import pipeline
from data_prep.images.options import ImageOptions
from data_prep.options import PrepareOptions
from data_prep.set_files import MANIFEST, PARTIAL
from data_prep.words import counted, first_problem
from dnt_scale.config import ConfigError, Strict, config_dir
from dnt_scale.record.files import read_json, write_json

MOST_TASKS = 16  # unless it is said how many
TOKENIZER, MERGE = "tokenizer", "merge"  # the other parts are task-0, task-1, ...


class PrepareOrder(Strict):
    """``prepare.json``."""

    # rules of ours by their place in configs/
    asked: Annotated[
        Annotated[PrepareOptions, Tag("text")] | Annotated[ImageOptions, Tag("images")],
        Discriminator(option_tag),
    ]
    here: Path  # where relative paths are seen from
    umask: int  # the user's, for the files of the set
    tasks: int
    jobs: dict[str, str]  # the newest job of each part; of an array's task ARRAY_TASK

    @property
    def parts(self) -> list[str]:
        """Return the parts in the order of their work."""
        return [
            *([TOKENIZER] if trains_tokenizer(self.asked) else []),
            *(f"task-{number}" for number in range(self.tasks)),
            MERGE,
        ]

    def same_set(self, other: "PrepareOrder") -> bool:
        return (replace(self.asked, workers=1), self.here) == (
            replace(other.asked, workers=1),
            other.here,
        )

    @property
    def options(self) -> AnyOptions:
        """Return what was asked for, with rules of ours from the configs in use; in a job these are
        the snapshot's."""
        if isinstance(self.asked, ImageOptions):
            return self.asked
        return replace(self.asked, rules=self.asked.rules and config_dir() / self.asked.rules)


def main(options: AnyOptions, overrides: list[str], tasks: int | None, *, dry_run: bool) -> int:
    """Queue the jobs that make a set; or tell how far they are, where the same command has queued
    them before.

    Args:
        overrides: the cluster's name, then cluster.KEY=VALUE.
        tasks: parts of the work; None: one a unit of the input, at most MOST_TASKS.

    Returns:
        The exit status.

    Raises:
        ValueError, OSError: as preparing here and :mod:`cluster.submit.checks` do;
            SlurmError when SLURM refuses a job; RecordError while jobs of another command make a
            set in the same folder.
    """
    folder = state_folder(options.out)
    asked, site = on_cluster(options, overrides)
    order = PrepareOrder(asked=asked, here=Path.cwd(), umask=umask(), tasks=tasks or 1, jobs={})
    if not dry_run and report_earlier_jobs(order, folder, tasks):
        return 0
    units = check_before_queue(order, site)
    begun = read_order(folder).tasks if (folder / "prepare.json").exists() else None
    order = order.model_copy(update={"tasks": tasks or begun or min(MOST_TASKS, units)})
    if dry_run:
        kind_of(order.asked).print_plan(order.options)
        print(f"\n{batch_script(order, folder, site)}")
        others = [f"{part} job" for part in order.parts if part in (TOKENIZER, MERGE)]
        print(
            f"\n# above: the array of {counted(order.tasks, 'task')}; like it, each once: "
            f"{', '.join(others)}"
        )
        return 0
    order = enqueue(order, folder, site)
    print(format_progress(order, folder, slurm.queue()))
    print(
        "the same command tells how far they are, and after a failure queues again what is missing"
    )
    return 0


def state_folder(out: Path) -> Path:
    """Return where a set's jobs keep what they need: hidden, for it must not become an input of a
    set that is made from the folder around it."""
    return out.absolute().parent / f".{out.name}.prepare"


def on_cluster(options: AnyOptions, overrides: list[str]) -> tuple[AnyOptions, ClusterConfig]:
    """Return the options and the cluster of the jobs: one rank with a CPU a worker.

    Raises:
        ConfigError: no such cluster, or a wrong value.
    """
    name, *changes = overrides
    site, others = cluster_config.read_cluster([f"cluster={name}", *changes])
    if others:
        raise ConfigError(
            f"--cluster: after the name it takes cluster.KEY=VALUE, found {others[0]}; put INPUT "
            "first"
        )
    workers = options.workers or site.cpus_per_rank or 1
    site = site.model_copy(
        update={
            "nodes": 1,
            "ranks_per_node": 1,
            "gpus_per_node": 0,
            "cpus_per_rank": workers,
            "signal": "USR1",
        }
    )
    if isinstance(options, PrepareOptions) and (rules := options.rules):
        ours = rules.is_relative_to(config_dir())
        rules = rules.relative_to(config_dir()) if ours else rules.absolute()
        options = replace(options, rules=rules)
    return replace(options, workers=workers), site


def umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


# --- what is on disk ------------------------------------------------------------------------------


def read_order(folder: Path) -> PrepareOrder:
    """Read prepare.json. Raises RecordError when it cannot be read, or is another user's."""
    file = folder / "prepare.json"
    try:
        run_record.check_owner(file)
        return PrepareOrder.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecordError(
            f"{file}: cannot be read ({first_problem(error)}); delete {folder}"
        ) from None


def write_order(folder: Path, order: PrepareOrder) -> None:
    write_json(folder / "prepare.json", order.model_dump(mode="json"))


def ended_file(folder: Path, part: str) -> Path:
    return folder / "ended" / f"{part}.json"


def is_done(folder: Path, part: str) -> bool:
    return read_json(ended_file(folder, part)).get("status") == 0


def is_made(order: PrepareOrder) -> bool:
    return (order.asked.out / MANIFEST).exists()


def log_of(folder: Path, job_id: str) -> Path:
    return run_record.jobs_folder(folder) / "slurm" / f"{job_id}_0_log.out"


# --- what became of it ----------------------------------------------------------------------------


def report_earlier_jobs(order: PrepareOrder, folder: Path, tasks: int | None) -> bool:
    """Tell what became of the jobs of an earlier call; whether they are at work or have made the
    set.

    Raises:
        RecordError: jobs of a command with other options are at work on the same folder.
        ValueError: the set is there, and another command made it.
    """
    before = read_order(folder) if (folder / "prepare.json").exists() else None
    queue = slurm.queue() if before else {}
    live = [job for job in before.jobs.values() if job in queue] if before else []
    same = before is not None and before.same_set(order)
    if live and not same:
        raise RecordError(
            f"{order.asked.out}: jobs of a command with other options are at work on it; wait for "
            f"them, or `scancel {format_job_ids(live)}`"
        )
    if before and same and (live or is_made(order)):
        print(format_progress(before, folder, queue))
        if is_made(order):
            kind_of(order.asked).print_info(order.asked.out)
        return True
    if is_made(order):
        raise ValueError(
            f"{order.asked.out}: already holds a prepared set; choose another --out, or delete it "
            "first"
        )
    kept = (order.asked.out / PARTIAL).exists() or not (
        before and any(is_done(folder, p) for p in before.parts)
    )
    if before and same and kept and tasks in (None, before.tasks):
        print(format_progress(before, folder, queue) + "\n\nqueued again, what is not finished:\n")
    else:
        shutil.rmtree(folder / "ended", ignore_errors=True)
        (folder / "prepare.json").unlink(missing_ok=True)
    return False


def format_progress(order: PrepareOrder, folder: Path, queue: dict[str, Job]) -> str:
    """Return how far the jobs are, in lines."""
    found = {part: part_status(order, folder, queue, part) for part in order.parts}
    lines = []
    for name in (TOKENIZER, "task", MERGE):
        parts = [part for part in order.parts if part.startswith(name)]
        counts = Counter(found[part][0] for part in parts)
        if parts:
            jobs = format_job_ids([order.jobs[part] for part in parts if part in order.jobs])
            words = ", ".join(
                f"{count} {state}" if name == "task" else state for state, count in counts.items()
            )
            title = counted(len(parts), "task") if name == "task" else name
            lines.append(f"{title:12}{f'job {jobs}' if jobs else '':14}{words}")
    for part, (state, why) in found.items():
        if why and state == "failed":
            lines.append(f"{part} failed: {why}; its log is {log_of(folder, order.jobs[part])}")
    return "\n".join(
        [f"{order.asked.out}: {'made' if is_made(order) else 'in the making'}", *lines]
    )


def part_status(
    order: PrepareOrder, folder: Path, queue: dict[str, Job], part: str
) -> tuple[str, str]:
    """Return what a part is doing, and why where it failed."""
    job_id = order.jobs.get(part, "")
    if is_done(folder, part):
        return "finished", ""
    if job := queue.get(job_id):
        waits = "queued" + (f" ({job.reason})" if job.reason else "")
        return (waits if job.state == "PENDING" else job.state.lower()), ""
    if end := read_json(ended_file(folder, part)):
        return "failed", str(end["message"])
    last = slurm.job(job_id) if job_id else None
    if last and last.state not in ("CANCELLED", "PENDING"):
        return "failed", f"it ended without a word, SLURM says {last.state}"
    return "not finished", ""


def format_job_ids(jobs: list[str]) -> str:
    """Return job ids as scancel takes them, an array's once."""
    return " ".join(dict.fromkeys(job.partition("_")[0] for job in jobs))


# --- into the queue -------------------------------------------------------------------------------


def check_before_queue(order: PrepareOrder, site: ClusterConfig) -> int:
    """Return how many units the input has, once nothing speaks against making it on the cluster.

    Raises:
        ValueError, OSError: see :func:`main`.
    """
    slurm.check_here()
    checks.check_logins(site)
    found = slurm.partitions()
    partition = checks.choose_partition(site, found)
    checks.check_limits(site, partition)
    checks.check_nodes(site, partition, {node.name for one in found.values() for node in one.nodes})
    checks.check_account(site)
    checks.check_signal(site)
    options = order.options
    if "-" in map(str, options.inputs):
        raise ValueError("-: jobs cannot read standard input; write it to a file first")
    checks.check_places_shared(places(options), site, partition.nodes)
    units = kind_of(options).count_units(options)
    slurm.expected_start(batch_script(order, state_folder(options.out), site))
    return units


def batch_script(order: PrepareOrder, folder: Path, site: ClusterConfig) -> str:
    """Return the script of the array of tasks, made without its folder; those of the other jobs ask
    for the same."""
    executor = executor_for(order, folder, site, "task", array=True)
    executor.update_parameters(array_parallelism=order.tasks)
    return single_run.format_script(executor, order.tasks)


def enqueue(order: PrepareOrder, folder: Path, site: ClusterConfig) -> PrepareOrder:
    """Queue a job for each part that is not finished, each after those it needs; returns the order
    with their ids.

    Raises:
        SlurmError: SLURM refuses a job; none stays in the queue then.
        RecordError: another command queues them just now.
        OSError: the folder cannot be written.
    """
    single_run.make_private(folder)
    ended_file(folder, MERGE).parent.mkdir(exist_ok=True)
    with single_run.submission_lock(folder):
        single_run.copy_code(folder)
        before = read_order(folder).jobs if (folder / "prepare.json").exists() else {}
        missing = [part for part in order.parts if not is_done(folder, part)]
        jobs = {
            part: job for part, job in before.items() if part in order.parts and part not in missing
        }
        # Written before there are jobs: they may start at once.
        write_order(folder, order.model_copy(update={"jobs": jobs}))
        queued: list[str] = []
        try:
            for stage in (TOKENIZER, "task", MERGE):
                parts = [part for part in missing if part.startswith(stage)]
                new = queue_stage(order, folder, site, stage, parts, after=queued[-1:])
                jobs |= new
                queued += list(new.values())[-1:]
        except BaseException:
            if queued:
                slurm.cancel(*format_job_ids(queued).split())
            raise
        order = order.model_copy(update={"jobs": jobs})
        write_order(folder, order)
    return order


def queue_stage(
    order: PrepareOrder,
    folder: Path,
    site: ClusterConfig,
    stage: str,
    parts: list[str],
    after: list[str],
) -> dict[str, str]:
    """Queue an array, or a single job, of parts; returns the job of each."""
    if not parts:
        return {}
    for part in parts:
        ended_file(folder, part).unlink(missing_ok=True)
    executor = executor_for(order, folder, site, stage, after, array=len(parts) > 1)
    executor.update_parameters(array_parallelism=len(parts))
    try:
        with executor.batch():
            queued = [executor.submit(work, str(folder), part) for part in parts]
    except submitit.core.utils.FailedJobError as error:
        raise slurm.SlurmError(
            f"SLURM refuses the job: {single_run.sbatch_complaint(str(error))}"
        ) from None
    return {part: job.job_id for part, job in zip(parts, queued, strict=True)}


def executor_for(
    order: PrepareOrder,
    folder: Path,
    site: ClusterConfig,
    stage: str,
    after: list[str] | None = None,
    *,
    array: bool,
) -> submitit.SlurmExecutor:
    job = Submission(
        name=f"{order.asked.out.name}-{stage}",
        cluster=site,
        logs=run_record.jobs_folder(folder) / "slurm",
    )
    executor = single_run.executor_for(folder, job, array=array)
    more = {**executor.parameters["additional_parameters"], "kill-on-invalid-dep": "yes"}
    executor.update_parameters(teardown=None, additional_parameters=more)
    if after:
        executor.update_parameters(dependency=f"afterok:{format_job_ids(after)}")
    return executor


# --- in a job -------------------------------------------------------------------------------------


def work(folder: str, part: str) -> None:
    """Make one part, and write down how that ended; submitit calls it. Ends the process, unless the
    status is 0."""
    place = Path(folder)
    order = read_order(place)
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        """End for a signal of SLURM's: the time is up, or the job is cancelled or preempted.
        Finished pieces are kept."""
        for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(other, signal.SIG_IGN)
        caught.append(number)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    ended_file(place, part).unlink(missing_ok=True)  # an earlier start may have left one
    os.chdir(order.here)
    os.umask(order.umask)
    status, message = 1, "an error of ours"
    try:
        if not is_made(order):  # an earlier start may have made it and been ended right after
            make_part(order, part)
        status, message = 0, ""
    except (ValueError, OSError) as error:
        status, message = 2, str(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        if caught:  # worker processes get the signal too, and may fail first
            name = signal.Signals(caught[0]).name
            status, message = (
                128 + caught[0],
                f"ended by {name}: its time was up, or it was preempted or cancelled",
            )
        write_json(ended_file(place, part), {"status": status, "message": message})
    if status:
        sys.exit(status)


def make_part(order: PrepareOrder, part: str) -> None:
    options = order.options
    if part == TOKENIZER:
        assert isinstance(options, PrepareOptions)
        pipeline.train_tokenizer_first(options)
        return
    if part != MERGE:
        options = replace(options, task=(int(part.removeprefix("task-")), order.tasks))
    kind_of(options).prepare(options)

"""`dnt submit` and `dnt resubmit`: a run folder with all that its jobs need, then a job that trains
it."""

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import submitit

import cluster
import data_prep
import dnt_scale
from cluster import cluster_config, run_record, slurm
from cluster.cluster_config import ClusterConfig
from cluster.job import rank_main
from cluster.run_record import RecordError, Submission
from cluster.watch import run_state
from cluster.watch.run_state import SlurmQuery
from data_prep.files import file_lock
from dnt_scale import config, startup
from dnt_scale.config import RunConfig, config_dir
from dnt_scale.record import timeline
from dnt_scale.record.files import git_commit
from dnt_scale.record.run_lock import held
from dnt_scale.sweep.sweep_file import is_sweep
from dnt_scale.train.recorded import Typed
from dnt_scale.train.run_start import begin, make_room


def submit(
    run: RunConfig, site: ClusterConfig, *, given: Sequence[str] = (), fresh: bool = False
) -> Submission:
    """Make the run folder and queue the run's first job.

    Args:
        given: what was typed to get ``run``.
        fresh: move aside what is in the folder.

    Raises:
        RecordError: the run was submitted before, or with ``fresh`` its job is in the queue or
            running.
        ConfigError: a process writes the run folder.
        SlurmError: SLURM refuses the job.
        OSError: the run folder cannot be written.
    """
    run_dir = run.run.dir.absolute()
    run = placed_in(run, run_dir)  # from whatever folder it goes on
    check_new(run, fresh=fresh)
    make_private(run_dir)
    with held(run_dir, "dnt submit"), submission_lock(run_dir):
        check_new(run, fresh=fresh)
        if fresh:
            make_room(begin(run, Typed(whole=True), fresh=True))
            make_private(run_dir)
        copy_code(run_dir)
        run_record.config_file(run_dir).write_text(config.to_yaml(run))
        run_record.write_given(run_dir, given)
        logs = run_record.jobs_folder(run_dir) / "slurm"
        try:
            here = {"slurm": slurm.cluster_name(), "checkpoints": checkpoints_of(run)}
            run_record.write_submission(
                run_dir, Submission(name=run.run.name, cluster=site, logs=logs, **here)
            )
            return enqueue(run_dir, by_user=True)
        except BaseException:
            # Without run.json it can be submitted again.
            (run_record.jobs_folder(run_dir) / "run.json").unlink(missing_ok=True)
            raise


def checkpoints_of(run: RunConfig) -> str:
    """Return where the checkpoints are to lie, from whatever folder that is asked."""
    place = run.checkpoints
    return str(place.absolute()) if isinstance(place, Path) else place


def check_new(run: RunConfig, *, fresh: bool = False) -> None:
    """Raise RecordError when the run, or a sweep of its name, was submitted before; if ``fresh``,
    when it is live."""
    if is_sweep(run.run.dir):
        raise RecordError(
            f"run.name: {run.run.name} is a sweep, see `dnt jobs {run.run.dir}`; take another "
            "run.name"
        )
    if fresh and run_record.is_submitted(run.run.dir):
        check_no_live_job(run.run.dir, run_record.read_submission(run.run.dir))
    elif run_record.is_submitted(run.run.dir):
        jobs = run_record.read_submission(run.run.dir).jobs
        raise RecordError(
            f"run.name: {run.run.name} was submitted before{f' (job {jobs[-1]})' if jobs else ''}; "
            f"`dnt resubmit {run.run.dir}` goes on with it, --fresh begins anew, or take another "
            "run.name"
        )


def change_run(run_dir: Path, overrides: list[str]) -> tuple[RunConfig, ClusterConfig]:
    """Return a submitted run and its cluster, changed by ``overrides``, for :func:`resubmit`.

    Raises:
        RecordError: it was never submitted, is another user's, or its job is in the queue or
            running.
        ConfigError: a wrong override.
        SlurmError: there is no SLURM here, or not the one that has its jobs.
    """
    submission = run_record.read_submission(run_dir)
    check_no_live_job(run_dir, submission)
    ours, overrides = cluster_config.split_overrides(overrides)
    site = cluster_config.change_cluster(submission.cluster, ours)
    run = config.changed(config.from_yaml(run_record.config_file(run_dir)), overrides)
    return placed_in(run, run_dir), site


def placed_in(run: RunConfig, run_dir: Path) -> RunConfig:
    """Return the run in ``run_dir``, wherever that folder was when it was submitted."""
    return run.model_copy(update={"run": run.run.model_copy(update={"dir": run_dir.absolute()})})


def check_no_live_job(run_dir: Path, submission: Submission) -> None:
    """Raise RecordError while a job of the run is in the queue or running, SlurmError where SLURM
    cannot tell."""
    if submission.jobs:
        query = SlurmQuery()
        last = query.job(submission)
        told = run_state.decide_status(
            submission, timeline.read(run_dir), None, time.time(), asked=False
        )
        if query.problem and told.live:  # one that is over may go on with another SLURM
            raise slurm.SlurmError(f"{run_dir}: {query.problem}")
        if last and last.live:
            raise RecordError(
                f"{run_dir}: job {last.id} of it is {last.state.lower()}; `dnt cancel {run_dir}` "
                "ends it first"
            )


def resubmit(
    run_dir: Path, run: RunConfig, site: ClusterConfig, *, update_code: bool
) -> Submission:
    """Queue a job that goes on with a run whose last job is over, as ``run`` and on ``site``: see
    :func:`change_run`.

    Raises:
        RecordError: as :func:`change_run`, or another command submits it just now.
        ConfigError: a process writes the run folder.
        SlurmError: SLURM refuses the job.
    """
    run_dir = run_dir.absolute()
    if (
        not update_code
        and not (run_record.jobs_folder(run_dir) / "code/cluster/job/rank_main.py").exists()
    ):
        raise RecordError(
            f"{run_dir}: was submitted by an older dnt, whose jobs begin otherwise; add "
            "--update-code"
        )
    with held(run_dir, "dnt resubmit"), submission_lock(run_dir):
        submission = run_record.read_submission(run_dir)
        check_no_live_job(run_dir, submission)
        events, last = (
            timeline.read(run_dir),
            run_state.newest_job(submission) if submission.jobs else None,
        )
        if (
            found := run_state.decide_status(submission, events, last, time.time(), asked=True)
        ).unrecorded:
            run_state.record_found_end(run_dir, found, events, last)
        for attempt in run_record.open_attempts(timeline.read(run_dir)):
            run_record.record_silent_end(
                run_dir, timeline.read(run_dir), attempt, then="resubmitted"
            )
        if update_code:
            copy_code(run_dir)
        run_record.config_file(run_dir).write_text(config.to_yaml(run))
        excluded = run_state.nodes_to_leave_out(site, timeline.read(run_dir), [])
        changes: dict[str, object] = {"cluster": site, "cancelled": False, "excluded": excluded}
        changes |= {"slurm": slurm.cluster_name(), "checkpoints": checkpoints_of(run)}
        # The folder may have been moved or copied since.
        if submission.parent is None or not submission.logs.is_dir():
            changes["logs"] = run_record.jobs_folder(run_dir) / "slurm"
        run_record.update_submission(run_dir, lambda now: now.model_copy(update=changes))
        return enqueue(run_dir, by_user=True)


def enqueue(run_dir: Path, *, by_user: bool) -> Submission:
    """Queue a job that goes on with the run, as run.json has it; returns the submission with its
    id.

    Raises:
        SlurmError: SLURM refuses the job.
    """
    executor = executor_for(run_dir, run_record.read_submission(run_dir))
    asked = time.time()  # it may begin before the next line
    try:
        queued = executor.submit(rank_main.rank, str(run_dir))
    except submitit.core.utils.FailedJobError as error:
        raise slurm.SlurmError(f"SLURM refuses the job: {sbatch_complaint(str(error))}") from None
    submission = run_record.update_submission(run_dir, lambda now: now.with_job(queued.job_id))
    timeline.append(
        run_dir,
        "submitted",
        attempt=queued.job_id,
        job=queued.job_id,
        nodes=submission.cluster.nodes,
        ranks=submission.cluster.ranks,
        by_user=by_user,
        time=asked,
    )
    if submission.cancelled:  # a cancellation may have come meanwhile
        slurm.cancel(queued.job_id)
    return submission


def sbatch_complaint(words: str) -> str:
    """Return sbatch's own complaint out of submitit's report."""
    lines = [
        line.strip() for line in words.splitlines() if "error:" in line and "Command" not in line
    ]
    return (
        "; ".join(line.removeprefix("sbatch: error: ") for line in lines) or words.splitlines()[-1]
    )


def executor_for(
    run_dir: Path, submission: Submission, *, array: bool = False
) -> submitit.SlurmExecutor:
    """Return submitit's executor with every option of the submission; it is to submit an ``array``
    or a single job.

    Raises:
        SlurmError: there is no SLURM here.
        RecordError: SLURM cannot have logs in the run folder.
    """
    site = submission.cluster
    slurm.check_here()
    without_job_variables()
    rank_main.name_files_only()
    executor = Executor(submission.logs, python=shlex.quote(site.python))
    options = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "gpus_per_node": site.gpus_per_node or None,
        "cpus_per_task": site.cpus_per_rank,
        "mem": None if site.mem_gb is None else f"{round(site.mem_gb * 1024)}M",
        "constraint": site.constraint,
        "nodelist": site.nodelist,
        "exclude": ",".join(sorted({*site.exclude, *submission.excluded})) or None,
    }
    executor.update_parameters(
        **{name: value for name, value in options.items() if value is not None},
        job_name=f"dnt-{submission.name}",
        nodes=site.nodes,
        ntasks_per_node=site.tasks_per_node,
        time=site.time,
        wckey=None,
        stderr_to_stdout=True,
        setup=setup_lines(run_dir, site),
        teardown=teardown_lines(run_dir, site),
        srun_args=[
            f"--output={log_files(submission.logs, array=array, task='%t')}",
            *srun_options(site),
        ],
        additional_parameters={
            "output": log_files(submission.logs, array=array, task="0"),
            "signal": f"{site.signal}@{site.signal_s}",
            "requeue" if site.requeue else "no-requeue": True,
            **site.sbatch,
        },
    )
    return executor


class Executor(submitit.SlurmExecutor):
    """submitit's, whose jobs start with :mod:`cluster.job.rank_main`."""

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -P -u -m cluster.job.rank_main {shlex.quote(str(self.folder))}"


def log_files(logs: Path, *, array: bool, task: str) -> str:
    """Return SLURM's pattern for the logs of a job's tasks: as submitit's, with the folder's own
    ``%`` left alone.

    Raises:
        RecordError: SLURM cannot have logs there.
    """
    for sign, name in (("\\", "a backslash"), ("\n", "a line break"), (":", "a colon")):
        if sign in str(logs):
            raise RecordError(
                f"{logs}: has {name} in it, which a job cannot work with; rename that folder"
            )
    return f"{str(logs).replace('%', '%%')}/{'%A_%a' if array else '%j'}_{task}_log.out"


def setup_lines(run_dir: Path, site: ClusterConfig) -> list[str]:
    """Return what the batch script does before the ranks start."""
    code = shlex.quote(str(run_record.jobs_folder(run_dir) / "code"))
    return [
        "umask 077",
        "trap : TERM USR1 USR2  # the ranks see to these; what comes after them decides",
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"',
        *site.setup,
        "set +e  # whatever the lines above asked for: what comes after the ranks always runs",
    ]


def teardown_lines(run_dir: Path, site: ClusterConfig) -> list[str]:
    """Return what the batch script does when the ranks have ended."""
    python, folder = shlex.quote(site.python), shlex.quote(str(run_dir))
    return [
        "status=$?",
        f'{python} -P -m cluster.submit.on_exit {folder} "$status"',
        'exit "$status"',
    ]


def srun_options(site: ClusterConfig) -> list[str]:
    # SLURM does not pass this on from sbatch since 22.05.
    per_rank = [] if site.cpus_per_rank is None else [f"--cpus-per-task={site.cpus_per_rank}"]
    return ["--kill-on-bad-exit=1", *per_rank, *site.container, *site.srun]


def format_script(executor: submitit.SlurmExecutor, tasks: int | None = None) -> str:
    """Return the batch script of a job, or of an array of ``tasks``, that an executor would
    submit."""
    executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


# --- the run folder -------------------------------------------------------------------------------


def make_private(run_dir: Path) -> None:
    """Make the folder, for its owner only; others may see the one that it is in. Raises OSError."""
    before = os.umask(0o022)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    os.umask(before)
    for place in (run_dir, run_record.jobs_folder(run_dir)):
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o700)


@contextmanager
def submission_lock(run_dir: Path) -> Iterator[None]:
    """Let one submission of a run go on at a time. Raises RecordError while there is another."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(run_record.jobs_folder(run_dir) / ".lock"))
        except BlockingIOError:
            raise RecordError(
                f"{run_dir}: another command submits it just now; wait for that"
            ) from None
        yield


def copy_code(run_dir: Path) -> None:
    """Copy our packages and configs into the run folder, so that edits do not reach its jobs.
    Raises OSError."""
    code = run_record.jobs_folder(run_dir) / "code"
    partial = code.with_name("code.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for package in (dnt_scale, data_prep, cluster):
        assert package.__file__
        source = Path(package.__file__).parent
        shutil.copytree(source, partial / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    if not (partial / "dnt_scale" / "configs").is_dir():  # a checkout has them beside the packages
        shutil.copytree(config_dir(), partial / "configs")
    (partial / "COMMIT").write_text(git_commit() + "\n")
    if code.is_symlink():  # a link to a sweep's code
        code.unlink()
    shutil.rmtree(code, ignore_errors=True)
    partial.rename(code)


def without_job_variables() -> None:
    """Take the variables of a job that this process is in out of the environment, which sbatch
    hands on to the next."""
    startup.forget()
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del os.environ[name]
    code = str(Path(cluster.__file__).parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(":")
    os.environ["PYTHONPATH"] = ":".join(path for path in paths if path and path != code)

"""`dnt submit --multirun`: every combination of the values that overrides list, as one SLURM array
(a sweep)."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import submitit

from cluster import run_record, slurm
from cluster.cluster_config import ClusterConfig
from cluster.job import rank_main
from cluster.run_record import RecordError, Submission
from cluster.submit import checks, single_run
from cluster.submit.plan import Plan
from data_prep.words import counted
from dnt_scale import config
from dnt_scale.config import RunConfig
from dnt_scale.record import run_lock, timeline
from dnt_scale.sweep import sweep_file
from dnt_scale.sweep.sweep_file import Sweep
from dnt_scale.train.stages import load_stages


def check_new(sweep_dir: Path) -> None:
    """Raise RecordError when a sweep or a run was submitted from there, or a run was trained or is
    training there."""
    if sweep_file.is_sweep(sweep_dir) or run_record.is_submitted(sweep_dir):
        raise RecordError(
            f"run.name: {sweep_dir.name} was submitted before; `dnt jobs {sweep_dir}` shows it; "
            "take another run.name"
        )
    run_lock.check_free(sweep_dir)
    if (sweep_dir / "config.yaml").exists():
        raise RecordError(
            f"run.name: {sweep_dir} is the folder of a run; take another run.name for the sweep"
        )


def check_and_plan(runs: list[RunConfig], site: ClusterConfig) -> Plan:
    """Return the plan of the first run, once nothing speaks against any of them.

    Raises:
        ValueError, OSError: as :func:`cluster.submit.checks.check_and_plan`.
    """
    check_new(runs[0].run.dir.parent)
    plan = checks.check_and_plan(runs[0], site)
    checks.check_room(runs[0], plan.steps, runs=len(runs))
    fitting = set()
    for run in runs:
        checks.check_ranks(run, site)
        sections = (run.data, run.model, run.train)
        reads = tuple(section.model_dump_json() for section in sections)
        if reads not in fitting:
            load_stages(run)
            fitting.add(reads)
    return plan


def format_sweep(found: Sweep, site: ClusterConfig) -> str:
    """Return the sweep's runs and their values, in lines below those of the plan."""
    at_once = (
        "all at once"
        if not site.sweep_parallel
        else f"{site.sweep_parallel} at a time (cluster.sweep_parallel)"
    )
    lines = [
        f"sweep        {counted(len(found.runs), 'run')} as one array, {at_once}; above is the "
        "first of them"
    ]
    width = max(len(run.name) for run in found.runs)
    for run in found.runs:
        values = " ".join(f"{key}={value}" for key, value in run.values.items())
        lines.append(f"{run.name:{width}}  {values}")
    return "\n             ".join(lines)


def array_submission(found: Sweep, logs: Path, site: ClusterConfig) -> Submission:
    """Return what the array's batch script is made from, in the form of a run's."""
    return Submission(name=found.name, cluster=site, logs=logs)


def executor_for(found: Sweep, sweep_dir: Path, array: Submission) -> submitit.SlurmExecutor:
    executor = single_run.executor_for(sweep_dir, array, array=True)
    executor.update_parameters(array_parallelism=array.cluster.sweep_parallel or len(found.runs))
    return executor


def submit_sweep(found: Sweep, runs: list[RunConfig], site: ClusterConfig) -> str:
    """Make the folders of the sweep and its runs, and queue them; returns the array job's id.

    Raises:
        RecordError: it was submitted before.
        SlurmError: SLURM refuses the job.
        OSError: a folder cannot be written.
    """
    sweep_dir = runs[0].run.dir.absolute().parent
    check_new(sweep_dir)
    single_run.make_private(sweep_dir)
    with single_run.submission_lock(sweep_dir), ExitStack() as writers:
        check_new(sweep_dir)
        single_run.copy_code(sweep_dir)
        array = array_submission(found, run_record.jobs_folder(sweep_dir) / "slurm", site)
        waiting = array.model_copy(update={"parent": f"{found.id}:{found.name}"})
        places = []
        try:
            for run in runs:
                places.append(place := run.run.dir.absolute())
                single_run.make_private(place)
                writers.enter_context(run_lock.held(place, "dnt submit"))
                run_record.config_file(place).write_text(config.to_yaml(run))
                (run_record.jobs_folder(place) / "code").symlink_to(Path("../../jobs/code"))
                own = {"name": run.run.name, "checkpoints": single_run.checkpoints_of(run)}
                run_record.write_submission(place, waiting.model_copy(update=own))
            sweep_file.write_sweep(sweep_dir, found)
            asked = time.time()  # they may begin before the last is told of
            job_id = _submit_array(executor_for(found, sweep_dir, array), places)
        except BaseException:  # so that it can be submitted again
            (sweep_dir / sweep_file.FILE).unlink(missing_ok=True)
            for place in places:
                (run_record.jobs_folder(place) / "run.json").unlink(missing_ok=True)
                (run_record.jobs_folder(place) / "code").unlink(missing_ok=True)
            raise
        for number, place in enumerate(places):
            task = f"{job_id}_{number}"
            run_record.update_submission(place, partial(Submission.with_job, job_id=task))
            counts = {"nodes": site.nodes, "ranks": site.ranks}
            timeline.append(
                place, "submitted", attempt=task, job=task, **counts, by_user=True, time=asked
            )
    return job_id


def _submit_array(executor: submitit.SlurmExecutor, places: list[Path]) -> str:
    try:
        with executor.batch():
            queued = [executor.submit(rank_main.rank, str(place)) for place in places]
    except submitit.core.utils.FailedJobError as error:
        raise slurm.SlurmError(
            f"SLURM refuses the array: {single_run.sbatch_complaint(str(error))}"
        ) from None
    return str(queued[0].job_id.partition("_")[0])


def batch_script(found: Sweep, sweep_dir: Path, site: ClusterConfig) -> str:
    """Return the array's script, made without its folder. Raises SlurmError."""
    array = array_submission(found, run_record.jobs_folder(sweep_dir) / "slurm", site)
    return single_run.format_script(executor_for(found, sweep_dir, array), len(found.runs))

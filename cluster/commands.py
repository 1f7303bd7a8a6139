"""The cluster room's commands of `dnt`. Each imports what it uses."""

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from dnt_scale.arguments import Parser, path_or_url, whole, word

if TYPE_CHECKING:
    from cluster.cluster_config import ClusterConfig

SUBMIT_HELP = """\
Overrides are those of `dnt train`, and of the cluster: cluster=NAME is a file of configs/cluster
or a path to your own, cluster.KEY=VALUE changes it. What jobs run is kept in the run's folder, so
later edits change nothing.

  dnt submit preset=demo cluster=sandbox --dry-run
  dnt submit model=dnt_1.4b data.path=data/mine run.name=big cluster=./site.yaml cluster.nodes=8
  dnt submit --multirun optim.lr=1e-3,3e-3 optim=muon,adamw preset=demo run.name=lr cluster=gpu

Shown and checked first: how the run spreads over ranks, its data, the disks, the cluster's
limits. The run goes on over time limits, preemption, lost nodes and crashes until its token
budget is spent, as one run in MLflow. Then:

  dnt jobs             what all runs are doing
  dnt logs big -f      what it prints
  dnt cancel big       end it, with a checkpoint
"""

RESUBMIT_HELP = """\
For a run that was cancelled, crashed too often, was refused for something you have mended, or
that should go on with other nodes or longer. It goes on from its newest checkpoint, on any number
of ranks.

  dnt resubmit big
  dnt resubmit big cluster.nodes=4 cluster.time=12:00:00
  dnt resubmit big train.tokens=40e9
  dnt resubmit big cluster=./other.yaml
"""

JOBS_HELP = """\
RUN is a run's folder or its name in runs/; FOLDER holds runs. Without any: all in runs/. One RUN
alone is shown with the chain of its attempts and where their time went.

  dnt jobs
  dnt jobs big
  dnt jobs --watch
  dnt jobs --json | jq '.runs[] | select(.live) | .name'

States: queued (SLURM's reason), starting, running, requeued (it goes on by itself), cancelling;
then finished (its token budget is spent), crashed (too often in a row), refused (an error to mend
first), cancelled, killed (without a word). Where SLURM has forgotten a job, or there is no SLURM,
the run folder counts.
"""

LOGS_HELP = """\
All jobs of the run, oldest first, with a line at each start of one.

  dnt logs big
  dnt logs big -f               # on, over requeues and new jobs, until the run is over or Ctrl-C
  dnt logs big -f --rank 8
"""

CANCEL_HELP = """\
Ranks get the signal that comes before a time limit, write a checkpoint and end; where they have
not after cluster.signal_s seconds, SLURM ends them. Nothing goes on with the run by itself; `dnt
resubmit RUN` does.

  dnt cancel big
  dnt cancel lrs lrs-2                   # all runs of two sweeps
"""

SANDBOX_HELP = """\
As root, on Debian or Ubuntu. The first `up` installs SLURM with apt-get, later ones take seconds.
All of it listens on 127.0.0.1 only and lies in /var/lib/dnt-sandbox and /etc/slurm. Where there
is another SLURM, nothing is touched. Nodes are node1, node2 ..., each with its hostname.
Partitions: main; short (2 hours, 2 nodes); high; and low and spot, whose jobs the others preempt:
low's go back into the queue, spot's end.

  sudo dnt sandbox up
  dnt sandbox status
  dnt submit preset=demo cluster=sandbox
  sudo dnt sandbox kill-node node2           # lose a node: SLURM sees it in half a minute
  sudo dnt sandbox start-node node2
  sudo dnt sandbox up --no-accounting        # the same SLURM, as a site without sacct; jobs live on
  sudo dnt sandbox down
"""


RAW = argparse.RawDescriptionHelpFormatter


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the room's commands to those of `dnt`."""
    for add_one in (add_submit, add_resubmit, add_jobs, add_logs, add_cancel, add_sandbox):
        add_one(commands)


def add_submit(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "submit", help="train a run as SLURM jobs", epilog=SUBMIT_HELP, formatter_class=RAW
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.add_argument(
        "--dry-run", action="store_true", help="check, show the plan and the batch script, and stop"
    )
    command.add_argument(
        "--fresh",
        action="store_true",
        help="move aside what an earlier run has left in the folder; begin at step 0",
    )
    command.add_argument(
        "--multirun", action="store_true", help="a run for each combination of values KEY=A,B,C"
    )
    command.set_defaults(run=run_submit)


def add_resubmit(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "resubmit", help="go on with a submitted run", epilog=RESUBMIT_HELP, formatter_class=RAW
    )
    command.add_argument(
        "folder", type=path_or_url, metavar="RUN", help="its folder, or its name in runs/"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes of the run or the cluster"
    )
    command.add_argument(
        "--update-code", action="store_true", help="run dnt as it is now, not as it was submitted"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check and print the plan and the batch script only"
    )
    command.set_defaults(run=run_resubmit)


def add_jobs(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "jobs", help="what submitted runs are doing", epilog=JOBS_HELP, formatter_class=RAW
    )
    command.add_argument(
        "runs", nargs="*", type=path_or_url, metavar="RUN|FOLDER", help="default: all in runs/"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--watch", action="store_true", help="show it anew every two seconds; Ctrl-C ends that"
    )
    form.add_argument("--json", action="store_true", help="the same as data")
    command.set_defaults(run=run_jobs)


def add_logs(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "logs", help="what a submitted run wrote", epilog=LOGS_HELP, formatter_class=RAW
    )
    command.add_argument(
        "folder", type=path_or_url, metavar="RUN", help="its folder, or its name in runs/"
    )
    command.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    command.add_argument(
        "--rank", type=whole(0, 10**6), default=0, metavar="K", help="of which rank (default: 0)"
    )
    command.set_defaults(run=run_logs)


def add_cancel(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "cancel",
        help="end a run's job, and let none follow",
        epilog=CANCEL_HELP,
        formatter_class=RAW,
    )
    command.add_argument(
        "runs",
        nargs="+",
        type=path_or_url,
        metavar="RUN",
        help="its folder or name in runs/; a sweep's: all its runs",
    )
    command.set_defaults(run=run_cancel)


def add_sandbox(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "sandbox",
        help="a real SLURM on this one machine, to try jobs on",
        epilog=SANDBOX_HELP,
        formatter_class=RAW,
    )
    add_sandbox_commands(command.add_subparsers(required=True, metavar="COMMAND"))


def add_sandbox_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    from cluster.sandbox import MOST_CPUS, MOST_GPUS, MOST_NODES

    up = commands.add_parser(
        "up", help="start it, or change it to these options; running jobs live on"
    )
    up.add_argument(
        "--nodes",
        type=whole(1, MOST_NODES),
        default=3,
        metavar="N",
        help="node1 to nodeN (default: 3)",
    )
    up.add_argument(
        "--cpus",
        type=whole(1, MOST_CPUS),
        default=8,
        metavar="N",
        help="a node, whatever the machine has (default: 8)",
    )
    up.add_argument(
        "--gpus",
        type=whole(0, MOST_GPUS),
        default=8,
        metavar="N",
        help="a node; stand-ins for SLURM to hand out (default: 8)",
    )
    up.add_argument(
        "--no-accounting", dest="accounting", action="store_false", help="no slurmdbd, so no sacct"
    )
    up.add_argument(
        "--no-preempt-signal",
        dest="preempt_signal",
        action="store_false",
        help="preempted jobs get SIGTERM only, as at most sites "
        "(default: first the signal that they asked for)",
    )
    up.set_defaults(run=run_sandbox, action="up")
    down = commands.add_parser("down", help="cancel its jobs and stop it; the packages stay")
    down.add_argument(
        "--wipe",
        action="store_true",
        help="remove its files and configuration, and what jobs there were",
    )
    down.set_defaults(run=run_sandbox, action="down")
    status = commands.add_parser(
        "status", help="what runs; exit status 0: it runs, 1: not, 2: another SLURM is here"
    )
    status.set_defaults(run=run_sandbox, action="status")
    kill = commands.add_parser("kill-node", help="lose a node: kill -9 of all its processes")
    kill.add_argument("node", type=word, metavar="NODE", help="for example node2")
    kill.set_defaults(run=run_sandbox, action="kill_node")
    start = commands.add_parser("start-node", help="bring a lost node back")
    start.add_argument("node", type=word, metavar="NODE")
    start.set_defaults(run=run_sandbox, action="start_node")


def run_submit(options: argparse.Namespace) -> int:
    from cluster import cluster_config
    from cluster.submit import checks, plan, single_run
    from cluster.watch.find_runs import short_name
    from dnt_scale import config
    from dnt_scale.train.recorded import Typed
    from dnt_scale.train.run_start import begin

    site, overrides = cluster_config.read_cluster(options.overrides)
    if options.multirun:
        if options.fresh:
            raise ValueError("--fresh: a sweep is made in a new folder; take another run.name")
        return run_submit_sweep(overrides, site, dry_run=options.dry_run)
    run = config.load(overrides)
    single_run.check_new(run, fresh=options.fresh)
    begun = begin(run, Typed(overrides), fresh=options.fresh)
    planned = checks.check_and_plan(run := begun.run, site, fresh=options.fresh)
    print(
        plan.format_plan(
            replace(planned, notes=tuple(dict.fromkeys([*planned.notes, *begun.notes])))
        )
    )
    if options.dry_run:
        print(f"\n{checks.batch_script(run, site)}")
        return 0
    os.umask(0o077)
    job = single_run.submit(run, site, given=begun.given, fresh=options.fresh).job
    print(
        f"\nsubmitted as job {job}; `dnt jobs` shows it, `dnt logs {short_name(run.run.dir)} -f` "
        "what it prints"
    )
    return 0


def run_submit_sweep(overrides: list[str], site: "ClusterConfig", *, dry_run: bool) -> int:
    from cluster.submit import plan, sweep_run
    from cluster.watch.find_runs import short_name
    from dnt_scale.sweep.combinations import expand_sweep

    sweep, runs = expand_sweep(overrides)
    print(plan.format_plan(sweep_run.check_and_plan(runs, site)))
    print(sweep_run.format_sweep(sweep, site))
    sweep_dir = runs[0].run.dir.parent
    if dry_run:
        print(f"\n{sweep_run.batch_script(sweep, sweep_dir.absolute(), site)}")
        return 0
    os.umask(0o077)
    array = sweep_run.submit_sweep(sweep, runs, site)
    of_it = (
        f"`dnt jobs {short_name(sweep_dir)}` shows it, `dnt logs {short_name(runs[0].run.dir)} -f` "
        f"a run of it"
    )
    print(f"\nsubmitted as array {array}; {of_it}")
    return 0


def run_resubmit(options: argparse.Namespace) -> int:
    from cluster.submit import checks, plan, single_run
    from cluster.watch.find_runs import find_run, short_name

    run_dir = find_run(options.folder)
    run, site = single_run.change_run(run_dir, options.overrides)
    print(plan.format_plan(checks.check_and_plan(run, site)))
    if options.dry_run:
        print(f"\n{checks.batch_script(run, site)}")
        return 0
    os.umask(0o077)
    job = single_run.resubmit(run_dir, run, site, update_code=options.update_code).job
    print(f"\nsubmitted as job {job}; `dnt jobs {short_name(run_dir)}` shows the chain")
    return 0


def run_jobs(options: argparse.Namespace) -> int:
    from cluster.watch.jobs_command import main

    return main(options.runs, watch=options.watch, as_json=options.json)


def run_logs(options: argparse.Namespace) -> int:
    from cluster.watch.find_runs import find_run
    from cluster.watch.logs import main

    return main(find_run(options.folder), options.rank, follow=options.follow)


def run_cancel(options: argparse.Namespace) -> int:
    from cluster.watch.cancel import cancel
    from cluster.watch.find_runs import find_runs

    for line in cancel(find_runs(options.runs)):
        print(line, flush=True)
    return 0


def run_sandbox(options: argparse.Namespace) -> int:
    from cluster import sandbox

    arguments = {
        name: value
        for name, value in vars(options).items()
        if name not in ("run", "action", "command")
    }
    return int(getattr(sandbox, options.action)(**arguments))

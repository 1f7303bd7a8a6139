"""The true end of a run, told to its backends by others: where training and sender are killed, they
show it as running for ever. And what a run folder was given after that end.

    python -m dnt_scale.record.finalize RUN FAILED

To be called for a run that no process works on any more. Costs nothing where the backends know
already. Otherwise the work is done by a sender (:mod:`dnt_scale.record.sender`), which takes some
seconds, and a minute at most when the backend does not answer. May be called at any time, by
several at once: beside a living sender it does nothing.
"""

import argparse
import os
import subprocess
from pathlib import Path
from typing import get_args

from dnt_scale.record.backend import Status, load
from dnt_scale.record.files import warn
from dnt_scale.record.sender_files import (
    backends_of,
    is_finalized,
    log_file,
    read_order,
    read_report,
)
from dnt_scale.record.sender_process import sender_command, sender_environment


def finalize_run(run_dir: Path, status: Status) -> bool:
    """Give each backend what it lacks of the run, and its true ``status``.

    Returns:
        True when all know everything now, or the run is not tracked. False when one does not: a
        line on stderr says why.
    """
    order, known = read_order(run_dir), True
    for name in backends_of(order):
        try:
            if not is_finalized(run_dir, order, name, status):
                known = _run_sender(run_dir, name, "--finalize", status) and known
        except ValueError as error:  # A backend that is not here.
            warn(f"{run_dir.name}: {error}")
            known = False
    return known


def send_rest(run_dir: Path) -> bool:
    """Give each backend what was added to a run folder since it was told of the run's end. Where it
    was not, training's own senders do so, or the next start's.

    Returns as :func:`finalize_run` does.
    """
    order, known = read_order(run_dir), True
    for name in backends_of(order):
        told = read_report(run_dir, name).get("status")
        status: Status | None = next((end for end in get_args(Status) if end == told), None)
        try:
            if status and not is_finalized(run_dir, order, name, status):
                untold = f"has not all of what was added to {run_dir.name}"
                known = _run_sender(run_dir, name, "--finalize", status, untold) and known
        except ValueError as error:  # A backend that is not here.
            warn(f"{run_dir.name}: {error}")
            known = False
    return known


def finalize_sweep(run_dir: Path, status: Status) -> bool:
    """Tell each backend the ``status`` of the sweep that this run is part of.

    Returns as :func:`finalize_run` does.
    """
    order, known = read_order(run_dir), True
    for name in backends_of(order):
        try:
            if not load(name).is_sweep_finalized(run_dir, order, status):
                known = _run_sender(run_dir, name, "--finalize-sweep", status) and known
        except ValueError as error:  # A backend that is not here.
            warn(f"{run_dir.name}: {error}")
            known = False
    return known


def _run_sender(run_dir: Path, backend: str, option: str, status: Status, untold: str = "") -> bool:
    """Have a sender do it; return whether it did.

    Args:
        untold: what the backend lacks where it did not; by default the run's status.
    """
    log = log_file(run_dir, backend)
    # The folder names the store that the caller's password would be sent to.
    if run_dir.stat().st_uid != os.geteuid():
        problem = "it is another user's"
    else:
        command = sender_command(run_dir.absolute(), backend, option, status)
        with log.open("ab") as out:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=sender_environment(),
            ).returncode
        known = {0: "", 3: "it has just been started again", 4: "its sender is still at work"}
        report = read_report(run_dir, backend)
        if code == 1 and report.get("remedy"):
            asked_again = "It is tried again when asked again"
            known[1] = f"{report['error']}. {report['remedy']} {asked_again}"
        problem = known.get(code, f"see {log}; it is tried again when asked again")
    if problem:
        title = load(backend).title
        warn(f"{title} {untold or f'was not told that {run_dir.name} is {status}'}: {problem}")
    return not problem


if __name__ == "__main__":
    command = "python -m dnt_scale.record.finalize"
    parser = argparse.ArgumentParser(prog=command, description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("run_dir", metavar="RUN", type=Path)
    parser.add_argument("status", choices=get_args(Status))
    options = parser.parse_args()
    raise SystemExit(0 if finalize_run(options.run_dir, options.status) else 1)

"""The true end of a run in MLflow, told by others: where training and sender are both killed, it says RUNNING for ever.

To be called for a run that no process works on any more. Costs nothing where MLflow knows already. Otherwise the work
is done by a process of its own (:mod:`dnt_scale.record.mlflow.sender`), which takes some seconds, and a minute at
most when the store does not answer. May be called at any time, by several at once: beside a living sender it does
nothing.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

from dnt_scale.record import system_metrics
from dnt_scale.record.files import read_json, warn
from dnt_scale.record.folder_identity import is_copy, ordered_place
from dnt_scale.record.metrics_file import METRICS
from dnt_scale.record.mlflow.store import parent_file
from dnt_scale.record.tracker import Status, sender_command, sender_environment


def settle(run_dir: Path, status: Status) -> bool:
    """Give MLflow what it lacks of the run, and its true ``status``.

    Returns:
        True when MLflow knows all now, or the run is not tracked. False when it does not: a line on stderr says why.
    """
    return is_settled(run_dir, _order(run_dir), status) or _in_a_process(run_dir, "--settle", status)


def settle_parent(run_dir: Path, status: Status) -> bool:
    """Tell MLflow the ``status`` of the sweep that this run is part of. Returns as :func:`settle` does."""
    return is_parent_settled(run_dir, _order(run_dir), status) or _in_a_process(run_dir, "--settle-parent", status)


def is_settled(run_dir: Path, order: dict[str, Any], status: Status) -> bool:
    """Whether MLflow was told ``status``, and all that the files hold.

    True too for a run that is not tracked, and for a copied folder not started since: MLflow has nothing of it.
    """
    if is_copy(run_dir, ordered_place(order)):
        return True
    state = read_json(run_dir / "logs" / "mlflow.json")
    told = [state.get(name) for name in ("uri", "run_id", "status", "sizes")]
    return not order or told == [order["key"]["uri"], order["key"]["run_id"], status, sizes_of(run_dir)]


def is_parent_settled(run_dir: Path, order: dict[str, Any], status: Status) -> bool:
    """Whether the sweep's run was told ``status``; True for a run that is not part of one, or a copy, see above."""
    if not (parent := order.get("parent")) or is_copy(run_dir, ordered_place(order)):
        return True
    told = read_json(parent_file(run_dir, parent["id"]))
    return [told.get("uri"), told.get("status")] == [order["key"]["uri"], status]


def sizes_of(run_dir: Path) -> dict[str, int]:
    """The bytes of each file whose lines go to MLflow."""
    files = [run_dir / METRICS, *system_metrics.folder(run_dir).glob("*.jsonl")]
    return {str(file.relative_to(run_dir)): file.stat().st_size for file in files if file.exists()}


def _order(run_dir: Path) -> dict[str, Any]:
    return read_json(run_dir / "logs" / "tracking.json")


def _in_a_process(run_dir: Path, option: str, status: Status) -> bool:
    log = run_dir / "logs" / "mlflow.log"
    problem = ""
    if run_dir.stat().st_uid != os.geteuid():  # it names the store that the caller's password would be sent to
        problem = "it is another user's"
    else:
        command = sender_command(run_dir.absolute(), option, status)
        with log.open("ab") as out:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=sender_environment()
            ).returncode
        state = read_json(run_dir / "logs" / "mlflow.json")
        known = {0: "", 3: "it has just been started again", 4: "its sender is still at work"}
        if code == 1 and state.get("remedy"):
            known[1] = f"{state['error']}. {state['remedy']} It is tried again when asked again"
        problem = known.get(code, f"see {log}; it is tried again when asked again")
    if problem:
        warn(f"MLflow was not told that {run_dir.name} is {status}: {problem}")
    return not problem

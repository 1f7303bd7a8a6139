"""One run on a real SLURM through everything that ends jobs, against the same run undisturbed.

    dnt sandbox up
    python -m benchmarks.soak
    python -m benchmarks.soak --events preempt,requeue,kill-rank-0 --steps 1200

Needs the sandbox with three nodes, and root, for it kills a node. The run has two ranks on two
nodes, in the partition that others preempt, and its MLflow store is a server. Every event is
SLURM's own or a signal to a real process:

    preempt       a job of a higher partition takes all nodes for some seconds
    requeue       scontrol requeue
    usr1, term    scancel --signal
    time-limit    the job's limit is cut to the next minute
    kill-rank-0   SIGKILL to the process of rank 0; kill-rank-1 alike
    stop-rank     SIGSTOP to the process of rank 1
    kill-node     SIGKILL to all processes of the second node at once; it comes back a minute later
    mlflow        the MLflow server is stopped, and started again when the run is 50 steps further

Wanted: the final metrics.jsonl and weights are bitwise those of the undisturbed run; one MLflow
run, FINISHED, with each step once a metric; no step lost to an event that warns, at most the
checkpoint interval to another. "back" is the time from the event to the next step. SLURM itself
holds a requeued job for 11 s here, and notices a lost node after 15 to 33 s.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import slurm
from testbed.soak import ACTIONS, soak, steps_for

EVENTS = [
    *("preempt", "requeue", "kill-rank-0", "usr1", "mlflow", "stop-rank"),
    *("time-limit", "kill-node", "term", "preempt", "kill-rank-1", "requeue"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--events", type=lambda text: text.split(","), default=EVENTS, metavar="A,B,..."
    )
    parser.add_argument("--steps", type=int, help="of the run (default: enough for all events)")
    parser.add_argument(
        "--folder", type=Path, help="to work in, kept afterwards (default: a temporary one)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "soak-2-core-CPU.json"
    )
    options = parser.parse_args()
    if unknown := set(options.events) - set(ACTIONS):
        parser.error(f"--events: {', '.join(unknown)}; there are {', '.join(ACTIONS)}")
    slurm.check_here()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(folder.absolute(), options.events, options.steps or steps_for(options.events))
    show(result)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.out}")
    sys.exit(not all(result["checks"].values()))


def show(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['device']}, {result['date']}, {result['commit'][:12]}: "
        f"{result['attempts']} attempts"
    )
    for column in ("event", "at step", "steps lost", "back after s", "on"):
        table.add_column(column, justify="left" if column in ("event", "on") else "right")
    for row in result["events"]:
        table.add_row(
            row["event"], str(row["step"]), str(row["lost"]), f"{row['back_s']:.1f}", row["nodes"]
        )
    console = Console()
    console.print(table)
    for what, good in result["checks"].items():
        console.print(f"{'yes' if good else 'NO ':3}  {what}")


if __name__ == "__main__":
    main()

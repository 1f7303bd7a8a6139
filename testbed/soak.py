"""One run on a real SLURM through what ends jobs, beside the same run undisturbed.

The events, and what is wanted after them, are told by `python -m benchmarks.soak --help`.
"""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster import run_record, sandbox, slurm
from dnt_scale.checkpoint.inspection import diff
from dnt_scale.record import timeline
from dnt_scale.record.files import git_commit
from dnt_scale.record.metrics_file import METRICS
from dnt_scale.record.sender_files import unsent_lines
from testbed.run import TINY_RUN, start, synthetic_set
from testbed.stores import QUIET, sqlite_store

# events before which the ranks get a signal
WARNED = {"preempt", "requeue", "usr1", "term", "time-limit", "mlflow"}
WANTED_BACK_S = 45.0
EVERY = 100  # steps between checkpoints
APART = 130  # steps of an attempt before the next event
HANG_S = 20
PATIENCE_S = 300.0
VARYING = ("time", "tokens_per_s")


@dataclass
class Row:
    event: str
    step: int  # when it happened
    lost: int  # steps done again
    back_s: float  # until the next step
    nodes: str  # that it came back on


def steps_for(events: list[str]) -> int:
    return APART * (len(events) + 2)


def soak(folder: Path, events: list[str], steps: int) -> dict[str, Any]:
    data = synthetic_set(folder / "set")
    overrides = [
        *TINY_RUN,
        f"data.path={data}",
        f"train.steps={steps}",
        f"checkpoint.every={EVERY}",
        "eval.every=100",
        f"health.hang_s={HANG_S}",
        "tracking.system_every_s=5",
    ]
    print(f"undisturbed: {steps} steps on two ranks", flush=True)
    still = folder / "runs" / "still"
    start([*overrides, "run.name=still", f"run.dir={still}"], ranks=2).wait(PATIENCE_S + steps).ok()
    server = Server(folder)
    server.start()
    try:
        server.wait()
        run = Disturbed(folder / "runs" / "soaked", server)
        run.submit([*overrides, "tracking.enabled=true", f"tracking.uri={server.uri}"])
        rows = [run.meet(event) for event in events]
        run.wait(lambda: run.status() == "finished", "the run to finish", PATIENCE_S + steps)
        run.wait(lambda: slurm_over(run.run_dir), "its job to end")
        server.wait()
        history = metrics_of(server.uri, run.run_dir)
    finally:
        server.stop()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "device": f"{os.cpu_count()}-core CPU",
        "steps": steps,
        "checkpoint_every": EVERY,
        "events": [asdict(row) for row in rows],
        "attempts": sum(event["event"] == "allocated" for event in timeline.read(run.run_dir)),
        "checks": checks(rows, still, run.run_dir, history),
    }


class Server:
    """An MLflow server in a process group of its own, which stops and starts on one port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = sqlite_store(folder / "mlflow.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            "mlflow",
            "server",
            "--backend-store-uri",
            self.store,
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    *command,
                    "--artifacts-destination",
                    str(self.folder / "artifacts"),
                ],
                env={**os.environ, **QUIET},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the MLflow server does not start; see {self.folder / 'server.log'}")

    def stop(self) -> None:
        assert self.process
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Disturbed:
    """A submitted run, and what happens to it."""

    def __init__(self, run_dir: Path, server: Server) -> None:
        self.run_dir = run_dir
        self.server = server

    def submit(self, overrides: list[str]) -> None:
        command = [sys.executable, "-m", "dnt_scale.cli", "submit", *overrides, "run.name=soaked"]
        site = [
            "cluster=sandbox",
            "cluster.partition=low",
            "cluster.signal_s=60",
            "cluster.exclude_after=3",
        ]
        subprocess.run([*command, f"run.dir={self.run_dir}", *site], check=True)

    @property
    def job(self) -> str:
        return run_record.read_submission(self.run_dir).job

    def step(self) -> int:
        try:
            return int(json.loads((self.run_dir / METRICS).read_bytes().splitlines()[-1])["step"])
        except (OSError, ValueError, IndexError):
            return 0

    def attempts(self) -> list[timeline.Event]:
        """The "ready" events, one an attempt that came to its first step."""
        return [event for event in timeline.read(self.run_dir) if event["event"] == "ready"]

    def status(self) -> str:
        end = run_record.last_event(timeline.read(self.run_dir), "ended")
        return end["status"] if end and end["next"] == "none" else ""

    def wait(self, until: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            began = time.monotonic()
            if until():
                return
            if time.monotonic() > deadline or (
                what != "the run to finish" and self.status() not in ("", "finished")
            ):
                raise RuntimeError(
                    f"waited in vain for {what}; the run is {self.status() or 'alive'}, see "
                    f"{self.run_dir}"
                )
            time.sleep(max(0.05, 4 * (time.monotonic() - began)))  # squeue costs, too

    def process(self, rank: str) -> psutil.Process:
        """A rank's process in the job that runs."""
        for process in psutil.process_iter(["name", "cmdline"]):
            with suppress(psutil.Error):
                if "python" in process.name() and "cluster.job.rank_main" in process.cmdline():
                    env = process.environ()
                    if env.get("SLURM_JOB_ID") == self.job and env.get("SLURM_PROCID") == rank:
                        return process
        raise RuntimeError(f"no process of rank {rank} of job {self.job}")

    def meet(self, event: str) -> Row:
        """Let an event happen once the attempt has run for a while, and wait for the next step
        after it.
        """
        known = len(self.attempts())
        self.wait(lambda: len(self.attempts()) >= max(known, 1), "the first step")
        begun = self.attempts()[-1]["step"]
        self.wait(lambda: self.step() >= begun + APART, f"step {begun + APART} before {event}")
        known, step, at = len(self.attempts()), self.step(), time.time()
        print(f"step {step}: {event}", flush=True)
        ACTIONS[event](self)
        if event == "mlflow":
            return Row(event, step, 0, 0.0, "")
        before = step
        while len(self.attempts()) == known:
            before = max(before, self.step())
            if time.time() - at > PATIENCE_S:
                raise RuntimeError(
                    f"no step within {PATIENCE_S:.0f} s of {event}; see {self.run_dir}"
                )
            time.sleep(0.02)
        ready = self.attempts()[-1]
        end = run_record.last_event(
            timeline.read(self.run_dir), "end", self.attempts()[-2]["attempt"]
        )
        before = end["step"] if end else before
        self.wait(lambda: self.step() > ready["step"], "the next step")
        nodes = run_record.last_event(timeline.read(self.run_dir), "allocated")
        assert nodes
        row = Row(
            event,
            step,
            before - ready["step"],
            round(time.time() - at, 1),
            " ".join(nodes["nodes"]),
        )
        print(
            f"  back after {row.back_s} s at step {ready['step']}, {row.lost} lost, on {row.nodes}",
            flush=True,
        )
        return row


def preempt(run: Disturbed) -> None:
    options = [
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        "--job-name=preemptor",
        "--output=/dev/null",
    ]
    slurm.run("sbatch", *options, "--wrap=sleep 3")


def time_limit(run: Disturbed) -> None:
    job = slurm.job(run.job)
    assert job
    minutes = int((time.time() - job.started) // 60) + 2
    slurm.run("scontrol", "update", f"jobid={run.job}", f"timelimit={minutes}")


def kill_node(run: Disturbed) -> None:
    node = run.process("1").environ()["SLURMD_NODENAME"]
    sandbox.kill_node(node)
    start = [sys.executable, "-m", "dnt_scale.cli", "sandbox", "start-node", node]
    subprocess.Popen(
        ["sh", "-c", f"sleep 60; {' '.join(start)}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def restart_server(run: Disturbed) -> None:
    run.server.stop()
    step = run.step()
    run.wait(lambda: run.step() >= step + 50, "50 steps without MLflow")
    run.server.start()


ACTIONS: dict[str, Callable[[Disturbed], Any]] = {
    "preempt": preempt,
    "requeue": lambda run: slurm.run("scontrol", "requeue", run.job),
    "usr1": lambda run: slurm.run("scancel", "--signal=USR1", run.job),
    "term": lambda run: slurm.run("scancel", "--signal=TERM", run.job),
    "time-limit": time_limit,
    "kill-rank-0": lambda run: run.process("0").kill(),
    "kill-rank-1": lambda run: run.process("1").kill(),
    "stop-rank": lambda run: run.process("1").suspend(),
    "kill-node": kill_node,
    "mlflow": restart_server,
}


def slurm_over(run_dir: Path) -> bool:
    job = slurm.job(run_record.read_submission(run_dir).job)
    return job is None or not job.live


def metrics_of(uri: str, run_dir: Path) -> dict[str, Any]:
    """What the server holds: how many runs, their status, and each metric's steps."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    mine = [run for run in runs if run.data.tags.get("dnt.run_id")]
    steps = {
        name: [point.step for point in client.get_metric_history(mine[0].info.run_id, name)]
        for name in mine[0].data.metrics
    }
    return {
        "runs": len(mine),
        "status": mine[0].info.status,
        "steps": steps,
        "unsent": unsent_lines(run_dir),
    }


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    found = [json.loads(line) for line in (run_dir / METRICS).read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING} for line in found]


def checks(rows: list[Row], still: Path, soaked: Path, history: dict[str, Any]) -> dict[str, bool]:
    wanted: dict[str, list[int]] = {}
    for line in lines(soaked):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                wanted.setdefault(name, []).append(line["step"])
    return {
        "metrics.jsonl is bitwise the undisturbed run's": lines(still) == lines(soaked),
        "so are weights and momentum": diff(str(still), str(soaked)),
        "one MLflow run": history["runs"] == 1,
        "it is FINISHED": history["status"] == "FINISHED",
        "each step once a metric": all(
            history["steps"].get(name) == steps for name, steps in wanted.items()
        ),
        "nothing lost where there was a warning": all(
            row.lost == 0 for row in rows if row.event in WARNED
        ),
        "else a checkpoint interval at most": all(row.lost <= EVERY for row in rows),
        f"back within {WANTED_BACK_S:.0f} s of a signal": all(
            row.back_s <= WANTED_BACK_S
            for row in rows
            if row.event in WARNED - {"time-limit"} or row.event.startswith("kill-rank")
        ),
    }

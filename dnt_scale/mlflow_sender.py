"""The sender: passes a run folder's metrics.jsonl on to MLflow, in a process of its own.

``python -m dnt_scale.mlflow_sender RUN``, started and described by :mod:`dnt_scale.tracking`. It ends when training has
ended and all is sent, or two minutes later.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.tracking import METRICS, Point, read_json, reason, sqlite_file, unsent_points, without_login, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SEND_EVERY_S = 1.5
PLOTS_EVERY_S = 30.0
LONGEST_PAUSE_S = 30.0  # between tries while the store does not answer
GIVE_UP_S = 120.0  # the sender's last tries, counted from the end of training
READ_BYTES = 1 << 20
METRICS_A_CALL = 1000  # MLflow refuses more in one log_batch
PARAMS_A_CALL = 100
PARAM_CHARS = 6000
TAG_CHARS = 8000


class _Superseded(Exception):
    """The run folder was started anew: its sender takes over."""


class _Parent:
    """What the training process says: nothing while it runs, then how it ended."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._said = ""
        self._heard = threading.Event()
        self.ended_at = 0.0  # on the monotonic clock
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # Not sys.stdin: a thread waiting in it makes the interpreter abort on the way out.
        self._hear(os.read(0, 64).decode().strip() or "KILLED")  # an end without a word is a kill
        # MLflow calls have time limits of their own; should one hang all the same, this process still ends.
        time.sleep(GIVE_UP_S + 10)
        os._exit(1)

    def _hear(self, status: str) -> None:
        self._said = self._said or status
        self.ended_at = self.ended_at or time.monotonic()
        self._heard.set()

    def status(self) -> str:
        """How training ended; "" while it runs."""
        # A child that training forked may hold the pipe open after training died. A last word still comes first.
        if not self._said and os.getppid() != self._pid and not self._heard.wait(1):
            self._hear("KILLED")
        return self._said

    def wait(self, seconds: float) -> None:
        """Wait, but not past the end of training; after it, up to 5 seconds."""
        if self._said:
            time.sleep(min(seconds, 5))
        else:
            self._heard.wait(seconds)


class _Sender:
    """Passes one run folder on to MLflow. A method may raise whatever MLflow raises, and may be called again then."""

    def __init__(self, run_dir: Path, order: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.order = order
        self.uri: str = order["key"]["uri"]
        state = read_json(run_dir / "logs" / "mlflow.json")
        if state.get("run_id") != order["key"]["run_id"]:
            state = {}
        self.mlflow_run_id: str = state.get("mlflow_run_id", "")
        self.sent_step: int = state.get("sent_step", -1)
        self.sent_names: list[str] = state.get("sent_names", [])
        self._client: MlflowClient | None = None
        self._offset = 0  # the file is read from its start: a resume may have changed what stood at an old offset
        self._pending: list[Point] = []
        self._artifacts_sent: dict[Path, int] = {}
        self._next_artifacts = 0.0
        self._reported: dict[str, Any] = {}

    def report(self, error: str | None) -> None:
        """Write ``logs/mlflow.json`` when it would change, or again for every error. Raises OSError."""
        state = {
            **self.order["key"],
            "mlflow_run_id": self.mlflow_run_id,
            "sent_step": self.sent_step,
            "sent_names": self.sent_names,
            "error": error,
            "session": self.order["session"],
        }
        if error or state != self._reported:
            write_json(self.run_dir / "logs" / "mlflow.json", {**state, "time": time.time()})
            self._reported = state

    def check_order(self) -> None:
        """Raise :class:`_Superseded` when the run folder was started again since."""
        if read_json(self.run_dir / "logs" / "tracking.json").get("session") != self.order["session"]:
            raise _Superseded

    def send(self) -> bool:
        """Send what is there, at most one call's worth. True when there is more."""
        self.check_order()
        if self._client is None:
            self._client = self._connect()
        more = self._read()
        if self._pending:
            self._send_points(self._client)
        if time.monotonic() >= self._next_artifacts:
            self._send_artifacts(self._client)
            self._next_artifacts = time.monotonic() + PLOTS_EVERY_S
        return more or bool(self._pending)

    def end(self, status: str) -> None:
        """Mark the MLflow run as ended, then send the last plots."""
        assert self._client is not None
        self._client.set_terminated(self.mlflow_run_id, status)
        self._send_artifacts(self._client)

    def _connect(self) -> MlflowClient:
        from mlflow import MlflowClient

        with _first_use(self.uri):
            client = MlflowClient(tracking_uri=self.uri)
            experiment_id = self._experiment(client)
        run = self._find_run(client, experiment_id)
        if run.info.run_id != self.mlflow_run_id:
            self.mlflow_run_id, self.sent_step, self.sent_names = run.info.run_id, -1, []
        self.report(None)
        client.update_run(self.mlflow_run_id, status="RUNNING")
        self._send_params_and_tags(client, run)
        return client

    def _experiment(self, client: MlflowClient) -> str:
        """The id of the run's experiment, made when missing."""
        name = self.order["experiment"]
        file = sqlite_file(self.uri)
        # Without a server in between, MLflow would put artifacts into ./mlruns of whatever folder training ran in.
        location = (file.parent / "mlartifacts").as_uri() if file else None
        if (found := client.get_experiment_by_name(name)) is None:
            try:
                # opens the experiment's page in MLflow's model-training view
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return str(client.create_experiment(name, artifact_location=location, tags=kind))
            except Exception:
                if (found := client.get_experiment_by_name(name)) is None:  # else another run made it just now
                    raise
        return str(found.experiment_id)

    def _find_run(self, client: MlflowClient, experiment_id: str) -> Run:
        """The MLflow run of this run: the one known, else one with its ``dnt.run_id`` tag, else a new one."""
        from mlflow.exceptions import MlflowException

        if self.mlflow_run_id:
            try:
                run = client.get_run(self.mlflow_run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        run_id = self.order["key"]["run_id"]
        for run in client.search_runs([experiment_id], f"tags.`dnt.run_id` = '{run_id}'", max_results=1):
            return run
        return client.create_run(experiment_id, tags={"dnt.run_id": run_id}, run_name=self.order["run_name"])

    def _send_params_and_tags(self, client: MlflowClient, run: Run) -> None:
        from mlflow.entities import Param, RunTag

        tags = {"dnt.run_id": self.order["key"]["run_id"], **self.order["tags"]}
        params: list[Param] = []
        for name, value in self.order["params"].items():
            text = str(value)[:PARAM_CHARS]
            if name not in run.data.params:
                params.append(Param(name, text))
            elif run.data.params[name] != text:
                tags[f"param.{name}"] = text  # MLflow never changes a param: the new value is kept as a tag
        for at in range(0, len(params), PARAMS_A_CALL):
            client.log_batch(self.mlflow_run_id, params=params[at : at + PARAMS_A_CALL])
        all_tags = [RunTag(name, str(value)[:TAG_CHARS]) for name, value in tags.items()]
        for at in range(0, len(all_tags), PARAMS_A_CALL):
            client.log_batch(self.mlflow_run_id, tags=all_tags[at : at + PARAMS_A_CALL])

    def _read(self) -> bool:
        """Take the next whole lines in, unless enough wait already. True when the file holds more."""
        path = self.run_dir / METRICS
        if len(self._pending) >= METRICS_A_CALL or not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(READ_BYTES)
        self.check_order()  # the file read is still the one this sender was started for
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        now_ms = int(time.time() * 1000)
        for line in data.splitlines():
            points = unsent_points(line, self.sent_step, self.sent_names, now_ms)
            if points is None:
                print(f"skipped a line that is not a record: {line[:200]!r}", flush=True)
            self._pending += points or []
        return bool(data)

    def _send_points(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        # Kept until the call succeeds, times included: the very same points sent again are one point to MLflow.
        batch = self._pending[:METRICS_A_CALL]
        client.log_batch(self.mlflow_run_id, metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in batch])
        del self._pending[: len(batch)]
        last = batch[-1].step
        before = self.sent_names if last == self.sent_step else []
        self.sent_step, self.sent_names = last, before + [p.name for p in batch if p.step == last]
        self.report(None)

    def _send_artifacts(self, client: MlflowClient) -> None:
        """Send config.yaml and the plots that changed since they were sent."""
        plots = (path for path in (self.run_dir / "plots").glob("*") if not path.name.startswith("."))
        for path in [self.run_dir / "config.yaml", *sorted(plots)]:
            if path.is_file() and (changed := path.stat().st_mtime_ns) != self._artifacts_sent.get(path):
                folder = None if path.parent == self.run_dir else path.parent.name
                client.log_artifact(self.mlflow_run_id, str(path), folder)
                self._artifacts_sent[path] = changed


@contextlib.contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Held while a SQLite store is opened: MLflow processes that create its tables at the same time all fail."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(run_dir: Path) -> int:
    """Be the sender of ``run_dir`` until training ends. Returns 0 when all was sent, 1 when not, 3 when superseded."""
    os.nice(10)
    order = read_json(run_dir / "logs" / "tracking.json")
    if not order:
        return 3
    parent = _Parent(order["parent_pid"])
    with (run_dir / "logs" / ".mlflow.lock").open("wb") as lock:
        if not _alone(lock.fileno(), parent):
            return 1
        return _send_all(_Sender(run_dir, order), parent)


def _alone(lock: int, parent: _Parent) -> bool:
    """Wait for an earlier start's sender to leave the run folder. False when it does not in time."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if parent.status() and time.monotonic() - parent.ended_at > GIVE_UP_S:
                return False
            parent.wait(0.2)


def _send_all(sender: _Sender, parent: _Parent) -> int:
    failures = 0
    while True:
        status = parent.status()  # asked before reading: no line written before training ended is missed
        try:
            more = sender.send()
            if status and not more:
                sender.end(status)
            sender.report(None)
            failures = 0
            if status and not more:
                return 0
            pause = 0.0 if more else SEND_EVERY_S
        except _Superseded:
            return 3
        except Exception as error:  # whatever MLflow, a database or the network raises: it is tried again
            failures += 1
            pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_S)
            print(without_login(sender.uri, traceback.format_exc()), flush=True)
            if failures > 1 or status:  # one failed call in the middle of a run is not worth a warning
                with contextlib.suppress(OSError):
                    sender.report(without_login(sender.uri, reason(error)))
        if status and time.monotonic() - parent.ended_at > GIVE_UP_S:
            return 1
        parent.wait(pause)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))

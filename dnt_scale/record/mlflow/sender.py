"""The sender: passes what a run folder holds on to MLflow, in a process of its own.

``python -m dnt_scale.record.mlflow.sender RUN``, started and described by :mod:`dnt_scale.record.tracker`. It ends when
training has ended and all is sent, or when the store has not answered for two minutes after that.

With ``--settle STATUS`` it does the same for a run that no process works on any more, see
:mod:`dnt_scale.record.mlflow.finalize`.

Two folders never write into one MLflow run, whatever was done to them before. ``logs/mlflow.json`` holds the place
that it was written in: a copied folder is at another, and gets an MLflow run of its own. Where a place cannot tell
(another machine, a backup), the lease does: every start gives the MLflow run a new one, a random number in its tag
``dnt.lease``, and notes it in the folder beforehand. A run whose lease the folder has not noted is another's by now.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dnt_scale.config.tracking_uri import without_login
from dnt_scale.record import system_metrics
from dnt_scale.record.files import read_json, reason, write_json
from dnt_scale.record.folder_identity import is_copy, place_of
from dnt_scale.record.metrics_file import METRICS, Point, unsent_points
from dnt_scale.record.mlflow import store
from dnt_scale.record.mlflow.finalize import is_parent_settled, is_settled, sizes_of
from dnt_scale.record.tracker import Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SEND_EVERY_S = 1.5
SYSTEM_EVERY_S = 5.0
PLOTS_EVERY_S = 30.0  # and goodput
LONGEST_PAUSE_S = 30.0  # between tries while the store does not answer
GIVE_UP_S = 120.0  # how long the sender tries after the end of training, or after the store's last answer since
SETTLE_S = 8.0  # how long settling does
HUNG_S = 45.0  # beyond these: a call to MLflow hangs
READ_BYTES = 1 << 20
METRICS_A_CALL = 1000  # MLflow refuses more in one log_batch
PARAMS_A_CALL = 100
PARAM_CHARS = 6000
TAG_CHARS = 8000
ARTIFACTS = ("plots", "profile")  # folders of the run folder, each file put there whole
ARTIFACT_TRIES = 3  # before it is said that files cannot be stored

LEASE = "dnt.lease"
COPIED_FROM = "dnt.copied_from"
DESCRIPTION = "mlflow.note.content"
DESCRIPTION_SHA256 = "dnt.description_sha256"  # of what we wrote: another text is a person's
# of the environment: what would send a client's calls elsewhere, or drop those that fail
NOT_OURS = (
    "MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_ENABLE_ASYNC_LOGGING",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
)


class _Superseded(Exception):
    """The run folder was started anew: its sender takes over."""


class _TakenOver(Exception):
    """Another folder's start has taken the MLflow run over."""


class _Parent:
    """What the training process says: nothing while it runs, then how it ended."""

    patience_s = GIVE_UP_S

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._said = ""
        self._heard = threading.Event()
        self.ended_at = 0.0  # on the monotonic clock
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # Not sys.stdin: a thread waiting in it makes the interpreter abort on the way out.
        self._hear(os.read(0, 64).decode().strip() or "KILLED")  # an end without a word is a kill

    def _hear(self, status: str) -> None:
        self._said = self._said or status
        self.ended_at = self.ended_at or time.monotonic()
        self._heard.set()
        _weigh_session(0)  # nothing is disturbed any more

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


class _Gone:
    """In the parent's place where there is none: a run that ended with ``status``, whoever found out."""

    patience_s = SETTLE_S

    def __init__(self, status: Status) -> None:
        self._status = status
        self.ended_at = time.monotonic()

    def status(self) -> str:
        return self._status

    def wait(self, seconds: float) -> None:
        time.sleep(min(seconds, 5))


class _Sender:
    """Passes one run folder on to MLflow. A method may raise whatever MLflow raises, and may be called again then."""

    def __init__(self, run_dir: Path, order: dict[str, Any], *, live: bool) -> None:
        self.run_dir = run_dir
        self.order = order
        self.live = live
        self.answered_at = 0.0  # when MLflow last did, on the monotonic clock
        self.uri: str = order["key"]["uri"]
        state = read_json(run_dir / "logs" / "mlflow.json")
        if state.get("run_id") != order["key"]["run_id"]:
            state = {}
        self.notes: list[str] = []  # for the terminal
        self.copied_from: str = state.get("copied_from", "")
        place = state.get("place", order.get("former_place"))
        if state and place and is_copy(run_dir, place):
            self.copied_from = state.get("mlflow_run_id") or place["path"]
            self.notes.append(
                f"{run_dir} was copied or moved from {place['path']}: it gets an MLflow run of its own, with all steps"
            )
            state = {"own_id": uuid.uuid4().hex}
        self.own_id: str = state.get("own_id", order["key"]["run_id"])  # the tag dnt.run_id
        # by MLflow run, "" for one in the making: what its tag dnt.lease may be
        self.leases: dict[str, list[str]] = state.get("leases", {})
        self.lease = ""
        # whether this start has its MLflow run: another's that has taken it since is not to be told by settling
        self.claimed = bool(state.get("claimed")) and state.get("session") == order["session"]
        self.name: str = state.get("name", "")  # as told last
        self.mlflow_run_id: str = state.get("mlflow_run_id", "")
        self.sent_step: int = state.get("sent_step", -1)
        self.sent_names: list[str] = state.get("sent_names", [])
        self.sent_bytes: dict[str, int] = state.get("sent_bytes", {})  # of each node's system metrics
        self.ended = {name: state[name] for name in ("status", "sizes") if name in state}
        self._client: MlflowClient | None = None
        self._offset = 0  # the file is read from its start: a resume may have changed what stood at an old offset
        self._pending: list[Point] = []
        self._artifacts_sent: dict[Path, int] = {}
        self._next_system = 0.0
        self._next_artifacts = 0.0
        self._artifact_failures = 0
        self._reported: dict[str, Any] = {}

    def report(self, error: str | None, remedy: str = "") -> None:
        """Write ``logs/mlflow.json`` when it would change, or again for every error. Raises OSError."""
        state = {
            **self.order["key"],
            "place": place_of(self.run_dir),
            "own_id": self.own_id,
            "copied_from": self.copied_from,
            "leases": self.leases,
            "claimed": self.claimed,
            "name": self.name,
            "notes": self.notes,
            "mlflow_run_id": self.mlflow_run_id,
            "sent_step": self.sent_step,
            "sent_names": self.sent_names,
            "sent_bytes": self.sent_bytes,
            "error": error,
            "remedy": remedy,
            "session": self.order["session"],
            **self.ended,
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
            return True
        if time.monotonic() >= self._next_system:
            if self._send_system(self._client):
                return True
            self._next_system = time.monotonic() + SYSTEM_EVERY_S
        if time.monotonic() >= self._next_artifacts:
            self._check_lease(self._client)
            self._try_artifacts()
            self._send_goodput(self._client)
            self._next_artifacts = time.monotonic() + PLOTS_EVERY_S
        return more

    def end(self, status: str) -> None:
        """Mark the MLflow run as ended, then send the last of all but steps."""
        assert self._client is not None
        sizes = sizes_of(self.run_dir)
        self._check_lease(self._client)
        self._client.set_terminated(self.mlflow_run_id, status, self._ended_ms())
        while self._send_system(self._client):
            self.check_order()
        self._send_goodput(self._client)
        if not self._try_artifacts() and self._artifact_failures < ARTIFACT_TRIES:
            raise RuntimeError("the run's files could not be stored")  # tried again, as all is
        self.ended = {"status": status, "sizes": sizes}

    def _check_lease(self, client: MlflowClient) -> None:
        """Raise :class:`_TakenOver` when another folder's start has taken over the MLflow run since."""
        if client.get_run(self.mlflow_run_id).data.tags.get(LEASE, self.lease) != self.lease:
            raise _TakenOver

    def let_go(self) -> None:
        """Leave the MLflow run to the folder that has taken it over, and begin another, with all there is to send."""
        self._client, self.claimed = None, False
        self._offset, self._pending, self._artifacts_sent = 0, [], {}
        self._next_system = self._next_artifacts = 0.0

    def explain(self, error: BaseException) -> tuple[str, str]:
        """Why MLflow takes nothing, and what a person has to do about it, "" where it may come back by itself."""
        if self._client is not None and getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
            try:
                store.check_active(self._client, self.mlflow_run_id)
            except store.ExperimentDeleted as deleted:
                error = deleted
            except Exception:  # it takes no question either: the first error says why
                pass
        return reason(error), store.remedy(error, self.uri, self.order["experiment"])

    def _connect(self) -> MlflowClient:
        client, experiment_id, parent = store.opened(self.run_dir, self.order, "RUNNING" if self.live else "")
        run = self._claim(client, experiment_id)
        if self.live:
            client.update_run(self.mlflow_run_id, status="RUNNING")
            self.ended = {"status": "RUNNING"}
        self._send_name(client, run)
        self._send_params_and_tags(client, run, {"mlflow.parentRunId": parent} if parent else {})
        self._check_lease(client)  # two folders may have claimed it at once
        return client

    def _claim(self, client: MlflowClient, experiment_id: str) -> Run:
        """The MLflow run of this folder, with a new lease: the one it had, or a new one. Raises _TakenOver."""
        run = store.find_run(client, experiment_id, self.own_id, self.mlflow_run_id)
        if run is not None and not self._is_ours(run):
            if self.claimed and not self.live:
                raise _TakenOver
            self.notes.append(
                f"the MLflow run of {self.run_dir} is another folder's by now, a copy of this one or its original: "
                "this one gets an MLflow run of its own, with all steps"
            )
            self.own_id, self.copied_from, self.leases = uuid.uuid4().hex, run.info.run_id, {}
            run = None
        if run is None or run.info.run_id != self.mlflow_run_id:
            self.mlflow_run_id, self.sent_step, self.sent_names, self.sent_bytes = "", -1, [], {}
        self.lease = uuid.uuid4().hex
        known = run.info.run_id if run else ""
        self.leases[known] = [*self.leases.get(known, []), self.lease]
        self.report(None)  # before MLflow has it: whatever kills us, the lease is known to be ours
        if run is None:
            self.name = self.order["run_name"]
            tags = {store.RUN_ID: self.own_id, LEASE: self.lease}
            run = client.create_run(experiment_id, tags=tags, run_name=self.name)
        else:
            client.set_tag(run.info.run_id, LEASE, self.lease)
        self.leases.pop("", None)
        self.mlflow_run_id, self.leases[run.info.run_id], self.claimed = run.info.run_id, [self.lease], True
        self.report(None)
        return run

    def _is_ours(self, run: Run) -> bool:
        lease = run.data.tags.get(LEASE)
        if lease is None:  # an older dnt's
            return bool(run.info.run_id == self.mlflow_run_id)
        return lease in [*self.leases.get(run.info.run_id, []), *self.leases.get("", [])]

    def _send_name(self, client: MlflowClient, run: Run) -> None:
        """Let the MLflow run have the run's name, unless a person gave it another since it was told."""
        name = self.order["run_name"]
        if self.name != name:
            if run.info.run_name != name:
                client.update_run(self.mlflow_run_id, name=name)
                self.notes.append(f"MLflow's run {run.info.run_name} is named {name} now, as its folder is")
            self.name = name

    def _send_params_and_tags(self, client: MlflowClient, run: Run, tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        tags = {store.RUN_ID: self.own_id, **self.order["tags"], **self._description(run), **tags}
        if self.copied_from:
            tags[COPIED_FROM] = self.copied_from
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

    def _description(self, run: Run) -> dict[str, str]:
        """The tags of the run's description; none where a person has written another on MLflow's page."""
        before, told = run.data.tags.get(DESCRIPTION), run.data.tags.get(DESCRIPTION_SHA256)
        if not (text := self.order.get("description", "")) or (before is not None and _sha256(before) != told):
            return {}
        if self.copied_from:
            whose = "" if self.copied_from.startswith("/") else "that of the MLflow run "
            text += f"\nIts folder is a copy of {whose}`{self.copied_from}`.\n"
        text = text[:TAG_CHARS]
        return {DESCRIPTION: text, DESCRIPTION_SHA256: _sha256(text)}

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

    def _ended_ms(self) -> int | None:
        """When the run gave its last sign; None: now."""
        file = self.run_dir / METRICS
        return int(file.stat().st_mtime * 1000) if not self.live and file.exists() else None

    def _log(self, client: MlflowClient, points: list[Point]) -> None:
        from mlflow.entities import Metric

        client.log_batch(self.mlflow_run_id, metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in points])

    def _send_points(self, client: MlflowClient) -> None:
        # Kept until the call succeeds, times included: the very same points sent again are one point to MLflow.
        batch = self._pending[:METRICS_A_CALL]
        self._log(client, batch)
        del self._pending[: len(batch)]
        last = batch[-1].step
        before = self.sent_names if last == self.sent_step else []
        self.sent_step, self.sent_names = last, before + [p.name for p in batch if p.step == last]
        self.report(None)

    def _send_system(self, client: MlflowClient) -> bool:
        """Send the next of the nodes' system metrics; False when there are none."""
        points, sent_bytes = system_metrics.read_new(self.run_dir, self.sent_bytes, METRICS_A_CALL)
        if sent_bytes == self.sent_bytes:
            return False
        for at in range(0, len(points), METRICS_A_CALL):
            self._log(client, points[at : at + METRICS_A_CALL])
        self.sent_bytes = sent_bytes
        self.report(None)
        return True

    def _send_goodput(self, client: MlflowClient) -> None:
        from dnt_scale.record import goodput

        now_ms = int(time.time() * 1000)
        step = max(0, self.sent_step)
        self._log(client, [Point(step, *metric, now_ms) for metric in goodput.metrics(self.run_dir).items()])

    def _try_artifacts(self) -> bool:
        """Send what changed of the files. False when these cannot be stored, which is no reason to keep the numbers."""
        assert self._client is not None
        try:
            self._send_artifacts(self._client)
        except Exception as error:  # whatever a store of files raises
            print(without_login(self.uri, traceback.format_exc()), flush=True)
            self._artifact_failures += 1
            if self._artifact_failures == ARTIFACT_TRIES:
                self.notes.append(f"MLflow has the run's numbers, but not its config.yaml and plots ({reason(error)})")
            return False
        self._artifact_failures = 0
        return True

    def _send_artifacts(self, client: MlflowClient) -> None:
        """Send config.yaml and the files of ``ARTIFACTS`` that changed since they were sent."""
        files = [path for folder in ARTIFACTS for path in sorted((self.run_dir / folder).glob("[!.]*"))]
        for path in [self.run_dir / "config.yaml", *files]:
            if path.is_file() and (changed := path.stat().st_mtime_ns) != self._artifacts_sent.get(path):
                folder = None if path.parent == self.run_dir else path.parent.name
                client.log_artifact(self.mlflow_run_id, str(path), folder)
                self._artifacts_sent[path] = changed


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(run_dir: Path) -> int:
    """Be the sender of ``run_dir`` until training ends.

    Returns:
        0 when all was sent, 1 when not, 3 when the folder was started again.
    """
    order = read_json(run_dir / "logs" / "tracking.json")
    if not order:
        return 3
    _prepare(order)
    parent = _Parent(order["parent_pid"])
    with (run_dir / "logs" / ".mlflow.lock").open("wb") as lock:
        if not _alone(lock.fileno(), parent):
            return 1
        return _send_all(_Sender(run_dir, order, live=True), parent)


def _prepare(order: dict[str, Any]) -> None:
    """Set MLflow up, before it is imported."""
    os.nice(10)
    for name in NOT_OURS:
        os.environ.pop(name, None)
    os.environ["MLFLOW_TRACKING_URI"] = order["key"]["uri"]
    # The sender has its own retries: MLflow's default holds one call for four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def _weigh_session(nice: int) -> None:
    """Linux may weigh sessions against each other, whatever their processes' priorities; this process is one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


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


def _send_all(sender: _Sender, parent: _Parent | _Gone) -> int:
    over = threading.Event()
    threading.Thread(target=_end_when_hung, args=(sender, parent, over), daemon=True).start()
    try:
        return _send_until_over(sender, parent)
    finally:
        over.set()


def _send_until_over(sender: _Sender, parent: _Parent | _Gone) -> int:
    failures = 0
    while True:
        status = parent.status()  # asked before reading: no line written before training ended is missed
        try:
            more = sender.send()
            if status and not more:
                sender.end(status)
            sender.report(None)
            if not sender.answered_at and not status:
                _weigh_session(10)  # not before: the page should say soon that it runs
            sender.answered_at = time.monotonic()
            failures = 0
            if status and not more:
                return 0
            pause = 0.0 if more else SEND_EVERY_S
        except _Superseded:
            return 3
        except _TakenOver:
            if sender.live:
                sender.let_go()
                continue
            sender.ended = {"status": status, "sizes": sizes_of(sender.run_dir)}  # which is the other's to tell
            sender.report(None)
            return 0
        except Exception as error:  # whatever MLflow, a database or the network raises: it is tried again
            failures += 1
            pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_S)
            print(without_login(sender.uri, traceback.format_exc()), flush=True)
            if failures > 1 or status:  # one failed call in the middle of a run is not worth a warning
                with contextlib.suppress(OSError):
                    why, remedy = sender.explain(error)
                    sender.report(without_login(sender.uri, why), remedy)
        if status and _silent_s(sender, parent) > parent.patience_s:
            return 1
        parent.wait(pause)


def _silent_s(sender: _Sender, parent: _Parent | _Gone) -> float:
    """Seconds since the end of training, or MLflow's last answer after it."""
    return time.monotonic() - max(parent.ended_at, sender.answered_at)


def _end_when_hung(sender: _Sender, parent: _Parent | _Gone, over: threading.Event) -> None:
    """MLflow calls have time limits of their own; should one hang all the same, this process still ends."""
    while not over.wait(1):
        if parent.ended_at and _silent_s(sender, parent) > parent.patience_s + HUNG_S:
            os._exit(1)


def settle_here(run_dir: Path, status: Status) -> int:
    """Do what :mod:`dnt_scale.record.mlflow.finalize` wants done in a process of its own.

    Returns as main does, and 4: a sender is alive.
    """
    order = read_json(run_dir / "logs" / "tracking.json")
    if is_settled(run_dir, order, status):
        return 0
    _prepare(order)
    with (run_dir / "logs" / ".mlflow.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 4
        return _send_all(_Sender(run_dir, order, live=False), _Gone(status))


def settle_parent_here(run_dir: Path, status: Status) -> int:
    """The same for a sweep's parent run."""
    order = read_json(run_dir / "logs" / "tracking.json")
    if is_parent_settled(run_dir, order, status):
        return 0
    _prepare(order)
    deadline = threading.Timer(SETTLE_S + HUNG_S, os._exit, (1,))
    deadline.daemon = True
    deadline.start()
    try:
        store.opened(run_dir, order, status)
    except Exception:
        print(without_login(order["key"]["uri"], traceback.format_exc()), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dnt_scale.record.mlflow.sender", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--settle", choices=get_args(Status), help="the run has ended with this status")
    parser.add_argument("--settle-parent", choices=get_args(Status), help="the sweep it is part of has")
    options = parser.parse_args()
    options.run_dir = options.run_dir.absolute()
    if options.settle_parent:
        raise SystemExit(settle_parent_here(options.run_dir, options.settle_parent))
    if options.settle:
        raise SystemExit(settle_here(options.run_dir, options.settle))
    raise SystemExit(main(options.run_dir))

"""A run folder's MLflow run: found or made, filled, and never another folder's.

Two folders never write into one MLflow run, whatever was done to them before. ``logs/mlflow.json``
holds the place that it was written in: a copied folder is at another, and gets an MLflow run of its
own. Where a place cannot tell (another machine, a backup), the lease does: every start gives the
MLflow run a new one, a random number in its tag ``dnt.lease``, and notes it in the folder
beforehand. A run whose lease the folder has not noted is another's by now.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.record.backend import Backend, Order, Status, TakenOver
from dnt_scale.record.files import reason
from dnt_scale.record.folder_identity import is_copy, place_of
from dnt_scale.record.metrics_file import Point
from dnt_scale.record.mlflow import remedies, store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from dnt_scale.record.sender_files import Sent

METRICS_A_CALL = 1000  # MLflow refuses more in one log_batch.
PARAMS_A_CALL = 100
PARAM_CHARS = 6000
TAG_CHARS = 8000

LEASE = "dnt.lease"
COPIED_FROM = "dnt.copied_from"
DESCRIPTION = "mlflow.note.content"
DESCRIPTION_SHA256 = "dnt.description_sha256"  # Of what we wrote: another text is a person's.
# These variables would send a client's calls elsewhere, or drop those that fail.
NOT_OURS = (
    "MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_ENABLE_ASYNC_LOGGING",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
)


@dataclass
class Claim:
    """The MLflow run that a folder fills, and what shows that it is this folder's."""

    place: dict[str, Any]  # The folder's, when this was written.
    own_id: str  # The tag dnt.run_id.
    copied_from: str = ""  # The MLflow run or folder that this one is a copy of.
    # What the tag dnt.lease may be, by MLflow run; "" is one in the making.
    leases: dict[str, list[str]] = field(default_factory=dict)
    # This start has its MLflow run. Where another's has taken it since, finalizing leaves it alone.
    claimed: bool = False
    name: str = ""  # As MLflow was told last.
    mlflow_run_id: str = ""


class MLflow(Backend):
    """See :class:`Backend`. A method may raise whatever MLflow raises."""

    title = "MLflow"

    def __init__(self, run_dir: Path, order: Order, sent: Sent, *, live: bool) -> None:
        self._run_dir = run_dir
        self._order = order
        self._sent = sent
        self._live = live
        self._uri = self.address(order)
        self._lease = ""
        self._open_client: MlflowClient | None = None
        before = sent.before
        copied_from = before.get("copied_from", "")
        place = before.get("place", order.get("former_place"))
        if before and place and is_copy(run_dir, place):
            copied_from = before.get("mlflow_run_id") or place["path"]
            own = "it gets an MLflow run of its own, with all steps"
            sent.notes.append(f"{run_dir} was copied or moved from {place['path']}: {own}")
            sent.forget()
            before = {"own_id": uuid.uuid4().hex}
        this_start = before.get("session") == order["session"]
        self.claim = Claim(
            place=place_of(run_dir),
            own_id=before.get("own_id", order["key"]["run_id"]),
            copied_from=copied_from,
            leases=before.get("leases", {}),
            claimed=this_start and bool(before.get("claimed")),
            name=before.get("name", ""),
            mlflow_run_id=before.get("mlflow_run_id", ""),
        )
        sent.own = vars(self.claim)  # The same object: it is saved as it is then.

    @staticmethod
    def address(order: Order) -> str:
        """Return the tracking URI."""
        return str(order["key"]["uri"])

    @staticmethod
    def prepare(order: Order) -> None:
        """Set the variables that MLflow reads when it is imported."""
        for name in NOT_OURS:
            os.environ.pop(name, None)
        os.environ["MLFLOW_TRACKING_URI"] = order["key"]["uri"]
        # The sender has its own retries: MLflow's default holds one call for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

    @property
    def _client(self) -> MlflowClient:
        assert self._open_client is not None, "open() comes first"
        return self._open_client

    # --- one MLflow run, and a new lease on it ----------------------------------------------------

    def open(self) -> None:
        """Find or make this folder's MLflow run, and take a new lease on it."""
        self._open_client = None
        parent_status = "RUNNING" if self._live else ""
        opened = store.opened(self._run_dir, self._order, parent_status)
        client, experiment_id, self._parent = opened
        self._run = self._take_lease(client, experiment_id)
        self._open_client = client

    def _take_lease(self, client: MlflowClient, experiment_id: str) -> Run:
        claim, sent = self.claim, self._sent
        run = store.find_run(client, experiment_id, claim.own_id, claim.mlflow_run_id)
        if run is not None and not self._is_ours(run):
            if claim.claimed and not self._live:
                raise TakenOver
            sent.notes.append(
                f"the MLflow run of {self._run_dir} is another folder's by now, a copy of this one "
                "or its original: this one gets an MLflow run of its own, with all steps"
            )
            claim.own_id, claim.copied_from, claim.leases = uuid.uuid4().hex, run.info.run_id, {}
            run = None
        if run is None or run.info.run_id != claim.mlflow_run_id:
            claim.mlflow_run_id = ""
            sent.forget()
        self._lease = uuid.uuid4().hex
        known = run.info.run_id if run else ""
        claim.leases[known] = [*claim.leases.get(known, []), self._lease]
        sent.save()  # Before MLflow has it: whatever kills us, the lease is known to be ours.
        if run is None:
            claim.name = self._order["run_name"]
            tags = {store.RUN_ID: claim.own_id, LEASE: self._lease}
            run = client.create_run(experiment_id, tags=tags, run_name=claim.name)
        else:
            client.set_tag(run.info.run_id, LEASE, self._lease)
        claim.leases.pop("", None)
        claim.mlflow_run_id, claim.claimed = run.info.run_id, True
        claim.leases[run.info.run_id] = [self._lease]
        sent.save()
        return run

    def _is_ours(self, run: Run) -> bool:
        claim, lease = self.claim, run.data.tags.get(LEASE)
        if lease is None:  # An older dnt made it.
            return bool(run.info.run_id == claim.mlflow_run_id)
        return lease in [*claim.leases.get(run.info.run_id, []), *claim.leases.get("", [])]

    def check_ours(self) -> None:
        """Raise TakenOver when another folder's start has taken over the MLflow run since."""
        tags = self._client.get_run(self.claim.mlflow_run_id).data.tags
        if tags.get(LEASE, self._lease) != self._lease:
            if self._live:
                self.claim.claimed = False
            raise TakenOver

    # --- what is sent -----------------------------------------------------------------------------

    def mark_running(self) -> None:
        """Show that training is at work."""
        self._client.update_run(self.claim.mlflow_run_id, status="RUNNING")

    def end(self, status: Status, ended_ms: int | None) -> None:
        """Show how the run ended, and when."""
        self._client.set_terminated(self.claim.mlflow_run_id, status, ended_ms)

    def log(self, points: Sequence[Point]) -> None:
        """Store points. MLflow keeps the very same point once, however often it gets it."""
        from mlflow.entities import Metric

        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
        for at in range(0, len(metrics), METRICS_A_CALL):
            batch = metrics[at : at + METRICS_A_CALL]
            self._client.log_batch(self.claim.mlflow_run_id, metrics=batch)

    def store_file(self, path: Path) -> None:
        """Store a file of the run folder as an artifact, in a folder as there."""
        folder = None if path.parent == self._run_dir else path.parent.name
        self._client.log_artifact(self.claim.mlflow_run_id, str(path), folder)

    def describe(self) -> None:
        """Bring name, params, tags and description up to date."""
        self._send_name()
        parent = {"mlflow.parentRunId": self._parent} if self._parent else {}
        self._send_params_and_tags(parent)

    def _send_name(self) -> None:
        """Give the MLflow run the run's name, unless a person gave it another since the last."""
        name, before = self._order["run_name"], self._run.info.run_name
        if self.claim.name != name:
            if before != name:
                self._client.update_run(self.claim.mlflow_run_id, name=name)
                now = f"is named {name} now, as its folder is"
                self._sent.notes.append(f"MLflow's run {before} {now}")
            self.claim.name = name

    def _send_params_and_tags(self, parent: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        claim, before = self.claim, self._run.data.params
        own_tags = {store.RUN_ID: claim.own_id, **self._order["tags"]}
        tags = {**own_tags, **self._description(), **parent}
        if claim.copied_from:
            tags[COPIED_FROM] = claim.copied_from
        params: list[Param] = []
        for name, value in self._order["params"].items():
            text = str(value)[:PARAM_CHARS]
            if name not in before:
                params.append(Param(name, text))
            elif before[name] != text:
                # MLflow never changes a param: the new value is kept as a tag.
                tags[f"param.{name}"] = text
        for at in range(0, len(params), PARAMS_A_CALL):
            batch = params[at : at + PARAMS_A_CALL]
            self._client.log_batch(claim.mlflow_run_id, params=batch)
        all_tags = [RunTag(name, str(value)[:TAG_CHARS]) for name, value in tags.items()]
        for at in range(0, len(all_tags), PARAMS_A_CALL):
            self._client.log_batch(claim.mlflow_run_id, tags=all_tags[at : at + PARAMS_A_CALL])

    def _description(self) -> dict[str, str]:
        """Return the tags of the description; none where a person has written another."""
        tags, text = self._run.data.tags, self._order.get("description", "")
        before = tags.get(DESCRIPTION)
        is_ours = before is None or _sha256(before) == tags.get(DESCRIPTION_SHA256)
        if not text or not is_ours:
            return {}
        if origin := self.claim.copied_from:
            whose = "" if origin.startswith("/") else "that of the MLflow run "
            text += f"\nIts folder is a copy of {whose}`{origin}`.\n"
        text = text[:TAG_CHARS]
        return {DESCRIPTION: text, DESCRIPTION_SHA256: _sha256(text)}

    # --- errors, sweeps ---------------------------------------------------------------------------

    def explain(self, error: BaseException) -> tuple[str, str]:
        """Return why MLflow takes nothing, and what a person has to do about it."""
        refused = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
        if self._open_client is not None and refused:
            try:
                store.check_active(self._open_client, self.claim.mlflow_run_id)
            except store.ExperimentDeleted as deleted:
                error = deleted
            except Exception:  # It takes no question either: the first error says why.
                pass
        return reason(error), remedies.remedy(error, self._uri, self._order["experiment"])

    @staticmethod
    def is_sweep_finalized(run_dir: Path, order: Order, status: Status) -> bool:
        """Return whether the sweep's parent run was told ``status``, or there is none."""
        return store.is_parent_finalized(run_dir, order, status)

    @staticmethod
    def finalize_sweep(run_dir: Path, order: Order, status: Status) -> None:
        """Tell the sweep's parent run."""
        store.opened(run_dir, order, status)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""What a run needs in MLflow, found or made once: store, experiment, run, and a sweep's parent run.

Nothing is made twice, however many runs start at once: whoever looks for something to make it holds
a lock (flock). It lies beside a SQLite store; for others in the folder of the run folders, which
the runs of a sweep must share. All functions may raise whatever MLflow raises.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.config.tracking_uri import sqlite_file, sqlite_uri
from dnt_scale.record.files import locked, read_json, write_json
from dnt_scale.record.folder_identity import is_copy, ordered_place, place_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID = "dnt.run_id"
KIND = "mlflow.experimentKind"
MODEL_TRAINING = "custom_model_development"  # MLflow's page shows such as model training.


class ExperimentDeleted(Exception):
    """The experiment is on MLflow's page no more; ``id`` is its id."""

    def __init__(self, name: str, experiment_id: str) -> None:
        super().__init__(f"the experiment {name!r} was deleted")
        self.id = experiment_id


def opened(
    run_dir: Path,
    order: dict[str, Any],
    parent_status: str,
) -> tuple[MlflowClient, str, str]:
    """Open the store that ``order`` (tracking.json) names, and make what is missing there.

    Args:
        parent_status: what the sweep's parent run is marked with; "": as it is.

    Returns:
        The store, its experiment's id, and the parent run's id, "" without one.
    """
    from mlflow import MlflowClient

    uri = order["key"]["uri"]
    if _is_database(uri):
        _connect(uri)
    if artifacts := _artifacts(run_dir, uri):
        # This is for the experiment that MLflow makes in a new store. Its own choice is below the
        # working folder, and with a ' in that folder's name it makes none.
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
    lock = _lock_file(run_dir, uri)
    with locked(lock):
        client = MlflowClient(tracking_uri=_from_its_folder(uri))
        experiment_id = _experiment(client, run_dir, uri, order["experiment"])
        if not (parent := order.get("parent")):
            return client, experiment_id, ""
        noted = before = read_json(file := parent_file(run_dir, parent["id"]))
        if is_copy(run_dir.parent, before.get("place")):
            noted = {"own_id": uuid.uuid4().hex}  # A copied sweep has a parent run of its own.
        own_id = noted.get("own_id", parent["id"])
        found = find_run(client, experiment_id, own_id, noted.get("mlflow_run_id", ""))
        if found is None:
            tags = {RUN_ID: own_id}
            found = client.create_run(experiment_id, tags=tags, run_name=parent["name"])
        mlflow_run_id, status = found.info.run_id, found.info.status
        if parent_status not in ("", status):
            if parent_status == "RUNNING":
                client.update_run(mlflow_run_id, status=parent_status)
            else:
                client.set_terminated(mlflow_run_id, parent_status)
            status = parent_status
        now = {
            "uri": uri,
            "own_id": own_id,
            "mlflow_run_id": mlflow_run_id,
            "status": status,
            "place": place_of(run_dir.parent),
        }
        if before != now:
            write_json(file, now)
    return client, experiment_id, mlflow_run_id


def parent_file(run_dir: Path, parent_id: str) -> Path:
    """Return the file that notes a sweep's store, MLflow run and the status it was told."""
    return run_dir.parent / f".{parent_id}.mlflow.json"


def is_parent_finalized(run_dir: Path, order: dict[str, Any], status: str) -> bool:
    """Return whether the sweep's parent run was told ``status``.

    True too for a run that is not part of one, and for a copied folder not started since.
    """
    if not (parent := order.get("parent")) or is_copy(run_dir, ordered_place(order)):
        return True
    noted = read_json(parent_file(run_dir, parent["id"]))
    return [noted.get("uri"), noted.get("status")] == [order["key"]["uri"], status]


def _from_its_folder(uri: str) -> str:
    """Return ``uri``, or one from inside the folder of a SQLite file whose name fits in no URI.

    SQLAlchemy, by its version, and MLflow read such a URI differently.
    """
    if (file := sqlite_file(uri)) is None or not set("%?#") & set(str(file.parent)):
        return uri
    os.chdir(file.parent)
    _, mark, query = uri.partition("?")
    return sqlite_uri(Path(file.name)) + mark + query


def _is_database(uri: str) -> bool:
    """Return whether ``uri`` names a database server, which MLflow's client talks to itself."""
    return uri.startswith(("postgresql", "mysql", "mssql"))


def _connect(uri: str) -> None:
    """Raise at once where the database does not answer: MLflow tries for 100 seconds first."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
    except ModuleNotFoundError as error:
        remedy = "for PostgreSQL, pip install 'dnt-scale[postgres]'"
        raise ModuleNotFoundError(f"{error}; {remedy}") from None
    engine.connect().close()
    engine.dispose()


def _lock_file(run_dir: Path, uri: str) -> Path:
    """Return what one process at a time holds: two that create a database's tables both fail."""
    file = sqlite_file(uri)
    path = file.with_name(f".{file.name}.lock") if file else run_dir.parent / ".mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not file and not os.access(path.parent, os.W_OK) and not path.exists():
        return run_dir / "logs" / ".mlflow-store.lock"
    return path


def _experiment(client: MlflowClient, run_dir: Path, uri: str, name: str) -> str:
    """Return the id of the experiment ``name``, made when missing. Raises ExperimentDeleted."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        try:
            place, tags = _artifacts(run_dir, uri), {KIND: MODEL_TRAINING}
            return str(client.create_experiment(name, artifact_location=place, tags=tags))
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:
                raise  # Else another process made it just now.
    if found.lifecycle_stage != "active":
        raise ExperimentDeleted(name, str(found.experiment_id))
    if KIND not in found.tags:
        with contextlib.suppress(MlflowException):  # It is somebody else's experiment, perhaps.
            client.set_experiment_tag(found.experiment_id, KIND, MODEL_TRAINING)
    return str(found.experiment_id)


def _artifacts(run_dir: Path, uri: str) -> str | None:
    """Return where artifacts go when no server decides; MLflow would take ./mlruns."""
    if (file := sqlite_file(uri)) is not None:
        return (file.parent / "mlartifacts").as_uri()
    return (run_dir.parent / "mlartifacts").as_uri() if _is_database(uri) else None


def find_run(client: MlflowClient, experiment_id: str, run_id: str, known: str = "") -> Run | None:
    """Return the MLflow run whose tag ``dnt.run_id`` is ``run_id``; None where there is none.

    Args:
        known: the MLflow run's own id, where it was noted: looked up first.
    """
    from mlflow.exceptions import MlflowException

    if known:
        try:
            found = client.get_run(known)
            if found.info.lifecycle_stage == "active":
                return found
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    query = f"tags.`{RUN_ID}` = '{run_id}'"
    return next(iter(client.search_runs([experiment_id], query, max_results=1)), None)


def check_active(client: MlflowClient, mlflow_run_id: str) -> None:
    """Raise ExperimentDeleted where the run's experiment is on MLflow's page no more."""
    experiment = client.get_experiment(client.get_run(mlflow_run_id).info.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise ExperimentDeleted(experiment.name, str(experiment.experiment_id))

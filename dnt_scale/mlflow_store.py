"""What a run needs in MLflow, found or made once: the store itself, the experiment, the run, and a sweep's parent run.

Nothing is made twice, however many runs start at once: whoever looks for something to make it holds a lock (flock).
It lies beside a SQLite store; for others in the folder of the run folders, which the runs of a sweep must share.
All functions may raise whatever MLflow raises.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.tracking import read_json, sqlite_file, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID = "dnt.run_id"


def opened(run_dir: Path, order: dict[str, Any], parent_status: str) -> tuple[MlflowClient, str, str]:
    """The store that ``order`` (tracking.json) names, its experiment's id, and the parent run's id, "" without one.

    The parent run is marked with ``parent_status``, unless that is "".
    """
    from mlflow import MlflowClient

    uri = order["key"]["uri"]
    if _is_database(uri):
        _connect(uri)
    with _locked(run_dir, uri):
        client = MlflowClient(tracking_uri=uri)
        experiment_id = _experiment(client, run_dir, uri, order["experiment"])
        if not (parent := order.get("parent")):
            return client, experiment_id, ""
        told = read_json(file := parent_file(run_dir, parent["id"]))
        found = run(client, experiment_id, parent["id"], parent["name"], told.get("mlflow_run_id", ""))
        mlflow_run_id, status = found.info.run_id, found.info.status
        if parent_status not in ("", status):
            if parent_status == "RUNNING":
                client.update_run(mlflow_run_id, status=parent_status)
            else:
                client.set_terminated(mlflow_run_id, parent_status)
            status = parent_status
        if told != (now := {"uri": uri, "mlflow_run_id": mlflow_run_id, "status": status}):
            write_json(file, now)
    return client, experiment_id, mlflow_run_id


def parent_file(run_dir: Path, parent_id: str) -> Path:
    """What was last told to MLflow of a sweep: its store, MLflow run and status."""
    return run_dir.parent / f".{parent_id}.mlflow.json"


def _is_database(uri: str) -> bool:
    """Whether ``uri`` names a database server, which MLflow's client talks to itself."""
    return uri.startswith(("postgresql", "mysql", "mssql"))


def _connect(uri: str) -> None:
    """Raise at once where the database does not answer: MLflow itself tries for 100 seconds before it says why."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; for PostgreSQL, pip install 'dnt-scale[postgres]'") from None
    engine.connect().close()
    engine.dispose()


@contextlib.contextmanager
def _locked(run_dir: Path, uri: str) -> Iterator[None]:
    """Held by one process at a time. MLflow processes that create a database's tables at once all fail."""
    file = sqlite_file(uri)
    path = file.with_name(f".{file.name}.lock") if file else run_dir.parent / ".mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: MlflowClient, run_dir: Path, uri: str, name: str) -> str:
    """The id of the experiment ``name``, made when missing."""
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            # opens the experiment's page in MLflow's model-training view
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=_artifacts(run_dir, uri), tags=kind))
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:  # else another made it just now
                raise
    return str(found.experiment_id)


def _artifacts(run_dir: Path, uri: str) -> str | None:
    """Where artifacts go when no server decides: MLflow would take ./mlruns of whatever folder training ran in."""
    if (file := sqlite_file(uri)) is not None:
        return (file.parent / "mlartifacts").as_uri()
    return (run_dir.parent / "mlartifacts").as_uri() if _is_database(uri) else None


def run(client: MlflowClient, experiment_id: str, run_id: str, name: str, known: str = "") -> Run:
    """The MLflow run whose tag ``dnt.run_id`` is ``run_id``, made when missing; looked up as ``known`` first."""
    from mlflow.exceptions import MlflowException

    if known:
        try:
            found = client.get_run(known)
            if found.info.lifecycle_stage == "active":
                return found
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    for found in client.search_runs([experiment_id], f"tags.`{RUN_ID}` = '{run_id}'", max_results=1):
        return found
    return client.create_run(experiment_id, tags={RUN_ID: run_id}, run_name=name)

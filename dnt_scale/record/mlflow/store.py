"""What a run needs in MLflow, found or made once: the store itself, the experiment, the run, and a sweep's parent run;
and what a person has to do where MLflow will not have it.

Nothing is made twice, however many runs start at once: whoever looks for something to make it holds a lock (flock).
It lies beside a SQLite store; for others in the folder of the run folders, which the runs of a sweep must share.
All functions may raise whatever MLflow raises.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.config.tracking_uri import sqlite_file, sqlite_uri, without_login
from dnt_scale.record.files import causes, read_json, write_json
from dnt_scale.record.folder_identity import is_copy, place_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID = "dnt.run_id"
KIND = "mlflow.experimentKind"
MODEL_TRAINING = "custom_model_development"  # MLflow's page shows such an experiment as model training


class ExperimentDeleted(Exception):
    """The experiment is on MLflow's page no more; ``id`` is its id."""

    def __init__(self, name: str, experiment_id: str) -> None:
        super().__init__(f"the experiment {name!r} was deleted")
        self.id = experiment_id


def opened(run_dir: Path, order: dict[str, Any], parent_status: str) -> tuple[MlflowClient, str, str]:
    """The store that ``order`` (tracking.json) names, its experiment's id, and the parent run's id, "" without one.

    The parent run is marked with ``parent_status``, unless that is "".
    """
    from mlflow import MlflowClient

    uri = order["key"]["uri"]
    if _is_database(uri):
        _connect(uri)
    if artifacts := _artifacts(run_dir, uri):
        # Of the experiment that MLflow makes in a new store: its own choice is below the working folder, and with a '
        # in that folder's name it makes none.
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
    with _locked(run_dir, uri):
        client = MlflowClient(tracking_uri=_from_its_folder(uri))
        experiment_id = _experiment(client, run_dir, uri, order["experiment"])
        if not (parent := order.get("parent")):
            return client, experiment_id, ""
        told = before = read_json(file := parent_file(run_dir, parent["id"]))
        if is_copy(run_dir.parent, before.get("place")):  # of a whole sweep: it has a parent run of its own
            told = {"own_id": uuid.uuid4().hex}
        own_id = told.get("own_id", parent["id"])
        found = find_run(client, experiment_id, own_id, told.get("mlflow_run_id", ""))
        if found is None:
            found = client.create_run(experiment_id, tags={RUN_ID: own_id}, run_name=parent["name"])
        mlflow_run_id, status = found.info.run_id, found.info.status
        if parent_status not in ("", status):
            if parent_status == "RUNNING":
                client.update_run(mlflow_run_id, status=parent_status)
            else:
                client.set_terminated(mlflow_run_id, parent_status)
            status = parent_status
        now = {"uri": uri, "own_id": own_id, "mlflow_run_id": mlflow_run_id, "status": status}
        if before != (now := {**now, "place": place_of(run_dir.parent)}):
            write_json(file, now)
    return client, experiment_id, mlflow_run_id


def parent_file(run_dir: Path, parent_id: str) -> Path:
    """What was last told to MLflow of a sweep: its store, MLflow run and status."""
    return run_dir.parent / f".{parent_id}.mlflow.json"


def _from_its_folder(uri: str) -> str:
    """``uri``, or where a SQLite file lies in a folder whose name a URI cannot hold as it is: from inside that folder.

    SQLAlchemy, by its version, and MLflow read such a URI differently.
    """
    if (file := sqlite_file(uri)) is None or not set("%?#") & set(str(file.parent)):
        return uri
    os.chdir(file.parent)
    _, mark, query = uri.partition("?")
    return sqlite_uri(Path(file.name)) + mark + query


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
    if not file and not os.access(path.parent, os.W_OK) and not path.exists():
        path = run_dir / "logs" / ".mlflow-store.lock"
    with path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: MlflowClient, run_dir: Path, uri: str, name: str) -> str:
    """The id of the experiment ``name``, made when missing. Raises ExperimentDeleted."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(
                client.create_experiment(name, artifact_location=_artifacts(run_dir, uri), tags={KIND: MODEL_TRAINING})
            )
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:  # else another made it just now
                raise
    if found.lifecycle_stage != "active":
        raise ExperimentDeleted(name, str(found.experiment_id))
    if KIND not in found.tags:
        with contextlib.suppress(MlflowException):  # somebody else's experiment, perhaps
            client.set_experiment_tag(found.experiment_id, KIND, MODEL_TRAINING)
    return str(found.experiment_id)


def _artifacts(run_dir: Path, uri: str) -> str | None:
    """Where artifacts go when no server decides: MLflow would take ./mlruns of whatever folder training ran in."""
    if (file := sqlite_file(uri)) is not None:
        return (file.parent / "mlartifacts").as_uri()
    return (run_dir.parent / "mlartifacts").as_uri() if _is_database(uri) else None


def find_run(client: MlflowClient, experiment_id: str, run_id: str, known: str = "") -> Run | None:
    """The MLflow run whose tag ``dnt.run_id`` is ``run_id``, looked up as ``known`` first; None: there is none."""
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
    return None


# --- what a person has to do ------------------------------------------------------------------------------------------


def check_active(client: MlflowClient, mlflow_run_id: str) -> None:
    """Raise ExperimentDeleted where the run's experiment is on MLflow's page no more."""
    experiment = client.get_experiment(client.get_run(mlflow_run_id).info.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise ExperimentDeleted(experiment.name, str(experiment.experiment_id))


def remedy(error: BaseException, uri: str, experiment: str) -> str:
    """What a person has to do before MLflow takes anything, in whole sentences; "" where it may come back by itself."""
    found = list(causes(error))
    text = " ".join(str(each) for each in found)
    store = shlex.quote(without_login(uri))
    for each in found:
        if isinstance(each, ExperimentDeleted):
            restore = f"MLFLOW_TRACKING_URI={store} {_mlflow()} experiments restore --experiment-id {each.id}"
            return f"Restore it with `{restore}`, or give the run another with tracking.experiment=NAME."
    if "Invalid Host header" in text:
        return "Start the server with the host that the URI names in `mlflow server --allowed-hosts`."
    status = next((each.get_http_status_code() for each in found if hasattr(each, "get_http_status_code")), 0)
    if status == 401:
        return "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of that server."
    if status == 403:
        return (
            f"Let the server's administrator permit this user to edit the experiment {experiment!r}, log in as another "
            "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD), or give an experiment of yours, "
            "tracking.experiment=NAME."
        )
    if "ENDPOINT_NOT_FOUND" in [getattr(each, "error_code", "") for each in found] or "not in a valid JSON" in text:
        return "No MLflow server answers there: check tracking.uri."
    if "out-of-date database schema" in text:
        if _is_older(text):
            return f"Back the store up, then run `{_mlflow()} db upgrade {store}`."
        python = shlex.quote(sys.executable)
        return f"A newer MLflow made the store: bring this one up to it, `{python} -m pip install --upgrade mlflow`."
    if "password authentication failed" in text or "no password supplied" in text:
        return "Set PGUSER, and PGPASSWORD or a PGPASSFILE, of that database."
    if "permission denied for" in text:
        return "Let the database's administrator grant PGUSER the right to create and write MLflow's tables."
    if (file := sqlite_file(uri)) and any(
        word in text for word in ("readonly database", "unable to open database", "Permission denied", "Read-only file")
    ):
        return f"Make {file} and its folder writable for you, or give another store with tracking.uri=sqlite:///FILE."
    if file and "file is not a database" in text:
        return f"{file} is no SQLite database: give another file with tracking.uri=sqlite:///FILE."
    return ""


def _mlflow() -> str:
    """The `mlflow` command of this Python."""
    beside = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    same = found and Path(found).resolve() == beside.resolve()
    return "mlflow" if same else f"{shlex.quote(sys.executable)} -m mlflow"


def _is_older(text: str) -> bool:
    """Whether the schema version that MLflow found is one that it knows, so that it can bring it up to date."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    version = text.partition("found version ")[2].partition(",")[0]
    scripts = ScriptDirectory(str(Path(db_migrations.__path__[0])))
    return version in {script.revision for script in scripts.walk_revisions()}

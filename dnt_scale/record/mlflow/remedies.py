"""What a person has to do where MLflow takes nothing, by the error that it gave."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from dnt_scale.config.tracking_uri import sqlite_file, without_login
from dnt_scale.record.files import causes
from dnt_scale.record.mlflow.store import ExperimentDeleted

NOT_WRITABLE = (
    "readonly database",
    "unable to open database",
    "Permission denied",
    "Read-only file",
)


def remedy(error: BaseException, uri: str, experiment: str) -> str:
    """Return what a person has to do before MLflow takes anything, in whole sentences.

    It is "" where MLflow may come back by itself.
    """
    found = list(causes(error))
    text = " ".join(str(each) for each in found)
    for each in found:
        if isinstance(each, ExperimentDeleted):
            where = f"MLFLOW_TRACKING_URI={shlex.quote(without_login(uri))}"
            restore = f"{where} {_mlflow()} experiments restore --experiment-id {each.id}"
            another = "give the run another with tracking.experiment=NAME"
            return f"Restore it with `{restore}`, or {another}."
    codes = [getattr(each, "error_code", "") for each in found]
    of_a_store = _of_a_database(text, uri) or _of_a_sqlite_file(text, uri)
    return _of_a_server(found, text, codes, experiment) or of_a_store


def _of_a_server(
    found: list[BaseException],
    text: str,
    codes: list[str],
    experiment: str,
) -> str:
    if "Invalid Host header" in text:
        option = "`mlflow server --allowed-hosts`"
        return f"Start the server with the host that the URI names in {option}."
    with_status = (each for each in found if hasattr(each, "get_http_status_code"))
    status = next((each.get_http_status_code() for each in with_status), 0)
    user = "MLFLOW_TRACKING_USERNAME"
    password = "MLFLOW_TRACKING_PASSWORD"
    if status == 401:
        return f"Set {user} and {password}, or MLFLOW_TRACKING_TOKEN, of that server."
    if status == 403:
        return (
            "Let the server's administrator permit this user to edit the experiment "
            f"{experiment!r}, log in as another ({user}, {password}), or give an experiment of "
            "yours, tracking.experiment=NAME."
        )
    if "ENDPOINT_NOT_FOUND" in codes or "not in a valid JSON" in text:
        return "No MLflow server answers there: check tracking.uri."
    return ""


def _of_a_database(text: str, uri: str) -> str:
    if "out-of-date database schema" in text:
        if _is_older(text):
            store = shlex.quote(without_login(uri))
            return f"Back the store up, then run `{_mlflow()} db upgrade {store}`."
        upgrade = f"{shlex.quote(sys.executable)} -m pip install --upgrade mlflow"
        return f"A newer MLflow made the store: bring this one up to it, `{upgrade}`."
    if "password authentication failed" in text or "no password supplied" in text:
        return "Set PGUSER, and PGPASSWORD or a PGPASSFILE, of that database."
    if "permission denied for" in text:
        what = "the right to create and write MLflow's tables"
        return f"Let the database's administrator grant PGUSER {what}."
    return ""


def _of_a_sqlite_file(text: str, uri: str) -> str:
    if (file := sqlite_file(uri)) is None:
        return ""
    if any(word in text for word in NOT_WRITABLE):
        another = "give another store with tracking.uri=sqlite:///FILE"
        return f"Make {file} and its folder writable for you, or {another}."
    if "file is not a database" in text:
        another = "give another file with tracking.uri=sqlite:///FILE"
        return f"{file} is no SQLite database: {another}."
    return ""


def _mlflow() -> str:
    """Return the `mlflow` command of this Python."""
    beside = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    same = found and Path(found).resolve() == beside.resolve()
    return "mlflow" if same else f"{shlex.quote(sys.executable)} -m mlflow"


def _is_older(text: str) -> bool:
    """Return whether MLflow knows the schema version that it found, and can bring it up to date."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    version = text.partition("found version ")[2].partition(",")[0]
    scripts = ScriptDirectory(str(Path(db_migrations.__path__[0])))
    return version in {script.revision for script in scripts.walk_revisions()}

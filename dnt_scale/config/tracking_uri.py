"""Which tracking URIs can work at all: told at the start of a run, before anything is computed
or queued.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dnt_scale.config.base import nearest

SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
DRIVERS = {  # Python packages that SQLAlchemy's drivers come in, by the module that is missing
    "psycopg": "'dnt-scale[postgres]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "mysql": "mysql-connector-python",
    "pymysql": "pymysql",
    "pyodbc": "pyodbc",
    "pymssql": "pymssql",
}


def check(uri: str) -> None:
    """Refuse a tracking URI that MLflow can never use here. Asks no server and imports no MLflow.

    Raises:
        ValueError: says what is wrong with it and what to give instead.
    """
    if why := _objection(uri):
        with contextlib.suppress(ValueError):
            uri = without_login(uri)
        raise ValueError(f"tracking.uri: {uri} {why}")


def _objection(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        return f"is no URI ({error}); give http://HOST:PORT, or sqlite:///FILE"
    scheme = parts.scheme.lower()
    database, _, driver = scheme.partition("+")
    plugins = {each.name for each in entry_points(group="mlflow.tracking_store")}
    if uri == "databricks" or scheme == "databricks" or scheme in plugins:
        return ""
    if "databricks-uc" in (uri, scheme) or "uc" in (uri, scheme):
        return (
            "names Unity Catalog, which keeps models and takes no runs; give databricks or "
            "databricks://PROFILE"
        )
    if scheme in SERVERS:
        bad = not parts.hostname or re.search(r"\s", uri)
        return f"is no server's address; expected {scheme}://HOST:PORT" if bad else ""
    if re.match(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}(/|$)", uri):
        return f"has no scheme; for an MLflow server give http://{uri}"
    if uri.startswith("//"):
        return f"has no scheme; for an MLflow server give http:{uri}"
    if scheme in ("", "file") or len(scheme) == 1:
        return _of_a_folder(uri)
    if database in DATABASES:
        if not uri.startswith(scheme):
            return f"has a scheme in capitals; give {scheme}{uri[len(scheme) :]}"
        return (
            _of_sqlite(uri)
            if database == "sqlite" and driver in ("", "pysqlite")
            else _of_a_driver(uri)
        )
    if scheme == "postgres":
        return f"has a scheme that SQLAlchemy no longer takes; give postgresql{uri[len(scheme) :]}"
    known = [*SERVERS, *DATABASES, "databricks", *sorted(plugins)]
    near = nearest(scheme, known)
    hint = (
        f"did you mean {near}{uri[len(scheme) :]}?" if near else f"MLflow takes {', '.join(known)}"
    )
    return f"is of a kind that MLflow does not know; {hint}"


def _of_sqlite(uri: str) -> str:
    rest = uri.partition(":")[2]
    if not rest.startswith("///"):
        path = rest.lstrip("/")
        there = (
            f"{sqlite_uri(Path(path))}, or sqlite:////{path} from the root of the file system"
            if path
            else ""
        )
        return f"needs three slashes before a file's path; give {there or 'sqlite:///FILE'}"
    if (file := sqlite_file(uri)) is None:
        return "names no file, so that nothing would be kept; give sqlite:///FILE"
    if file.is_dir():
        return f"names a folder; give a file in it, {sqlite_uri(file / 'mlflow.db')}"
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError:  # it is still to be made, or to be permitted
        return ""
    return (
        ""
        if start in (b"", b"SQLite format 3\0")
        else "names a file that is no SQLite database; give another"
    )


def _of_a_folder(uri: str) -> str:
    """MLflow's store of plain files, which it has given up: only a variable opens it still."""
    if _keeps_files():
        return ""
    path = Path(
        uri.removeprefix("file://") if uri.startswith("file://") else uri.removeprefix("file:")
    )
    file = path if path.suffix in (".db", ".sqlite", ".sqlite3") else path / "mlflow.db"
    instead = f"for a file give {sqlite_uri(file.expanduser().absolute())}"
    if (
        not path.exists()
        and re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(/.*)?", uri)
        and path.suffix != file.suffix
    ):
        instead += f", for an MLflow server http://{uri}"
    return (
        f"names a folder or has no scheme, and MLflow keeps runs in plain files no more; {instead}"
    )


def _keeps_files() -> bool:
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return True
    found = importlib.util.find_spec("mlflow")
    folders = list(found.submodule_search_locations or ()) if found else []
    try:  # the versions before know nothing of that variable
        return (
            b"MLFLOW_ALLOW_FILE_STORE"
            not in (Path(folders[0]) / "environment_variables.py").read_bytes()
        )
    except (OSError, IndexError):
        return True


def _of_a_driver(uri: str) -> str:
    """Whether SQLAlchemy has the dialect and Python the driver that a database's URI asks for."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        dialect = make_url(uri).get_dialect()
        if dialect.is_async:
            return f"asks for {dialect.driver}, which is for asyncio; give another driver, or none"
        dialect.import_dbapi()
    except ArgumentError as error:
        return (
            f"is none that SQLAlchemy can read ({str(error).splitlines()[0]}); expected "
            "DATABASE://HOST:PORT/NAME"
        )
    except ImportError as error:
        package = DRIVERS.get((error.name or "psycopg").partition(".")[0], error.name)
        return f"needs a Python package that is not installed; pip install {package}"
    return ""


def default_uri(run_dir: Path) -> str:
    """The MLflow store used when none is configured: ``mlflow.db`` (SQLite) in the folder that
    holds the run folder.
    """
    return sqlite_uri(run_dir.absolute().parent / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite file. A ``%`` or ``?`` of its path is written as a URI wants it; the
    rest stays readable.
    """
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(uri: str) -> Path | None:
    """The file a ``sqlite:///`` URI names, ``~`` expanded; None for any other store."""
    found = re.match(r"sqlite(?:\+pysqlite)?:///([^?]+)", uri)
    return Path(unquote(found[1])).expanduser() if found and found[1] != ":memory:" else None


def absolute_uri(uri: str) -> str:
    """``uri`` with a relative SQLite path made absolute, so that it means the same store from
    every folder.
    """
    if (file := sqlite_file(uri)) is None:
        return uri
    _, mark, query = uri.partition("?")
    return sqlite_uri(file.absolute()) + mark + query


def without_login(uri: str, text: str = "") -> str:
    """``text``, or else ``uri`` itself, without the user name and password that ``uri`` may
    carry.
    """
    login, at, _ = urlsplit(uri).netloc.rpartition("@")
    return (text or uri).replace(login + at, "") if at else text or uri

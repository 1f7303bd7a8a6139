"""Real MLflow stores for tests and benchmarks: a SQLite file, a PostgreSQL cluster of one's own,
an `mlflow server`.
"""

import contextlib
import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed.ports import free_port
from testbed.waiting import until

PASSWORD = "correct-horse-battery"
PATIENCE_S = 180.0  # for a machine that is busy with other things
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


def runs(uri: str) -> dict[str, Any]:
    """MLflow's runs in a store by name; empty where there is no store yet."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(experiments)}


def points(uri: str, run: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every point that a store holds of a metric, by time."""
    from mlflow import MlflowClient

    history = MlflowClient(uri).get_metric_history(runs(uri)[run].info.run_id, metric)
    return [(point.step, point.value) for point in history]


def sqlite_store(file: Path) -> str:
    """Make a store without runs, with the folders above it, and return its URI."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_empty_store())
    return f"sqlite:///{file}"


@functools.cache
def _empty_store() -> bytes:
    """Return a SQLite store as MLflow makes it: once a process, for it takes seconds."""
    logging.disable(logging.INFO)  # its steps, which would be among what a test says
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs(f"sqlite:///{folder}/mlflow.db")
            return Path(folder, "mlflow.db").read_bytes()
    finally:
        logging.disable(logging.NOTSET)


# --- PostgreSQL -----------------------------------------------------------------------------------


def no_postgres() -> str:
    """Why there is no PostgreSQL to test with; "" where there is. Installs Debian's package
    where that may be done.
    """
    if _postgres_programs():
        return ""
    if os.geteuid() or not shutil.which("apt-get"):
        return "PostgreSQL is not installed, and installing it takes root and apt"
    # a run level of 1: the package's own cluster is not started
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"],
    ):
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            return f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}"
    return "" if _postgres_programs() else "the package postgresql holds no initdb"


def _postgres_programs() -> Path | None:
    """The folder of initdb and postgres."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).parent if found else None


@contextlib.contextmanager
def postgres() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster that listens on the loopback only and asks for a password. Gives a URI without a
    login, and libpq's variables that hold it."""
    programs = _postgres_programs()
    assert programs, no_postgres()
    port = free_port()
    # it refuses to be root's
    as_user: dict[str, Any] = {} if os.geteuid() else {"user": "nobody", "group": "nogroup"}
    with tempfile.TemporaryDirectory(prefix="dnt-postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if as_user:
            for path in (folder, secret):
                shutil.chown(path, **as_user)
        quiet: dict[str, Any] = {"check": True, "capture_output": True, "cwd": folder, **as_user}
        make = [
            programs / "initdb",
            "-D",
            folder / "data",
            "-U",
            "mlflow",
            "--auth=scram-sha-256",
            "--no-sync",
        ]
        subprocess.run([*make, f"--pwfile={secret}", "--locale=C", "--encoding=UTF8"], **quiet)
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
        settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        with (folder / "log").open("wb") as log:
            run: list[str | Path] = [programs / "postgres", "-D", folder / "data", *settings]
            server = subprocess.Popen(run, stdout=log, stderr=log, cwd=folder, **as_user)
        try:
            until(
                lambda: (
                    b"ready to accept connections" in (folder / "log").read_bytes()
                    or server.poll() is not None
                )
            )
            assert server.poll() is None, (folder / "log").read_text()
            login = {"PGUSER": "mlflow", "PGPASSWORD": PASSWORD}
            yield f"postgresql://127.0.0.1:{port}/postgres", login
        finally:
            server.send_signal(signal.SIGQUIT)  # its immediate shutdown
            server.wait(30)


# --- mlflow server --------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(store: str, artifacts: Path, port: int) -> Iterator[str]:
    """`mlflow server` with one worker on a store; gives its URI once it answers. Killed at the
    end, workers and all.
    """
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--host",
        "127.0.0.1",
    ]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", str(artifacts)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command, env={**os.environ, **QUIET}, stdout=log, stderr=log, start_new_session=True
        )

        def answers() -> bool:
            assert server.poll() is None, log.seek(0) or log.read().decode()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{uri}/health", timeout=5) as answer,
            ):
                return bool(answer.read() == b"OK")
            return False

        try:
            until(answers)
            yield uri
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

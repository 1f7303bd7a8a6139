"""What is said where MLflow takes nothing: whatever a message tells to do is done, and the kept
lines arrive.
"""

import http.server
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dnt_scale import config
from dnt_scale.config import tracking_uri
from dnt_scale.record.files import read_json
from dnt_scale.record.mlflow import store
from dnt_scale.record.sender import send_all
from dnt_scale.record.tracker import Tracker
from dnt_scale.record.training_process import EndedTraining
from testbed.run import can_mount
from testbed.stores import PATIENCE_S, sqlite_store
from tests.helpers.senders import begin, client, shown, start, without_processes

pytestmark = pytest.mark.slow


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    sqlite_store(tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


def refused(run_dir: Path, **changes: object) -> tuple[str, str]:
    """The error and the remedy that a start's sender reports; its store takes nothing."""
    sender = begin(run_dir, 2, **changes)
    training = EndedTraining("FINISHED")
    training.patience_s = -1.0  # one try
    assert send_all(sender, training) == 1
    state = read_json(run_dir / "logs" / "mlflow.json")
    return state["error"], state["remedy"]


def advised(text: str) -> str:
    """The command in a message."""
    found = re.search(r"with `([^`]+)`|`([^`]+ db upgrade [^`]+)`", text)
    assert found, text
    return found[1] or found[2]


def test_a_deleted_experiment_is_restored_or_another_is_taken(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = runs_dir / "a", runs_dir / "b"
    with monkeypatch.context() as patched:
        without_processes(patched)
        made, page = start(a), client(a)
        number = page.get_experiment_by_name("tests").experiment_id
        sender = begin(b, 2)
        assert sender.send()
        page.delete_experiment(number)
        with pytest.raises(Exception, match="active") as raised:  # while it is at work
            sender.end("FINISHED")
        assert sender.backend.explain(raised.value)[0] == "the experiment 'tests' was deleted"
        begin(a, 2)  # lines that nobody sends

    names = {
        "uri": None,
        "experiment": "tests",
        "run_name": "a",
        "run_id": "trained",
        "params": {},
        "tags": {},
    }
    tracker = Tracker.start(a, enabled=True, resume_step=4, **names)
    tracker.finish("FAILED", PATIENCE_S)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"2 lines of {a / 'metrics.jsonl'} are not in MLflow" in said
    assert "(the experiment 'tests' was deleted). Restore it with `" in said
    process = tracker.senders[0].process
    assert process is not None
    process.kill()  # it would go on trying for two minutes
    process.wait()

    without_processes(monkeypatch)
    other = start(b, experiment="another")
    assert shown(b) == ("b", [1, 2, 3, 4])
    subprocess.run(advised(said), shell=True, check=True, capture_output=True)
    assert start(a) == made
    assert shown(a) == ("a", [1, 2, 3, 4, 5, 6])
    assert start(b, experiment="another") == other


def test_an_older_store_is_brought_up_to_date(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    newest = next(iter(ScriptDirectory(db_migrations.__path__[0]).walk_revisions()))
    a, file = runs_dir / "a", runs_dir / "old.db"
    for version, last in (
        ("0123456789ab", "a newer MLflow"),
        (str(newest.down_revision), "an older one"),
    ):
        shutil.copy(runs_dir / "mlflow.db", file)
        with sqlite3.connect(file) as database:
            database.execute("UPDATE alembic_version SET version_num = ?", [version])
        database.close()
        SqlAlchemyStore._engine_map.clear()  # else MLflow goes on with the file of before
        error, remedy = refused(a, uri=f"sqlite:///{file}")
        assert "out-of-date database schema" in error
        assert ("A newer MLflow made the store" in remedy) == (last == "a newer MLflow")
    words = shlex.split(advised(remedy))
    assert words[-1] == f"sqlite:///{file}"
    assert words[:-1] in (
        ["mlflow", "db", "upgrade"],
        [sys.executable, "-m", "mlflow", "db", "upgrade"],
    )


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A server, or a proxy before one, that answers every question alike."""

    answer = (401, b"")

    def do_GET(self) -> None:
        status, text = self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (
            (401, b"You are not authenticated."),
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        ((403, b"Permission denied"), "permit this user to edit the experiment 'tests'"),
        (
            (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
            "permit this user to edit the experiment",
        ),
        (
            (403, b"Invalid Host header - possible DNS rebinding attack detected"),
            "`mlflow server --allowed-hosts`",
        ),
        ((404, b"<html>nothing here"), "No MLflow server answers there: check tracking.uri."),
        ((200, b"<html>a router's page"), "No MLflow server answers there: check tracking.uri."),
        ((503, b"starting up"), ""),
    ],
)
def test_what_a_server_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusing: str,
    answer: tuple[int, bytes],
    remedy: str,
) -> None:
    without_processes(monkeypatch)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(_Refusing, "answer", answer)
    _, said = refused(tmp_path / "run", uri=refusing)
    assert said == remedy == "" or (remedy and remedy in said)


@pytest.mark.skipif(not can_mount(), reason="mounting takes root")
def test_a_store_that_cannot_be_written_names_the_file(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    a, file = runs_dir / "a", runs_dir / "mlflow.db"
    subprocess.run(["mount", "--bind", file, file], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", file], check=True)
        _, remedy = refused(a)
    finally:
        subprocess.run(["umount", "-l", file], check=True)  # MLflow has it open
    assert f"Make {file} and its folder writable" in remedy


def test_an_experiment_of_before_is_shown_as_model_training(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    from mlflow import MlflowClient

    page = MlflowClient(f"sqlite:///{runs_dir / 'mlflow.db'}")
    page.create_experiment("of before")
    page.create_experiment("a person's", tags={store.KIND: "genai_development"})
    for number, name in enumerate(("of before", "a person's", "Default", "new")):
        start(runs_dir / "a", experiment=name, run_id=f"id-{number}")
    kinds = {found.name: found.tags[store.KIND] for found in page.search_experiments()}
    training = dict.fromkeys(("of before", "Default", "new"), store.MODEL_TRAINING)
    assert kinds == {**training, "a person's": "genai_development"}


# --- tracking URIs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("127.0.0.1:5000", "for an MLflow server give http://127.0.0.1:5000"),
        ("mlflow.example.org:80/a", "for an MLflow server give http://mlflow.example.org:80/a"),
        ("[::1]:5000", "give http://[::1]:5000"),
        ("//host:5000", "give http://host:5000"),
        ("http:host:5000", "expected http://HOST:PORT"),
        ("http://host:99999", "give http://HOST:PORT"),
        ("mlruns", "give sqlite:////CWD/mlruns/mlflow.db"),
        ("./my runs", "give sqlite:////CWD/my runs/mlflow.db"),
        ("file:///data/mlruns", "give sqlite:////data/mlruns/mlflow.db"),
        ("mlflow.db", "give sqlite:////CWD/mlflow.db"),
        ("mlflow.example.org", "for an MLflow server http://mlflow.example.org"),
        ("sqlite://x.db", "give sqlite:///x.db"),
        ("sqlite:x.db", "give sqlite:///x.db"),
        ("sqlite:///:memory:", "nothing would be kept"),
        ("sqlite:////CWD", "names a folder; give a file in it, sqlite:////CWD/mlflow.db"),
        ("SQLite:///x.db", "give sqlite:///x.db"),
        ("nonsense://", "MLflow takes http"),
        ("htps://host", "did you mean https://host?"),
        ("postgres://host/name", "give postgresql://host/name"),
        ("postgresql+asyncpg://host/name", "for asyncio"),
        ("mysql://host/name", "pip install mysqlclient"),
        ("s3://bucket", "MLflow takes http"),
        ("databricks-uc", "give databricks"),
    ],
)
def test_a_uri_that_can_never_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, instead: str
) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path).strip("/")
    with pytest.raises(ValueError, match=r"^tracking\.uri: ") as raised:
        tracking_uri.check(uri.replace("CWD", here))
    message = str(raised.value)
    assert instead.replace("CWD", here) in message
    for suggested in re.findall(
        r"(?:sqlite:///|https?://)[^,;?]+", message.partition(" ")[2].partition(" ")[2]
    ):
        if "HOST" not in suggested and "FILE" not in suggested:
            tracking_uri.check(suggested)  # is none that is refused


def test_it_is_refused_at_the_start_unless_nothing_is_sent() -> None:
    run = ["data.path=x", "run.name=r", "tracking.uri=mlruns"]
    with pytest.raises(config.ConfigError, match=r"tracking\.uri: mlruns names a folder"):
        config.load(run)
    config.load([*run, "tracking.enabled=false"])
    with pytest.raises(config.ConfigError, match=r"tracking\.experiment: has 257 characters"):
        config.load([*run[:2], f"tracking.experiment={'x' * 257}"])


@pytest.mark.parametrize(
    "uri",
    [
        "http://host",
        "HTTPS://host/a/b?c=d",
        "http://[::1]:5000",
        "sqlite:///x.db",
        "sqlite:////a/b c/100%/x.db?timeout=5",
        "sqlite+pysqlite:///x.db",
        "postgresql://host/name",
        "postgresql+psycopg://host:5433/name?sslmode=require",
        "databricks",
        "databricks://profile",
    ],
)
def test_a_uri_that_can_work_is_not(uri: str) -> None:
    tracking_uri.check(uri)


def test_a_store_of_files_is_taken_where_mlflow_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking_uri.check("mlruns")

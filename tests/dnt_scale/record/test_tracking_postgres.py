"""A PostgreSQL store."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dnt_scale.record.finalize import finalize_run
from dnt_scale.record.tracker import Tracker
from testbed.stores import PASSWORD, PATIENCE_S, no_postgres, points, postgres, runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database() -> Iterator[tuple[str, dict[str, str]]]:
    """An empty PostgreSQL store and the variables that let one in."""
    if why := no_postgres():
        warnings.warn(f"PostgreSQL tests left out: {why}", stacklevel=1)
        pytest.skip(why)
    with postgres() as found:
        yield found


def start(run_dir: Path, uri: str, resume_step: int = 0) -> Tracker:
    return Tracker.start(
        run_dir,
        uri=uri,
        experiment="tests",
        run_name=run_dir.name,
        run_id=f"id-{run_dir.name}",
        params={"optim.lr": 1.0},
        tags={"manifest_sha256": "0" * 64},
        enabled=True,
        resume_step=resume_step,
    )


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(
            {
                "step": step,
                "tokens": step * 512,
                "time": 1e9 + step,
                "train/loss": 9 / step,
                "lr": 0.5,
            }
        )


def test_postgresql_takes_its_password_from_the_environment(tmp_path, database, monkeypatch, capfd):
    uri, login = database
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"127.0.0.1:*:*:{login['PGUSER']}:{login['PGPASSWORD']}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGUSER", login["PGUSER"])

    monkeypatch.setenv("PGPASSWORD", "wrong")
    refused = start(tmp_path / "runs" / "refused", uri)
    log(refused, range(1, 4))
    monkeypatch.setenv("PGPASSWORD", login["PGPASSWORD"])
    one = start(tmp_path / "runs" / "one", uri)  # two runs on a database that has no tables yet
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    two = start(tmp_path / "runs" / "two", uri)
    for tracker in (one, two):
        (tracker.run_dir / "config.yaml").write_text("model: dnt_nano\n")
        log(tracker, range(1, 301))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tracker: tracker.finish("FINISHED", PATIENCE_S), (one, two)))
    assert capfd.readouterr().err == ""
    refused.finish("FAILED", PATIENCE_S)
    assert "password authentication failed" in capfd.readouterr().err
    [sender] = refused.senders
    assert sender.process is not None
    sender.process.kill()  # it would go on trying for two minutes
    sender.process.wait()
    assert finalize_run(refused.run_dir, "FAILED")  # with the right one now

    found = runs(uri)
    assert {name: run.info.status for name, run in found.items()} == {
        "one": "FINISHED",
        "two": "FINISHED",
        "refused": "FAILED",
    }
    assert points(uri, "two", "train/loss") == [(step, 9 / step) for step in range(1, 301)]
    assert found["one"].info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri())
    assert list(elsewhere.iterdir()) == []  # MLflow left nothing where training ran

    # the run goes on: the same MLflow run, no step twice
    again = start(tmp_path / "runs" / "one", uri, resume_step=200)
    log(again, range(201, 321))
    again.finish("FINISHED", PATIENCE_S)
    assert points(uri, "one", "train/loss") == [(step, 9 / step) for step in range(1, 321)]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []

"""Real MLflow, real SQLite, one real `mlflow server`; senders run as the processes they are."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dnt_scale import config
from dnt_scale.config.tracking_uri import default_uri, sqlite_uri
from dnt_scale.record.files import git_commit
from dnt_scale.record.mlflow.ui import open_ui
from dnt_scale.record.plots import plot_run
from dnt_scale.record.sender_files import unsent_lines
from dnt_scale.record.tracker import Tracker
from testbed.ports import free_port
from testbed.stores import mlflow_server, sqlite_store
from testbed.waiting import until

pytestmark = pytest.mark.slow

PARAMS = {
    "optim.lr": 1.0,
    "model.name": "dnt_nano",
    "train.steps": 20,
    "data.limit": None,
    "eval.full": True,
}
TAGS = {"git_commit": "abc123-dirty", "manifest_sha256": "0" * 64}

PATIENCE_S = 120  # for a machine that is busy with other things
ODD = 'it\'s 100%25 #1? a&b; %j [ü] "c"'  # a folder's name
# What MLflow, or Python for it, would take from the environment or out of the working folder.
VARIABLES = {
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    "MLFLOW_RUN_ID": "another",
    "MLFLOW_EXPERIMENT_ID": "7",
    "MLFLOW_EXPERIMENT_NAME": "another",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "MLFLOW_ACTIVE_MODEL_ID": "another",
    "PYTHONPATH": ":.",
}
MODULES = (
    "mlflow",
    "types",
    "random",
    "sqlite3",
    "orjson",
    "json",
    "runpy",
    "dnt_scale",
    "sitecustomize",
    "uvicorn",
)


def in_the_way(folder: Path) -> None:
    """Files of a user's own that are named as modules and folders which MLflow looks for."""
    for name in MODULES:
        (folder / f"{name}.py").write_text(
            f"raise SystemExit('{name} of the working folder was imported')\n"
        )
    for package in ("numpy", "alembic"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "mlruns" / "0").mkdir(parents=True)
    (folder / "mlruns" / "0" / "meta.yaml").write_text("name: another\n")
    (folder / ".env").write_text("MLFLOW_TRACKING_URI=http://127.0.0.1:9\n")


def start(run_dir: Path, resume_step: int = 0, **changes: object) -> Tracker:
    options: dict = {
        "uri": None,
        "experiment": "tests",
        "params": PARAMS,
        "tags": TAGS,
        "enabled": True,
    }
    names = {"run_name": run_dir.name, "run_id": f"id-{run_dir.name}"}
    return Tracker.start(run_dir, resume_step=resume_step, **{**options, **names, **changes})


def line(step: int) -> dict:
    record = {
        "step": step,
        "tokens": step * 512,
        "train/loss": 9 / step,
        "lr": 0.5,
        "grad_norm": 1.5,
        "skipped": 0,
    }
    return record | ({"val/loss": 9 / step + 0.1} if step % 10 == 0 else {})


def steps_in(run_dir: Path) -> list[int]:
    return [
        json.loads(text)["step"] for text in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def mlflow_runs(uri: str) -> tuple:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client, {run.info.run_name: run for run in client.search_runs(experiments)}


def processes_with(argument: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found += (
                [path.parent.name]
                if str(argument).encode() in path.read_bytes().split(b"\0")
                else []
            )
    return found


def test_importing_loads_neither_mlflow_nor_matplotlib():
    code = "import sys, dnt_scale.record.tracker, dnt_scale.record.plots, dnt_scale.record.sender\n"
    code += "print({'mlflow', 'matplotlib', 'torch'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "set()\n"
    )


def test_a_run_and_its_resumption_are_one_mlflow_run(tmp_path, capfd, monkeypatch):
    elsewhere = tmp_path / ODD
    elsewhere.mkdir()
    in_the_way(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    monkeypatch.chdir(elsewhere)
    run_dir = tmp_path / f"{ODD}runs" / ODD / "one"
    with monkeypatch.context() as patched:
        for name, value in VARIABLES.items():
            patched.setenv(name, value)
        tracker = start(run_dir)
    (run_dir / "config.yaml").write_text("model: dnt_nano\n")
    tracker.log({"step": 0, "tokens": 0, "val/loss": 9.5})
    for step in range(1, 21):
        tracker.log(line(step) | ({"train/loss": float("nan")} if step == 7 else {}))
    plot_run(run_dir)
    tracker.finish("FAILED", PATIENCE_S)
    tracker.finish("FINISHED", PATIENCE_S)  # a second call does nothing
    client, runs = mlflow_runs(default_uri(run_dir))
    run = runs["one"]
    assert run.info.status == "FAILED"
    assert run.data.params == {key: str(value) for key, value in PARAMS.items()}
    assert run.data.tags | TAGS == run.data.tags
    assert run.data.metrics["train/loss"] == 9 / 20
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in losses] == [step for step in range(1, 21) if step != 7]
    assert [p.step for p in client.get_metric_history(run.info.run_id, "val/loss")] == [0, 10, 20]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "plots",
    }
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == [
        "plots/loss.png"
    ]
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[7])["train/loss"] is None

    # Resumed at a checkpoint before the last line, with a torn line at the end, and trained further
    # than planned.
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "tok')
    tracker = start(run_dir, resume_step=14, params=PARAMS | {"train.steps": 30})
    assert steps_in(run_dir) == list(range(15))
    for step in range(15, 31):
        tracker.log(line(step))
    tracker.finish("FINISHED", PATIENCE_S)
    assert steps_in(run_dir) == list(range(31))
    client, runs = mlflow_runs(default_uri(run_dir))
    assert list(runs) == ["one"]
    assert runs["one"].info.run_id == run.info.run_id
    assert runs["one"].info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in losses] == [step for step in range(1, 31) if step != 7]
    assert runs["one"].data.params["train.steps"] == "20"
    assert runs["one"].data.tags["param.train.steps"] == "30"
    assert unsent_lines(run_dir) == 0
    assert capfd.readouterr().err == ""
    assert sorted(elsewhere.rglob("*")) == before  # MLflow left nothing where training ran


def test_a_killed_run_is_marked_killed_with_all_its_lines(tmp_path):
    run_dir = tmp_path / "runs" / "victim"
    sqlite_store(tmp_path / "runs" / "mlflow.db")
    code = f"""
import os, signal
from pathlib import Path
from dnt_scale.record.tracker import Tracker
tracker = Tracker.start(Path({str(run_dir)!r}), uri=None, experiment="tests", run_name="victim",
                        run_id="v", params={{}}, tags={{}}, enabled=True, resume_step=0)
for step in range(1, 501):
    tracker.log({{"step": step, "tokens": step, "train/loss": 1 / step}})
if os.fork() == 0:  # like a data loader's worker: it outlives the kill and holds the pipe open
    os.sched_yield(); signal.pause()
print(os.getpid(), tracker.senders[0].process.pid, flush=True)
signal.pause()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    pid, sender = map(int, parent.stdout.readline().split())
    os.kill(sender, signal.SIGTERM)  # a job's signal reaches the sender as well
    os.kill(pid, signal.SIGKILL)
    parent.wait()
    try:
        state = run_dir / "logs" / "mlflow.json"
        until(lambda: state.exists() and unsent_lines(run_dir) == 0)
        until(lambda: mlflow_runs(default_uri(run_dir))[1]["victim"].info.status == "KILLED")
    finally:
        os.killpg(pid, signal.SIGKILL)
    client, runs = mlflow_runs(default_uri(run_dir))
    assert len(client.get_metric_history(runs["victim"].info.run_id, "train/loss")) == 500


def test_two_runs_may_create_the_store_at_once(tmp_path):
    trackers = [start(tmp_path / "runs" / name) for name in ("a", "b")]
    for tracker in trackers:
        tracker.log(line(1))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tracker: tracker.finish("FINISHED", PATIENCE_S), trackers))
    _, runs = mlflow_runs(default_uri(tmp_path / "runs" / "a"))
    assert {name: run.info.status for name, run in runs.items()} == {
        "a": "FINISHED",
        "b": "FINISHED",
    }
    assert len({run.info.experiment_id for run in runs.values()}) == 1


def test_a_server_that_is_down_costs_a_warning_and_gets_everything_later_once(tmp_path, capfd):
    run_dir = tmp_path / "runs" / "offline"
    store = tmp_path / ODD / "mlflow.db"
    sqlite_store(store)
    seed = start(tmp_path / ODD / "seed")
    port = free_port()
    uri = f"http://someone:secret@127.0.0.1:{port}"
    patient = start(tmp_path / "runs" / "patient", uri=uri)
    tracker = start(run_dir, uri=uri)
    for step in range(1, 201):
        tracker.log(line(step))
    # 200 steps done before the sender had as much as started
    assert not (run_dir / "logs" / "mlflow.json").exists()
    assert steps_in(run_dir) == list(range(1, 201))

    def warned(tracker: Tracker) -> bool:
        tracker.check_senders()
        return tracker.senders[0].warned

    patient.log(line(1))
    until(lambda: warned(patient))
    assert capfd.readouterr().err.count("\n") == 1
    until(lambda: warned(tracker))
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1
    assert f"http://127.0.0.1:{port} takes nothing now (ConnectionRefusedError:" in warning
    assert "secret" not in warning + (run_dir / "logs" / "mlflow.log").read_text()
    tracker.log(line(201))
    before = time.monotonic()
    tracker.finish("FINISHED", PATIENCE_S)
    # it does not wait for its time to run out when the store refuses
    assert time.monotonic() - before < PATIENCE_S
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1
    assert f"201 lines of {run_dir / 'metrics.jsonl'} are not in MLflow" in warning
    assert "The same `dnt train` command sends them" in warning

    # The server comes up as `dnt ui`; the same command is run again.
    seed.finish("FINISHED", PATIENCE_S)
    in_the_way(here := tmp_path / ODD)
    code = (
        "from dnt_scale.record.mlflow.ui import open_ui; raise "
        f"SystemExit(open_ui('sqlite:///mlflow.db', {port}))"
    )
    command = [sys.executable, "-P", "-c", code]
    with (tmp_path / "page.log").open("w") as log:
        page = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=log, text=True)
    assert page.stdout is not None
    while not (said := page.stdout.readline()).startswith("open "):
        assert said, (tmp_path / "page.log").read_text()
    assert f"http://127.0.0.1:{port}/#/experiments/1?workflowType=machine_learning " in said
    try:
        tracker = start(run_dir, resume_step=201, uri=uri)
        tracker.finish("FINISHED", PATIENCE_S)
        assert unsent_lines(run_dir) == 0
        assert capfd.readouterr().err == ""
        until(lambda: not warned(patient))
        assert "answers again" in capfd.readouterr().err
        with urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer:
            assert b"MLflow" in answer.read()
    finally:
        assert len(processes_with(port)) > 1
        page.send_signal(signal.SIGINT)
    assert page.wait(60) == 0
    assert processes_with(port) == []  # MLflow's workers are gone too

    # It went away in the middle of a run, and comes back.
    for step in range(2, 152):
        patient.log(line(step))
    until(lambda: warned(patient))
    assert "takes nothing now" in capfd.readouterr().err
    with mlflow_server(sqlite_uri(store), tmp_path / "server" / "mlartifacts", port):
        until(lambda: not warned(patient))
        assert "answers again" in capfd.readouterr().err
        for step in range(152, 202):
            patient.log(line(step))
        patient.finish("FINISHED", PATIENCE_S)
    client, runs = mlflow_runs(sqlite_uri(store))
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ("seed", "offline", "patient"), "FINISHED"
    )
    for name in ("offline", "patient"):
        points = client.get_metric_history(runs[name].info.run_id, "train/loss")
        assert [(point.step, point.value) for point in points] == [
            (step, 9 / step) for step in range(1, 202)
        ]
    assert capfd.readouterr().err == ""


def test_off_means_a_metrics_file_and_nothing_else(tmp_path):
    tracker = start(tmp_path / "run", enabled=False)
    tracker.log(line(1))
    tracker.finish("FINISHED", PATIENCE_S)
    assert steps_in(tmp_path / "run") == [1]
    assert list((tmp_path / "run" / "logs").iterdir()) == []
    assert unsent_lines(tmp_path / "run") == 0


def test_resuming_leaves_a_whole_file_alone_and_a_start_from_zero_empties_it(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    tracker = start(tmp_path / "run", enabled=False)
    for step in range(4):
        tracker.log({"step": step, "tokens": step})
    tracker.finish("FINISHED", PATIENCE_S)
    before = file.stat().st_ino
    start(tmp_path / "run", resume_step=3, enabled=False).finish("FINISHED", PATIENCE_S)
    assert file.stat().st_ino == before
    start(tmp_path / "run", resume_step=2, enabled=False).finish("FINISHED", PATIENCE_S)
    assert steps_in(tmp_path / "run") == [0, 1, 2]
    start(tmp_path / "run", resume_step=0, enabled=False).finish("FINISHED", PATIENCE_S)
    assert file.read_bytes() == b""


def test_a_full_disk_raises_and_leaves_whole_lines(tmp_path):
    code = f"""
import resource, signal
from pathlib import Path
from dnt_scale.record.tracker import Tracker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tracker = Tracker.start(Path({str(tmp_path)!r}), uri=None, experiment="e", run_name="r", run_id="i",
                        params={{}}, tags={{}}, enabled=False, resume_step=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for step in range(1000):
        tracker.log({{"step": step}})
except OSError as error:
    print("raised", step)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert said[0] == "raised"
    assert steps_in(tmp_path) == list(range(int(said[1])))


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_commit(tmp_path):
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@t",
            *arguments,
        ]
        return subprocess.check_output(command, text=True).strip()

    file = tmp_path / "code.py"
    file.write_text("1\n")
    assert git_commit(file) == "unknown"
    git("init", "-q")
    assert git_commit(file) == "unknown"  # in a checkout, but not of it
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert git_commit(file) == head
    file.write_text("2\n")
    assert git_commit(file) == head + "-dirty"


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("https://me:hush@mlflow.example.org", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:hush@db/mlflow", "PGPASSWORD or a PGPASSFILE"),
        ("postgresql://me@db/mlflow", "PGUSER"),
        ("postgresql+psycopg://db/mlflow?sslmode=require&password=hush", "PGPASSWORD"),
    ],
)
def test_a_login_in_the_uri_is_refused(uri, instead):
    with pytest.raises(
        config.ConfigError, match=rf"tracking: uri holds a login.*; set .*{instead}.* instead"
    ) as raised:
        config.load(["data.path=x", "run.name=r", f"tracking.uri='{uri}'"])
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    "uri", ["postgresql://db:5433/mlflow?sslmode=require", "https://mlflow.example.org/a?b=c"]
)
def test_a_uri_without_one_is_not(uri):
    assert config.load(["data.path=x", "run.name=r", f"tracking.uri='{uri}'"]).tracking.uri == uri


def test_the_page_needs_a_store_and_a_port(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no MLflow store at .*none\.db; train a run first"):
        open_ui(f"sqlite:///{tmp_path}/none.db", 5000)
    (tmp_path / "some.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match=r"port \d+ of 127\.0\.0\.1 cannot be used"):
            open_ui(f"sqlite:///{tmp_path}/some.db", other.getsockname()[1])
    assert open_ui("https://me:secret@mlflow.example.org/a", 5000) == 0
    assert capsys.readouterr().out.endswith(": open https://mlflow.example.org/a\n")


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_the_plot_is_a_picture(tmp_path, steps):
    records = [{"step": 0, "tokens": 0, "val/loss": 9.0}]
    records += [line(step) | {"tokens_per_s": 100.0} for step in range(1, steps + 1)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 301, "tok')
    path = plot_run(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 10_000
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def test_a_plot_without_a_loss_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "train/loss": null}\n')
    with pytest.raises(ValueError, match="holds no loss yet"):
        plot_run(tmp_path)

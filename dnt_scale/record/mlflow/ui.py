"""MLflow's page, served from here: ``dnt ui``."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from dnt_scale.config import tracking_uri
from dnt_scale.config.tracking_uri import absolute_uri, sqlite_file, sqlite_uri, without_login
from dnt_scale.record.mlflow.store import KIND, MODEL_TRAINING
from dnt_scale.record.sender_process import sender_environment


def open_ui(uri: str, port: int) -> int:
    """Serve MLflow's page on the store ``uri`` at 127.0.0.1:``port`` until Ctrl-C.

    For a tracking server (an http URI) only prints the address, since it serves the page itself.

    Returns:
        The exit code of ``dnt ui``.

    Raises:
        ValueError: MLflow cannot use such a URI, there is no such SQLite file, the port is taken.
    """
    tracking_uri.check(uri)
    if uri.startswith(("http://", "https://")):
        print(f"MLflow's page is served by the tracking server: open {without_login(uri)}")
        return 0
    uri = absolute_uri(uri)
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        remedy = "train a run first, or name another store with --uri"
        raise ValueError(f"no MLflow store at {file}; {remedy}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            what = f"port {port} of 127.0.0.1 cannot be used ({error.strerror})"
            raise ValueError(f"{what}; choose another one") from None
    # From inside the store's folder: MLflow cannot read every folder's name out of a URI.
    store, folder = (sqlite_uri(Path(file.name)), file.parent) if file else (uri, None)
    options = {
        "--backend-store-uri": store,
        "--registry-store-uri": store,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        # its own default is to import from the folder that it is started in
        "--uvicorn-opts": f"--log-level warning --app-dir {os.devnull}",
    }
    if file is not None:
        options["--artifacts-destination"] = "mlartifacts"
    mlflow = [sys.executable, "-P", "-m", "mlflow"]
    command = [*mlflow, "server", *itertools.chain.from_iterable(options.items())]
    # The job runner is for evaluating prompts and costs seven processes.
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONSAFEPATH": "1",  # in the processes that it starts
    }
    ends = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    print("starting MLflow, which takes some seconds ...", flush=True)
    env = quiet | sender_environment()
    server = subprocess.Popen(command, env=env, cwd=folder, start_new_session=True)
    try:
        while server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            what = f"`mlflow server` on {without_login(uri)}"
            raise ValueError(f"{what} ended with exit code {server.returncode}, see above")
        print(f"open {_address(port)}  (store: {without_login(uri)}; Ctrl-C stops it)", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 0
    finally:
        _end_group(server)
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(port: int) -> str:
    """Return where the page shows the experiment that changed last, as model training.

    It opens for chatbots by itself.
    """
    page, view = f"http://127.0.0.1:{port}", "workflowType=machine_learning"
    query = {
        "filter": f"tags.`{KIND}` = '{MODEL_TRAINING}'",
        "order_by": ["last_update_time DESC"],
        "max_results": 1,
    }
    url = f"{page}/api/2.0/mlflow/experiments/search"
    ask = urllib.request.Request(url, json.dumps(query).encode())
    ask.add_header("Content-Type", "application/json")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(ask, timeout=10) as answer:
            found = json.load(answer)["experiments"][0]["experiment_id"]
    # None is ours yet, or the server says why on its own page.
    except (OSError, ValueError, LookupError):
        return f"{page}/#/experiments?{view}"
    return f"{page}/#/experiments/{found}?{view}"


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """End every process of ``leader``'s group.

    MLflow's workers outlive the process that started them.
    """
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + patience_s
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline:
                leader.poll()  # One that nobody waited for still counts as one of its group.
                os.killpg(leader.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return

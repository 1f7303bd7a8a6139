"""metrics.jsonl and MLflow: what a run did, kept where training cannot be slowed by it.

``RUN/metrics.jsonl`` is the record: rank 0 appends one line a step and does nothing else. A second process, the sender
(:mod:`dnt_scale.record.mlflow.sender`, started by :meth:`Tracker.start`), reads that file and passes it on to MLflow.
So a slow import, a busy SQLite file or a server that is down costs training nothing, and what was not sent stays in
the file for the next start. The two talk through three small files in ``RUN/logs``:

    tracking.json   what the sender is told: store, names, params, tags, description; replaced by every start
    mlflow.json     what the sender did: its MLflow run and the lease on it (see the sender), the last step sent, its
                    last error, the last status told
    mlflow.log      the sender's own output
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import orjson

from dnt_scale.config.tracking_uri import absolute_uri, default_uri, without_login
from dnt_scale.record.files import read_json, warn, write_json
from dnt_scale.record.folder_identity import ordered_place, place_of
from dnt_scale.record.metrics_file import METRICS, _drop_after, unsent_lines

Status = Literal["FINISHED", "FAILED", "KILLED"]


LOOK_EVERY_S = 2.0  # how often training looks at what the sender reports
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


# --- stores and small files -------------------------------------------------------------------------------------------


# --- the folder itself ------------------------------------------------------------------------------------------------


# --- lines of metrics.jsonl -------------------------------------------------------------------------------------------


# --- in the training process ------------------------------------------------------------------------------------------


def parent_of_sweep() -> dict[str, str] | None:
    """Id and name of the sweep that a launcher made this run part of, out of DNT_PARENT=ID:NAME. Raises ValueError."""
    if not (said := os.environ.get("DNT_PARENT")):
        return None
    parent_id, colon, name = said.partition(":")
    if not (colon and name and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", parent_id)):
        raise ValueError(f"DNT_PARENT is {said!r}, expected ID:NAME with an ID of letters, digits, '.', '_' and '-'")
    return {"id": parent_id, "name": name}


def sender_command(run_dir: Path, *options: str) -> list[str]:
    """How the sender is started: out of this very copy of the packages, and with nothing of the working folder."""
    packages = str(Path(__file__).parents[2])
    # they may lie in the working folder, beside files that are named like modules of other packages: searched last
    find = "import runpy, sys; packages = sys.argv.pop(1); sys.path.insert(0, packages); import dnt_scale, data_prep"
    run = "sys.path.append(sys.path.pop(0)); runpy.run_module('dnt_scale.record.mlflow.sender', None, '__main__', True)"
    return [sys.executable, "-P", "-c", f"{find}; {run}", packages, str(run_dir), *options]


def sender_environment() -> dict[str, str]:
    """This process's environment without what belongs to a rank, and without imports from the working folder."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "NCCL_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
    env["CUDA_VISIBLE_DEVICES"] = ""
    folders = env.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [folder for folder in folders if not _is_working_folder(folder)]:
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return env


def _is_working_folder(folder: str) -> bool:
    try:
        return Path(folder).samefile(".")
    except OSError:
        return False


class Tracker:
    """Rank 0's record of a run: appends to ``metrics.jsonl`` and runs the sender. Made by :meth:`start`."""

    def __init__(self, run_dir: Path, uri: str, session: str) -> None:
        self.run_dir = run_dir
        self.uri = uri
        # Unbuffered: a line is in the file, or not at all, when log() returns.
        self._file = (run_dir / METRICS).open("ab", buffering=0)
        self._sender: subprocess.Popen[bytes] | None = None
        self._session = session
        self._next_look = 0.0
        self._warned = False
        self._notes_said = 0

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        run_id: str,
        params: dict[str, str | int | float | bool | None],
        tags: dict[str, str],
        enabled: bool,
        resume_step: int,
        description: str = "",
    ) -> Tracker:
        """Open the record of the run in ``run_dir`` (made when missing) and start the sender when ``enabled``.

        ``uri`` is any MLflow tracking URI; None means :func:`default_uri`. ``run_id`` is the run's own id: a start with
        the id of an earlier one continues its MLflow run, if the folder is still the same. ``resume_step`` is the
        number of steps already done; lines after it are dropped, since they will be written again, and at 0 all are.
        ``description`` is the text on the run's page, in Markdown.
        Raises OSError when the run folder cannot be written, and ValueError for a DNT_PARENT that is not ID:NAME.
        A sender that cannot be started is only warned of.
        """
        run_dir = run_dir.absolute()
        logs = run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        uri = absolute_uri(uri) if uri else default_uri(run_dir)
        session = uuid.uuid4().hex
        # Replaced first: a sender left by an earlier start sees this and stops reading before the file changes.
        if enabled:
            former = read_json(logs / "tracking.json")
            order = {
                "key": {"uri": uri, "run_id": run_id},
                "place": place_of(run_dir),
                # of what mlflow.json says, where an older dnt wrote it
                "former_place": former["former_place"] if "former_place" in former else ordered_place(former),
                "experiment": experiment,
                "run_name": run_name,
                "parent": parent_of_sweep(),
                "params": params,
                "tags": tags,
                "description": description,
                "session": session,
                "parent_pid": os.getpid(),
            }
            write_json(logs / "tracking.json", order)
        else:
            (logs / "tracking.json").unlink(missing_ok=True)
        _drop_after(run_dir / METRICS, resume_step)
        tracker = cls(run_dir, uri, session)
        if enabled:
            tracker._start_sender()
        return tracker

    def _start_sender(self) -> None:
        # A scheduler's signals reach every process of a job. The sender inherits this mask and does not see them: it
        # ends by itself, when training has. Training gets what arrives meanwhile when the mask is lifted again.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            with self._log().open("ab") as log:
                self._sender = subprocess.Popen(
                    sender_command(self.run_dir),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=sender_environment(),
                    start_new_session=True,  # the Ctrl-C meant for training does not reach it
                )
        except OSError as error:
            warn(f"MLflow is off for this start, its sender cannot run: {error}. {self._kept()}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def log(self, metrics: dict[str, float | int | None]) -> None:
        """Append one line, which must hold "step"; a value that is not finite is written as null.

        The line is in the file when this returns. Raises OSError when it cannot be written (disk full), and then
        nothing of it is in the file.
        """
        assert "step" in metrics
        line = orjson.dumps(metrics, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(size)
            advice = "free some space and run the same command again"
            raise OSError(error.errno, f"{error.strerror}; {advice}", str(self.run_dir / METRICS)) from None
        self._look()

    def _look(self) -> None:
        """Tell the user what the sender has to say: when the store stops answering, and when it answers again."""
        if self._sender is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        state = self._state()
        self._say_notes(state)
        error, remedy = state.get("error"), state.get("remedy")
        if self._sender.poll() is not None:
            error = error or f"its sender ended with exit code {self._sender.returncode}, see {self._log()}"
        if error and not self._warned:
            what = f"nothing ({error}). {remedy}" if remedy else f"nothing now ({error})."
            warn(f"MLflow at {without_login(self.uri)} takes {what} Training goes on. {self._kept()}")
            self._warned = True
        elif self._warned and state and not error:
            warn(f"MLflow at {without_login(self.uri)} answers again; the lines kept meanwhile are being sent.")
            self._warned = False

    def _say_notes(self, state: dict[str, Any]) -> None:
        notes = state.get("notes", [])
        for note in notes[self._notes_said :]:
            warn(note)
        self._notes_said = max(self._notes_said, len(notes))

    def _state(self) -> dict[str, Any]:
        """What this start's sender reported last; empty before its first report."""
        state = read_json(self.run_dir / "logs" / "mlflow.json")
        return state if state.get("session") == self._session else {}

    def _kept(self) -> str:
        return f"Every line is kept in {self.run_dir / METRICS} and sent later."

    def _log(self) -> Path:
        return self.run_dir / "logs" / "mlflow.log"

    def finish(self, status: Status, timeout_s: float = 30) -> None:
        """Close the record, tell MLflow how the run ended, and wait up to ``timeout_s`` seconds until all is sent.

        Returns early when the store refuses. What is unsent then is warned of in one line; the sender goes on trying
        for two minutes in the background. Never raises for MLflow's sake; a second call does nothing.
        """
        if self._file.closed:
            return
        self._file.close()
        if self._sender is None:
            return
        assert self._sender.stdin is not None
        asked = time.time()
        with contextlib.suppress(OSError):  # the sender is gone: told below
            self._sender.stdin.write(status.encode() + b"\n")
            self._sender.stdin.flush()
        with contextlib.suppress(OSError):
            self._sender.stdin.close()
        deadline = time.monotonic() + timeout_s
        why, remedy = f"not within {timeout_s:g} s, its sender goes on", ""
        while self._sender.poll() is None and time.monotonic() < deadline:
            state = self._state()
            if state.get("error") and state["time"] > asked:
                why, remedy = state["error"], state.get("remedy", "")
                break
            time.sleep(0.05)
        state = self._state()
        self._say_notes(state)
        if self._sender.returncode == 0:
            return
        if self._sender.returncode is not None:
            why = state.get("error") or f"its sender ended with exit code {self._sender.returncode}"
            remedy = state.get("remedy", "")
        then = f"{remedy} Then the" if remedy else "The"
        unsent = unsent_lines(self.run_dir)
        what = f"{unsent} lines of {self.run_dir / METRICS} are" if unsent else f"the end of {self.run_dir} is"
        warn(
            f"{what} not in MLflow at {without_login(self.uri)} yet ({why}). {then} same `dnt train` "
            f"command sends {'them' if unsent else 'it'}; details in {self._log()}."
        )

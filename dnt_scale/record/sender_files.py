"""The small files in RUN/logs by which training and its senders tell each other things.

tracking.json   what the senders are told: backends, names, params, tags, description; replaced
                by every start
BACKEND.json    what a backend has of the run, and its sender's last error
BACKEND.log     the sender's own output
.BACKEND.lock   held by the sender at work
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson

from dnt_scale.record import appended
from dnt_scale.record.backend import Order, Status, load
from dnt_scale.record.files import read_json, replace_file
from dnt_scale.record.folder_identity import is_copy, ordered_place
from dnt_scale.record.metrics_file import METRICS, unsent_points

BEFORE_BACKENDS = ["mlflow"]  # What an older dnt, whose tracking.json names none, sent to.


def order_file(run_dir: Path) -> Path:
    """Return where tracking.json lies."""
    return run_dir / "logs" / "tracking.json"


def log_file(run_dir: Path, backend: str) -> Path:
    """Return where BACKEND.log lies."""
    return run_dir / "logs" / f"{backend}.log"


def lock_file(run_dir: Path, backend: str) -> Path:
    """Return where the lock of a backend's sender lies."""
    return run_dir / "logs" / f".{backend}.lock"


def read_order(run_dir: Path) -> Order:
    """Return tracking.json; empty where the run is not tracked."""
    return read_json(order_file(run_dir))


def backends_of(order: Order) -> list[str]:
    """Return the names of the backends that a run is sent to."""
    return list(order.get("backends", BEFORE_BACKENDS)) if order else []


def key_of(order: Order, backend: str) -> dict[str, str]:
    """Return what a report must name for its numbers to be of this run at this address."""
    return {"uri": load(backend).address(order), "run_id": order["key"]["run_id"]}


def read_report(run_dir: Path, backend: str) -> dict[str, Any]:
    """Return BACKEND.json; empty before the first report."""
    return read_json(run_dir / "logs" / f"{backend}.json")


class Sent:
    """What a backend has of a run. BACKEND.json holds it, with the fields of the backend's own."""

    def __init__(self, run_dir: Path, order: Order, backend: str) -> None:
        self._file = run_dir / "logs" / f"{backend}.json"
        self._key = key_of(order, backend)
        self._session: str = order["session"]
        self._saved = b""
        before = read_json(self._file)
        if before.get("run_id") != self._key["run_id"]:
            before = {}
        self.before = before  # As the last start's sender left it.
        self.own: dict[str, Any] = {}  # The backend's own fields.
        self.notes: list[str] = []  # Lines for the terminal.
        self.step: int = before.get("sent_step", -1)
        self.names: list[str] = before.get("sent_names", [])  # The metrics of that step.
        self.bytes: dict[str, int] = before.get("sent_bytes", {})  # Of each file of `appended`.
        # The last status told, and the sizes of what was sent by then.
        ended = {"status", "sizes"} & before.keys()
        self.ended: dict[str, Any] = {name: before[name] for name in ended}

    def forget(self) -> None:
        """Have all sent again, for the backend has nothing of this run."""
        self.step, self.names, self.bytes, self.ended = -1, [], {}, {}

    def save(self, error: str | None = None, remedy: str = "") -> None:
        """Replace BACKEND.json when it would change, or again for every error. Raises OSError."""
        state: dict[str, Any] = {
            **self._key,
            **self.own,
            "notes": self.notes,
            "sent_step": self.step,
            "sent_names": self.names,
            "sent_bytes": self.bytes,
            "error": error,
            "remedy": remedy,
            "session": self._session,
            **self.ended,
        }
        content = orjson.dumps(state, option=orjson.OPT_INDENT_2)
        if error or content != self._saved:
            timed = {**state, "time": time.time()}
            replace_file(self._file, orjson.dumps(timed, option=orjson.OPT_INDENT_2))
            self._saved = content


def unsent_lines(run_dir: Path, *backends: str) -> int:
    """Return how many lines of metrics.jsonl a backend lacks; 0 when the run is sent nowhere.

    Of several ``backends``, or all that the run is sent to where none is named, the most.
    """
    order, metrics = read_order(run_dir), run_dir / METRICS
    if not order or not metrics.exists():
        return 0
    lines = metrics.read_bytes().splitlines()
    counts = [_count_unsent(run_dir, order, name, lines) for name in backends or backends_of(order)]
    return max(counts, default=0)


def _count_unsent(run_dir: Path, order: Order, backend: str, lines: list[bytes]) -> int:
    state = read_report(run_dir, backend)
    same = key_of(order, backend).items() <= state.items()
    sent_step, sent_names = -1, []
    if same and not is_copy(run_dir, state.get("place")):
        sent_step, sent_names = state["sent_step"], state["sent_names"]
    return sum(bool(unsent_points(line, sent_step, sent_names, 0)) for line in lines)


def is_finalized(run_dir: Path, order: Order, backend: str, status: Status) -> bool:
    """Return whether a backend was told ``status``, and all that the files hold.

    True too for a run that is not tracked, and for a copied folder that was not started since: the
    backend has nothing of that.
    """
    if not order or is_copy(run_dir, ordered_place(order)):
        return True
    now = {**key_of(order, backend), "status": status, "sizes": sizes_of(run_dir)}
    state = read_report(run_dir, backend)
    return {name: state.get(name) for name in now} == now


def sizes_of(run_dir: Path) -> dict[str, int]:
    """Return the bytes of each file whose lines are sent."""
    files = [run_dir / METRICS, *(each.path for each in appended.files(run_dir))]
    return {str(file.relative_to(run_dir)): file.stat().st_size for file in files if file.exists()}

"""metrics.jsonl and the tracking backends: what a run did, kept where training cannot be slowed.

``RUN/metrics.jsonl`` is the record: rank 0 appends one line a step and does nothing else. For each
backend (:mod:`dnt_scale.record.backend`) a second process, the sender
(:mod:`dnt_scale.record.sender`, started by :meth:`Tracker.start`), reads that file and passes it
on. So a slow import, a busy SQLite file or a server that is down costs training nothing, and what
was not sent stays in the file for the next start. They talk through small files in ``RUN/logs``
(:mod:`dnt_scale.record.sender_files`).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import orjson

from dnt_scale.config.tracking_uri import absolute_uri, default_uri
from dnt_scale.record.backend import Order
from dnt_scale.record.backend import Status as Status
from dnt_scale.record.files import write_json
from dnt_scale.record.folder_identity import ordered_place, place_of
from dnt_scale.record.metrics_file import METRICS, drop_after
from dnt_scale.record.sender_files import order_file, read_order
from dnt_scale.record.sender_process import SenderProcess, tell_end


def parent_of_sweep() -> dict[str, str] | None:
    """Return id and name of the sweep that a launcher made this run part of; None without one.

    Raises:
        ValueError: the variable DNT_PARENT is not ID:NAME.
    """
    if not (said := os.environ.get("DNT_PARENT")):
        return None
    parent_id, colon, name = said.partition(":")
    if not (colon and name and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", parent_id)):
        expected = "ID:NAME with an ID of letters, digits, '.', '_' and '-'"
        raise ValueError(f"DNT_PARENT is {said!r}, expected {expected}")
    return {"id": parent_id, "name": name}


class Tracker:
    """Rank 0's record of a run: appends to ``metrics.jsonl`` and has it sent. See :meth:`start`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.senders: list[SenderProcess] = []
        # Unbuffered: a line is in the file, or not at all, when log() returns.
        self._file = (run_dir / METRICS).open("ab", buffering=0)

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        backends: Sequence[str] = ("mlflow",),
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
        """Open the record of the run in ``run_dir``, which is made, and start its senders.

        Args:
            backends: names of the backends that the run is sent to, when ``enabled``.
            uri: any MLflow tracking URI; None means :func:`default_uri`.
            run_id: the run's own id: a start with the id of an earlier one goes on with what that
                has in the backends, if the folder is still the same.
            resume_step: the number of steps already done; lines after it are dropped, since they
                will be written again, and at 0 all are.
            description: the text on the run's page, in Markdown.

        Raises:
            OSError: the run folder cannot be written.
            ValueError: DNT_PARENT is not ID:NAME.
        """
        run_dir = run_dir.absolute()
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        order: Order = {}
        # Replaced first: a sender that an earlier start has left sees this and stops reading before
        # the file changes.
        if enabled:
            former = read_order(run_dir)
            order = {
                "backends": list(backends),
                "key": {
                    "uri": absolute_uri(uri) if uri else default_uri(run_dir),
                    "run_id": run_id,
                },
                "place": place_of(run_dir),
                # The place that mlflow.json is of, where an older dnt wrote that.
                "former_place": former.get("former_place", ordered_place(former)),
                "experiment": experiment,
                "run_name": run_name,
                "parent": parent_of_sweep(),
                "params": params,
                "tags": tags,
                "description": description,
                "session": uuid.uuid4().hex,
                "parent_pid": os.getpid(),
            }
            write_json(order_file(run_dir), order)
        else:
            order_file(run_dir).unlink(missing_ok=True)
        drop_after(run_dir / METRICS, resume_step)
        tracker = cls(run_dir)
        if enabled:
            tracker._start_senders(order)
        return tracker

    def _start_senders(self, order: Order) -> None:
        self.senders = [SenderProcess(self.run_dir, name, order) for name in order["backends"]]

    def log(self, metrics: dict[str, float | int | None]) -> None:
        """Append one line, which must hold "step"; a value that is not finite is written as null.

        The line is in the file when this returns.

        Raises:
            OSError: it cannot be written (disk full), and then nothing of it is in the file.
        """
        assert "step" in metrics
        line = orjson.dumps(metrics, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(size)
            what = f"{error.strerror}; free some space and run the same command again"
            raise OSError(error.errno, what, str(self.run_dir / METRICS)) from None
        self.check_senders()

    def check_senders(self) -> None:
        """Tell the user what the senders have to say, when it is time to ask them."""
        for sender in self.senders:
            sender.check()

    def finish(self, status: Status, timeout_s: float = 30) -> None:
        """Close the record, say how the run ended, and wait until all is sent.

        Returns early when the backends refuse, and after ``timeout_s`` seconds. What is unsent then
        is warned of in a line for each; the senders go on trying for two minutes in the background.
        Never raises for a backend's sake; a second call does nothing.
        """
        if self._file.closed:
            return
        self._file.close()
        tell_end(self.senders, status, timeout_s)

"""What a tracking backend is: MLflow, TensorBoard, or another that shows people a run's records.

metrics.jsonl is the record; a backend gets what stands there from a sender
(:mod:`dnt_scale.record.sender`), a process of its own beside training. The backend NAME is the
class ``BACKEND`` of dnt_scale/record/NAME.py, or of a folder NAME, together with
configs/tracking/NAME.yaml, and nothing else lists it. docs/extend/tracker.md makes one.

Training and the senders import these files, so they import their library inside of functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from dnt_scale.record.files import reason
from dnt_scale.record.metrics_file import Point

if TYPE_CHECKING:
    from dnt_scale.record.sender_files import Sent

Status = Literal["FINISHED", "FAILED", "KILLED"]
Order = dict[str, Any]  # RUN/logs/tracking.json, see dnt_scale.record.sender_files


class TakenOver(Exception):
    """Another run folder's start has taken over this one's place in the backend."""


class Lost(Exception):
    """What was sent is not there any more: the sender begins anew, with :meth:`Backend.open`."""


class Backend(Protocol):
    """Where one sender passes one run folder on to.

    Any method may raise whatever its library raises: the sender reports it and calls again later,
    with the very same points. So a backend stores a point once that it is given twice, or takes
    none of a call that fails. What it writes into the run folder lies in RUN/NAME, by its name.
    What a subclass does not define, it does not do.
    """

    title: ClassVar[str]  # The name that people know it by.

    def __init__(self, run_dir: Path, order: Order, sent: Sent, *, live: bool) -> None:
        """Begin, without asking anybody yet.

        Args:
            order: what training told of the run: its names, ``params``, ``tags``, ``description``.
            sent: what the backend has already; ``sent.own`` takes fields of the backend's own,
                which the next sender finds in ``sent.before``.
            live: training is at work; else it has ended, and this sender tells the rest.
        """

    @staticmethod
    def address(order: Order) -> str:
        """Return where the run goes, as people are told."""

    @staticmethod
    def objection() -> str:
        """Return why this backend cannot work here, and what to do; "" where it can."""
        return ""

    @staticmethod
    def prepare(order: Order) -> None:
        """Set up the sender's process, before anything imports the library."""
        return

    def open(self) -> None:
        """Find or make the run's place. Calls ``sent.forget`` where nothing of the run is there."""
        return

    def mark_running(self) -> None:
        """Show that training is at work."""
        return

    def describe(self) -> None:
        """Show the run's name, parameters, tags and description."""
        return

    def log(self, points: Sequence[Point]) -> None:
        """Store points, a thousand or two at most, all or none."""

    def store_file(self, path: Path) -> None:
        """Store config.yaml or a file of RUN/plots or RUN/profile, which is new or has changed."""
        return

    def check_ours(self) -> None:
        """Raise :class:`TakenOver` where another run folder has taken over the run's place."""
        return

    def end(self, status: Status, ended_ms: int | None) -> None:
        """Show how the run ended, and when, in milliseconds since 1970; None: just now."""
        return

    def explain(self, error: BaseException) -> tuple[str, str]:
        """Return why nothing is taken, and what a person has to do about it, "" where nothing."""
        return reason(error), ""

    @staticmethod
    def is_sweep_finalized(run_dir: Path, order: Order, status: Status) -> bool:
        """Return whether the sweep that the run is part of is shown to have ended as ``status``."""
        return True

    @staticmethod
    def finalize_sweep(run_dir: Path, order: Order, status: Status) -> None:
        """Show that the sweep that the run is part of has ended as ``status``."""
        return


def load(name: str) -> type[Backend]:
    """Return the backend of that name. Raises ValueError where there is none."""
    found: type[Backend] | None = None
    try:
        found = getattr(importlib.import_module(f"dnt_scale.record.{name}"), "BACKEND", None)
    except ModuleNotFoundError as error:
        if error.name != f"dnt_scale.record.{name}":  # It is what its own file imports.
            raise ValueError(f"tracking.backends: {name} cannot be imported: {error}") from None
    if found is None:
        what = f"{name} is no backend: dnt_scale/record/{name}.py has no BACKEND"
        raise ValueError(f"tracking.backends: {what}")
    return found


def check_backends(names: Sequence[str]) -> None:
    """Raise ValueError where a backend cannot work here, such as one that is not installed."""
    for name in names:
        if why := load(name).objection():
            raise ValueError(f"tracking.backends: {name} {why}")

"""Whether a run folder is the one that its records were written in, or a copy of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from dnt_scale.record.files import read_json


def place_of(run_dir: Path) -> dict[str, Any]:
    """Return what tells a run folder from its copies: its real path, and its inode's number."""
    return {"path": os.path.realpath(run_dir), "inode": run_dir.stat().st_ino}


def is_copy(run_dir: Path, place: dict[str, Any] | None) -> bool:
    """Return whether a folder with a run's ``place`` is not that run's: path and inode differ.

    A renamed folder keeps its inode, a restored one its path. None, which an older dnt leaves: it
    is not known, so no.
    """
    now = place_of(run_dir)
    return place is not None and all(value != place.get(key) for key, value in now.items())


def ordered_place(order: dict[str, Any]) -> dict[str, Any] | None:
    """Return the place of the folder that a tracking.json was written in; None where nothing tells.

    An older dnt wrote down the run's configuration only. It tells where the folder that it names is
    still this run's.
    """
    if order.get("place") or not order:
        return order.get("place")
    try:
        was = Path(yaml.safe_load(order["tags"]["config"])["run"]["dir"])
        theirs = read_json(was / "logs" / "tracking.json")
        return place_of(was) if theirs["key"]["run_id"] == order["key"]["run_id"] else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None

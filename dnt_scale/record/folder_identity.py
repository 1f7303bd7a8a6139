"""Whether a run folder is the one that its records were written in, or a copy of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from dnt_scale.record.files import read_json


def place_of(run_dir: Path) -> dict[str, Any]:
    """What tells a run folder from its copies: its real path, and the number that its file system gave it."""
    return {"path": os.path.realpath(run_dir), "inode": run_dir.stat().st_ino}


def is_copy(run_dir: Path, place: dict[str, Any] | None) -> bool:
    """Whether a folder that carries the place of a run is not that run's: neither path nor inode is as it was.

    A renamed folder keeps its inode, a restored one its path. None, of a run of an older dnt: it is not known.
    """
    return place is not None and all(value != place.get(key) for key, value in place_of(run_dir).items())


def ordered_place(order: dict[str, Any]) -> dict[str, Any] | None:
    """The place of the folder that ``order`` (a tracking.json) was written in; None where nothing tells.

    An older dnt wrote down the run's configuration only: where the folder that it names is still this run's.
    """
    if order.get("place") or not order:
        return order.get("place")
    try:
        was = Path(yaml.safe_load(order["tags"]["config"])["run"]["dir"])
        theirs = read_json(was / "logs" / "tracking.json")
        return place_of(was) if theirs["key"]["run_id"] == order["key"]["run_id"] else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None

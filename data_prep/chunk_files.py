"""Chunk files: which pieces of which units are done, and making those that are not.

A chunk is one file of arrays (.npz), a function of its piece and of options that its folder is
named by. It is there when it is whole.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from rich.console import Console

from data_prep.arrays import Array
from data_prep.files import write_whole
from data_prep.process_pool import ordered_map
from data_prep.progress import stage
from data_prep.read.pieces import Unit, stored_bytes


class AnyPiece(Protocol):
    """Some MB of a unit: its number in it, and the stored bytes read since the piece before."""

    @property
    def number(self) -> int: ...
    @property
    def input_bytes(self) -> int: ...


SomePiece = TypeVar("SomePiece", bound=AnyPiece)


class ChunkResult(NamedTuple):
    """What a finished chunk tells the progress bar."""

    unit: int
    input_bytes: int
    text_bytes: int
    tokens: int


def make_missing(
    name: str,
    make: Callable[[], Callable[[tuple[int, SomePiece, Path]], ChunkResult]],
    read: Callable[[Unit], Iterable[SomePiece]],
    units: Sequence[Unit],
    folders: Sequence[Path],
    workers: int,
    console: Console,
) -> list[list[Path]]:
    """Return the chunk files of each unit, in order, in its folder; those that an earlier run left
    are not made again.

    Args:
        name: of the stage, as a person sees it.
        make: gives each worker process a function of (unit's number, piece, place of the chunk).
        read: gives the pieces of a unit.

    Raises what reading and making raise.
    """
    journal = Journal(folders)
    with stage(console, name, sum(map(stored_bytes, units))) as advance:

        def items() -> Iterator[tuple[int, SomePiece, Path]]:
            for number, unit in enumerate(units):
                if journal.is_whole(number):
                    advance(stored_bytes(unit))
                    continue
                for piece in read(unit):
                    if path := journal.missing(number, piece.number):
                        yield number, piece, path
                    else:
                        advance(piece.input_bytes)
                journal.was_read(number)

        with closing(ordered_map(make, items(), workers)) as results:
            for made in results:
                advance(made.input_bytes, made.text_bytes, made.tokens)
                journal.was_made(made.unit)
    return journal.paths


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as .npz, without compression."""
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


class Journal:
    """Which chunks of which units are there: a unit that is whole says so in a file of its own."""

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self._pending = [0] * len(folders)
        self._read = [False] * len(folders)
        self.paths: list[list[Path]] = [[] for _ in folders]

    def is_whole(self, unit: int) -> bool:
        folder = self._folders[unit]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            names = json.loads((folder / "whole.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        if not all(zipfile.is_zipfile(folder / name) for name in names):
            return False
        self.paths[unit] = [folder / name for name in names]
        return True

    def missing(self, unit: int, piece: int) -> Path | None:
        """Return where to write a chunk, or None if it is there."""
        path = self._folders[unit] / f"{piece:06}.npz"
        self.paths[unit].append(path)
        if zipfile.is_zipfile(path):
            return None
        self._pending[unit] += 1
        return path

    def was_made(self, unit: int) -> None:
        self._pending[unit] -= 1
        self._note(unit)

    def was_read(self, unit: int) -> None:
        self._read[unit] = True
        self._note(unit)

    def _note(self, unit: int) -> None:
        if self._read[unit] and not self._pending[unit]:
            text = json.dumps([path.name for path in self.paths[unit]])
            write_whole(self._folders[unit] / "whole.json", lambda beside: beside.write_text(text))

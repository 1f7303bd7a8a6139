"""``dnt import DIR KEY=VALUE ...``: the checkpoint of step 0 of a new run from the weights of a
folder of transformers, in safetensors: nothing is unpickled, no code of the folder runs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from torch import Tensor

from dnt_scale.checkpoint.inspection import bytes_of
from dnt_scale.checkpoint.read import StoredRegions, by_name, whole_shape
from dnt_scale.checkpoint.safetensors_header import read_header
from dnt_scale.checkpoint.storage import CheckpointError, Storage
from dnt_scale.config import ModelSection
from dnt_scale.tools.convert_weights import FoundWeights, begin_from
from dnt_scale.tools.hugging_face.architectures import (
    Stored,
    exported_shapes,
    read_settings,
    stored_tensors,
)
from dnt_scale.tools.hugging_face.export import whole

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
# constants that older releases stored beside the weights
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "dnt": ""}


class _Index(BaseModel):
    weight_map: dict[str, str]


def import_weights(folder: Path, overrides: Sequence[str]) -> str:
    """Make the checkpoint from which the run that ``overrides`` describe begins; what was written.

    Raises:
        ValueError: the folder's model or weights are none of ours, the run is not described as
            `dnt train` wants it, or its data is of another tokenizer than the folder's.
        OSError: a file cannot be read, or the checkpoint not written.
    """
    kind, model = read_settings(folder)
    shapes = exported_shapes(model)
    tensors = stored_tensors(kind, list(shapes))
    place = Storage(folder)
    stored = _named(_stored(folder), tensors, PREFIXES[kind])
    _check(folder, stored, tensors, shapes)
    source = {name: each for each in tensors for name in each.ours}

    def values(name: str) -> Iterator[Tensor]:
        each = source[name]
        parts = each.parts(whole(place, stored, each.name), shapes)
        yield from (part for ours, part in zip(each.ours, parts, strict=True) if ours == name)

    def find(wanted: dict[str, tuple[int, ...]], of: ModelSection) -> FoundWeights:
        for name in [*wanted, *shapes]:
            rows = of.exported_rows(name)
            expected = wanted.get(name)
            if expected is not None and rows is not None:
                expected = (rows, *expected[1:])
            if shapes.get(name) != expected:
                raise CheckpointError(
                    f"{folder}: {name} has shape {shapes.get(name)}, the run's model has "
                    f"{expected}; leave out the overrides of model.* that change it"
                )
        return FoundWeights(shapes, sum(map(bytes_of, stored.values())), values)

    tokenizer, facts = folder / "tokenizer.model", {}
    if tokenizer.is_file():
        facts = {"tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}
    return begin_from(folder, model.model_dump_json(), find, overrides, "dnt import", facts)


def _stored(folder: Path) -> StoredRegions:
    """Return what lies where in a folder's files of weights. Raises CheckpointError where there are
    none.
    """
    files = [ONE]
    if (index := folder / INDEX).is_file():
        try:
            files = sorted(set(_Index.model_validate_json(index.read_bytes()).weight_map.values()))
        except ValidationError as error:
            raise CheckpointError(f"{index}: {error.errors()[0]['msg']}; restore it") from None
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: names {file!r:.80}, expected safetensors files in its own folder"
                )
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / file}: no such file; expected weights in safetensors (a pickle, "
                "pytorch_model.bin, is not read)"
            )
    return by_name(part for file in files for part in read_header(Storage(folder), file))


def _named(stored: StoredRegions, tensors: list[Stored], prefix: str) -> StoredRegions:
    """Return the weights by the names of a causal language model: a folder may hold the model
    below the head, without its prefix, constants, and a tied head.
    """
    if not any(name.startswith(prefix) for name in stored):
        stored = {prefix + name: parts for name, parts in stored.items()}
    tied = {"lm_head.weight"} - {each.name for each in tensors}
    return {
        name: parts
        for name, parts in stored.items()
        if not name.endswith(CONSTANTS) and name not in tied
    }


def _check(
    folder: Path,
    stored: StoredRegions,
    tensors: list[Stored],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise CheckpointError unless the tensors are those of the settings, in names and shapes."""
    expected = {each.name: each.shape(shapes) for each in tensors}
    for problem, names in (
        ("have no", [name for name in expected if name not in stored]),
        ("have, but its config.json not,", [name for name in stored if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise CheckpointError(
                f"{folder}: its weights {problem} {names[0]}{more}; restore the folder"
            )
    for name, shape in expected.items():
        found, dtype = whole_shape(stored[name]), stored[name][0].dtype
        if found != shape or not dtype.is_floating_point:
            raise CheckpointError(
                f"{folder}: {name} has shape {found} and dtype {dtype}, expected {shape} and "
                "floating point, as config.json says; restore the folder"
            )

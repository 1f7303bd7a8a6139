"""``dnt export RUN --to hf DIR``: a run's weights as a folder that transformers loads."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnt_scale.checkpoint.inspection import checkpoints_at, problems_of, values_of
from dnt_scale.checkpoint.progress import Meter
from dnt_scale.checkpoint.read import StoredRegions, read_parts
from dnt_scale.checkpoint.safetensors_header import make_header
from dnt_scale.checkpoint.state import State, read_state
from dnt_scale.checkpoint.storage import CheckpointError, Storage, fsync_folder
from dnt_scale.checkpoint.tensor_shards import AVERAGE, WEIGHT, Region
from dnt_scale.checkpoint.write import write_file
from dnt_scale.config import ConfigError, ModelConfig
from dnt_scale.tools.generate import language_run, tokenizer_file
from dnt_scale.tools.hugging_face.architectures import (
    Architecture,
    Stored,
    architecture_of,
    exported_shapes,
    settings_of,
    stored_tensors,
)
from dnt_scale.tools.hugging_face.model_card import card
from dnt_scale.tools.hugging_face.tokenizer_json import write_tokenizer
from dnt_scale.tools.inference import Trained

INTERMEDIATE = ".partial-"
CODE = ("configuration_dnt.py", "modeling_dnt.py")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(trained: Trained, out: Path, *, dtype: str, shard_gb: float, data: Path | None) -> str:
    """Write the folder, whole or not at all; what was written.

    Args:
        dtype: of the weights, ``fp32`` or ``bf16``.
        shard_gb: a file of weights has at most so many GB (10^9 bytes), or one tensor.
        data: where the tokenizer is, if the run's data has moved.

    Raises:
        ValueError: a damaged checkpoint, no language model, no tokenizer, or a folder that holds
            something already.
        OSError: the folder cannot be written.
    """
    out = out.resolve()  # `.` has no name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; give a new folder, or remove it first")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent} to make it in; make that first")
    run_dir, run, place, _ = trained
    source, model = language_run(run_dir, run, data)
    tokenizer, manifest = tokenizer_file(source)
    folder = checkpoints_at(str(place))[-1]
    state = read_state(folder.path)
    if problem := source.foreign(state.of_source, place):
        raise ConfigError(f"{source.parts()[0].place}: {problem}")
    if problems := problems_of(folder, state):
        raise CheckpointError(problems[0])
    kind = architecture_of(model)
    partial = out.with_name(INTERMEDIATE + out.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        ids = manifest.eos_id, manifest.tokenizer.vocab_size
        count = write_weights(folder, state, model, kind, partial, DTYPES[dtype], shard_gb)
        write_settings(partial, model, kind, DTYPES[dtype], *ids)
        made = write_tokenizer(tokenizer, manifest.eos_id, model.context, partial)
        (partial / "README.md").write_text(card(run, run_dir, state, dtype, kind), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    name = settings_of(model, kind)["architectures"][0]
    return (
        f"{out}: step {state.step:,} as {name}{' (code in the folder)' if kind == 'dnt' else ''}, "
        f"{count} tensors in {dtype}, tokenizer by {made}"
    )


def write_settings(
    folder: Path, model: ModelConfig, kind: Architecture, dtype: torch.dtype, eos: int, known: int
) -> None:
    """Write config.json and generation_config.json.

    Args:
        eos: id of the token that stands before and after documents.
        known: ids that the tokenizer has; the model may have more, which are not sampled.
    """
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos)
    name = str(dtype).removeprefix("torch.")
    settings = {**settings_of(model, kind), **ids, "dtype": name, "torch_dtype": name}
    write_json(folder / "config.json", settings)
    more = {"suppress_tokens": list(range(known, model.vocab_size))}
    write_json(
        folder / "generation_config.json", {**ids, **(more if known < model.vocab_size else {})}
    )
    if kind == "dnt":
        for file in CODE:
            shutil.copyfile(Path(__file__).parent / "remote_code" / file, folder / file)


def write_weights(
    folder: Storage,
    state: State,
    model: ModelConfig,
    kind: Architecture,
    out: Path,
    dtype: torch.dtype,
    shard_gb: float,
) -> int:
    """Write the weights (their average where there is one) in files, and their index; how many
    tensors.
    """
    stored = read_parts(folder)
    ours = AVERAGE if state.averaged else WEIGHT
    shapes = exported_shapes(model)
    tensors = stored_tensors(kind, list(shapes))
    sizes = [dtype.itemsize * math.prod(each.shape(shapes)) for each in tensors]
    shards = split(tensors, sizes, shard_gb * 1e9)
    index: dict[str, str] = {}
    with Meter("writing", sum(sizes)) as meter:

        def chunks(shard: Sequence[Stored]) -> Iterator[memoryview]:
            entries = [
                (each.name, dtype, Region((0,) * len(shape), shape))
                for each in shard
                for shape in [each.shape(shapes)]
            ]
            yield memoryview(make_header(entries))
            for each in shard:
                parts = [
                    whole(folder, stored, ours + name)[: shapes[name][0]] for name in each.ours
                ]
                values = each.joined(parts).to(dtype)
                yield values.flatten().view(torch.uint8).numpy().data
                meter(values.nbytes)

        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = name if len(shards) > 1 else "model.safetensors"
            write_file(Storage(out), name, chunks(shard), reused=True)
            index |= {each.name: name for each in shard}
    if len(shards) > 1:
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes)}, "weight_map": index},
        )
    return len(tensors)


def split(tensors: list[Stored], sizes: list[int], most: float) -> list[list[Stored]]:
    """Return the tensors in order, in runs of at most ``most`` bytes or of one tensor."""
    shards: list[list[Stored]] = []
    filled = math.inf
    for each, size in zip(tensors, sizes, strict=True):
        if filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(each)
        filled += size
    return shards


def whole(folder: Storage, stored: StoredRegions, name: str) -> Tensor:
    """Return a tensor of a checkpoint. Raises CheckpointError where it is not whole."""
    if name not in stored:
        raise CheckpointError(f"{folder}: has no {name}; it is not of the run's model")
    return torch.cat([values.clone() for _, values in values_of(folder, stored, name)])


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")

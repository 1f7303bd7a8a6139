"""``state.json``: everything a resumed run needs beside the tensors."""

import contextlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dnt_scale.checkpoint.storage import CheckpointError, Storage, is_url

FORMAT = "dnt-checkpoint"
VERSION = 1


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class State(BaseModel):
    """Where a run stands. ``files`` is filled by whoever writes it.

    Beside the fields here it has those that the run's source gives (``Source.facts``, and the count
    of its units), under their own names: of text ``tokenizer_sha256`` and ``tokens``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, str | int]

    format: str = FORMAT
    version: int = VERSION
    step: int
    consumed_rows: int
    skipped: int
    seed: int  # the run's only randomness: initial weights and data order are functions of it
    run_id: str
    manifest_sha256: str  # of a mixture, of what decides its rows
    # the manifests' sha256 by the sets' names; not in the checkpoints of old
    sets: dict[str, str] = {}
    stages: dict[str, dict[str, str]] = {}  # the same of each of train.stages
    world_size: int
    config: dict[str, object]
    # what was typed to get it: group=name, key=value; not in the checkpoints of old
    given: list[str] = []
    engine: dict[str, float] = {}  # Engine.scalars; not in the checkpoints of old
    health: dict[str, list[float]] = {}  # the spike guard's window
    files: dict[str, FileRecord]

    @model_validator(mode="before")
    @classmethod
    def _the_source_gives_hashes_and_counts(cls, raw: Any) -> Any:
        """Refuse a field of the source's that is neither a NAME_sha256 nor a count."""
        theirs = raw.keys() - cls.model_fields.keys() if isinstance(raw, dict) else ()
        for name in sorted(theirs):
            expected: type = str if name.endswith("_sha256") else int
            if type(raw[name]) is not expected:
                problem = PydanticCustomError(
                    "of_another_type",
                    "Input should be {expected}",
                    {"expected": "a hash" if expected is str else "a whole number"},
                )
                place = InitErrorDetails(type=problem, loc=(name,), input=raw[name])
                raise ValidationError.from_exception_data("State", [place])
        return raw

    @property
    def of_source(self) -> dict[str, str | int]:
        """What the run's source has given."""
        return dict(self.__pydantic_extra__)

    @property
    def averaged(self) -> bool:
        """Whether the checkpoint holds an average of the weights, ``ema.NAME``."""
        train = self.config.get("train")
        return isinstance(train, dict) and train.get("ema") is not None

    @property
    def scalars(self) -> dict[str, float]:
        """What ``Engine.refresh`` takes; a checkpoint of old has it in other fields."""
        return self.engine or {"step": self.step, "updates": self.step - self.skipped}


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a checkpoint's folder is named after; None for any other name."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() and name == step_name(int(digits)) else None


def instead_of(path: Path | str) -> str:
    """How a run may go on, whose checkpoint at ``path`` is damaged."""
    parent, _, name = str(path).rpartition("/")
    step = step_of(name)
    with contextlib.suppress(CheckpointError, OSError):
        folder = Storage(parent if is_url(str(path)) else Path(parent))
        older = [
            other
            for other in folder.names()
            if (found := step_of(other)) is not None and found < (step or 0)
        ]
        if any((folder / other).holds("state.json") for other in older):
            return f"remove {path} to go on from an older checkpoint"
    return (
        "there is no older one: restore it, or `dnt train --fresh` begins anew and keeps what is "
        "there aside"
    )


def read_state(path: Path | str) -> State:
    """``state.json`` of a checkpoint's folder, here or at a URL.

    Raises:
        CheckpointError: it is missing, truncated, or of another format or version.
    """
    file = f"{path}/state.json"
    try:
        state = State.model_validate_json(Storage(path).read("state.json"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; expected a checkpoint folder step-NNNNNNNN"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "JSON"
        raise CheckpointError(
            f"{file}: damaged ({where}: {problem['msg']}); {instead_of(path)}"
        ) from None
    if any(Path(name).name != name or not name.endswith(".safetensors") for name in state.files):
        raise CheckpointError(
            f"{file}: names a file outside its folder, or none of a checkpoint's; "
            f"{instead_of(path)}"
        )
    if (state.format, state.version) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{file}: is {state.format} version {state.version}, expected {FORMAT} version "
            f"{VERSION}; "
            f"{instead_of(path)}"
        )
    return state

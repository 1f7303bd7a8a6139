"""A file of prompts, and a file of what follows them, which an interruption leaves whole."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from dnt_scale.config import ConfigError
from dnt_scale.record.files import flock

JSON_LINES = (".jsonl", ".json")  # how the name of a file of JSON lines ends


@dataclass(frozen=True)
class Continuation:
    """What a model has made of a prompt.

    Attributes:
        index: the prompt's place among all, from 0.
        text: what follows the prompt.
        tokens: how many were sampled.
        end: why there are no more: "document" (the model ended it), "stop" (one of the texts to
            stop at came, which is left out), or "length".
    """

    index: int
    prompt: str
    text: str
    tokens: int
    end: str


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: its lines that are not blank, or of one whose name ends in
    .jsonl or .json the field ``prompt`` of each. What is no UTF-8 becomes U+FFFD in a file of text.

    Raises:
        ConfigError: no prompts, or a line that has none.
        OSError: the file cannot be read.
    """
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(
            f"{path}: no prompts; expected one a line, or JSON lines in a .jsonl file"
        )
    if path.suffix in JSON_LINES:
        return [_field(path, number, line) for number, line in lines]
    return [line.removesuffix(b"\r").decode("utf-8", "replace") for _, line in lines]


def _field(path: Path, number: int, line: bytes) -> str:
    try:
        found = orjson.loads(line)
    except ValueError as error:
        found = error
    if not isinstance(found, dict) or not isinstance(prompt := found.get("prompt"), str):
        why = f" ({found})" if isinstance(found, ValueError) else ""
        raise ConfigError(
            f"{path}, line {number}: found {line.decode('utf-8', 'replace')[:40]!r}, expected a "
            f'JSON object with a text as its field "prompt"{why}'
        )
    return prompt


class Continuations:
    """A file of continuations, a JSON object a line. Until all are there they are lines of
    PATH.partial, in the order in which they came, behind a line that says what they are made with;
    then of PATH, in the order of the prompts.

    Args:
        made_with: what the texts depend on, to be written as JSON.

    Raises:
        ConfigError: PATH is there, or PATH.partial was begun with something else, is damaged, or
            is being written by another process.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        if path.exists():
            raise ConfigError(f"{path}: exists already; give another --out, or remove it first")
        if not path.parent.is_dir():
            raise ConfigError(
                f"{path}: there is no folder {path.parent} to write it to; make that first"
            )
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        self.lines: dict[int, tuple[int, int]] = {}  # by prompt: where its line begins and ends
        self._file = self.partial.open("a+b")
        try:
            if flock(self._file.fileno()) is False:
                raise ConfigError(f"{self.partial}: another process is writing it; wait for it")
            self._go_on(made_with)
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, made_with: dict[str, Any]) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # the process was killed as it wrote it
                break
            try:
                found = orjson.loads(line)
                if number == 1:
                    self._same(found, made_with)
                else:
                    self.lines[found["index"]] = end, end + len(line)
            except (orjson.JSONDecodeError, KeyError, TypeError):
                raise ConfigError(
                    f"{self.partial}, line {number}: damaged; remove the file to begin anew"
                ) from None
            end += len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        if not end:
            self._write(made_with)

    def _same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key, value in orjson.loads(orjson.dumps(now)).items():
            if before.get(key) != value:
                raise ConfigError(
                    f"{self.partial}: begun with {key} {before.get(key)}, now it is {value}; give "
                    "the same, or another --out, or remove the file to begin anew"
                )

    def _write(self, content: dict[str, Any]) -> tuple[int, int]:
        start = self._file.tell()
        self._file.write(orjson.dumps(content) + b"\n")
        self._file.flush()
        return start, self._file.tell()

    def add(self, continuation: Continuation) -> None:
        """Write one; it is in the file when this returns. Raises OSError."""
        self.lines[continuation.index] = self._write(asdict(continuation))

    def finish(self) -> None:
        """Put all in their order into PATH, and remove PATH.partial. Raises OSError."""
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with beside.open("wb") as file:
            for _, (start, end) in sorted(self.lines.items()):
                self._file.seek(start)
                file.write(self._file.read(end - start))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        self.partial.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

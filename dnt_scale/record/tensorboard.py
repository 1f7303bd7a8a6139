"""TensorBoard as a tracking backend: event files in ``RUN/tensorboard``.

Every sender writes a file of its own, and notes in ``logs/tensorboard.json`` after each call how
many bytes of each file hold what it has noted as sent. What a killed one wrote beyond that is cut
off by the next, which sends it again: so a step stands there once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnt_scale.record.backend import Backend, Lost, Order
from dnt_scale.record.metrics_file import Point

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dnt_scale.record.sender_files import Sent

FOLDER = "tensorboard"
SUFFIX = ".dnt"  # Other event files in the folder are a user's own.
PNG_SIZE = struct.Struct(">II")  # Width and height, after the first 16 bytes of a PNG file.


class TensorBoard(Backend):
    """See :class:`Backend`. A call that fails leaves nothing in the event files."""

    title = "TensorBoard"

    def __init__(self, run_dir: Path, order: Order, sent: Sent, *, live: bool) -> None:
        self._folder = run_dir / FOLDER
        self._order = order
        self._sent = sent
        self._writer: SummaryWriter | None = None
        self._file = Path()  # The writer's.
        before = sent.before
        self._sizes: dict[str, int] = before.get("files", {})  # Bytes that are noted, by file.
        self._shown: dict[str, str] = before.get("shown", {})  # SHA-256 of texts and pictures.
        sent.own = {"files": self._sizes, "shown": self._shown}

    @staticmethod
    def address(order: Order) -> str:
        """Return the folder, as seen from the run folder: it moves along with that."""
        return f"{FOLDER}/"

    @staticmethod
    def objection() -> str:
        """Return what to install where the package is missing."""
        if importlib.util.find_spec("tensorboard"):
            return ""
        install = "pip install 'dnt-scale[tensorboard]', or take tracking=mlflow"
        return f"needs a package that is not installed; {install}"

    def open(self) -> None:
        """Cut off what was not noted; where something that was noted is missing, begin anew."""
        self._writer = None
        if not self._sizes or self._is_incomplete():
            self._sizes.clear()
            self._shown.clear()
            self._sent.forget()
        for file in self._files():
            if file.name not in self._sizes:
                # It is another run's, or holds what is sent again. TensorBoard reads no such name.
                name = file.name.replace("tfevents", "replaced")
                file.rename(file.with_name(f"{name}.old"))
            elif file.stat().st_size > self._sizes[file.name]:
                os.truncate(file, self._sizes[file.name])

    def _files(self) -> set[Path]:
        return set(self._folder.glob(f"*{SUFFIX}"))

    def _is_incomplete(self) -> bool:
        """Return whether something that was noted as sent is missing."""
        found = {file.name: file.stat().st_size for file in self._files()}
        return any(found.get(name, -1) < size for name, size in self._sizes.items())

    def describe(self) -> None:
        """Show the description, parameters and tags as texts, where they have changed."""
        order = self._order
        texts = {
            "run": f"# {order['run_name']}\n\n{order.get('description', '')}",
            "params": _table(order["params"]),
            "tags": _table({name: tag for name, tag in order["tags"].items() if "\n" not in tag}),
        }
        for tag, text in texts.items():
            self._show_text(tag, text)

    def log(self, points: Sequence[Point]) -> None:
        """Store points as scalars of 32 bits."""

        def write(writer: SummaryWriter) -> None:
            for point in points:
                writer.add_scalar(point.name, point.value, point.step, point.time_ms / 1000)

        self._write(write)

    def store_file(self, path: Path) -> None:
        """Show a picture, or config.yaml as a text; other files are left out."""
        if path.suffix == ".png":
            tag, png = f"{path.parent.name}/{path.stem}", path.read_bytes()
            picture = _picture(tag, png)
            self._show(tag, png, lambda writer, step: writer.file_writer.add_summary(picture, step))
        elif path.name == "config.yaml":
            lines = path.read_text().splitlines()
            self._show_text(path.name, "".join(f"    {line}\n" for line in lines))

    def _show_text(self, tag: str, text: str) -> None:
        content = text.encode()
        self._show(tag, content, lambda writer, step: writer.add_text(tag, text, step))

    def _show(self, tag: str, content: bytes, write: Callable[[Any, int], None]) -> None:
        """Show what belongs to no step at the last one, unless it is shown there as it is."""
        digest = hashlib.sha256(content).hexdigest()
        if digest != self._shown.get(tag):
            self._write(lambda writer: write(writer, max(0, self._sent.step)))
            self._shown[tag] = digest

    def _write(self, action: Callable[[SummaryWriter], None]) -> None:
        """Let ``action`` write to the event file, all of it or nothing."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            if self._is_incomplete():
                raise Lost  # Somebody has cleared the folder meanwhile.
            self.open()
        try:
            if self._writer is None:
                before = self._files()
                self._writer = SummaryWriter(str(self._folder), filename_suffix=SUFFIX)
                [self._file] = self._files() - before
            action(self._writer)
            self._writer.flush()
            self._sizes[self._file.name] = self._file.stat().st_size
        except BaseException:
            self._abandon_file()
            raise

    def _abandon_file(self) -> None:
        """Write no more to a file with events in part; the next call cuts them off."""
        with contextlib.suppress(Exception):  # The thread of the writer may have ended.
            if self._writer:
                self._writer.close()
        self._writer = None
        for file in self._files():
            if file.name not in self._sizes:
                file.unlink(missing_ok=True)


def _table(values: dict[str, Any]) -> str:
    """Return a Markdown table of names and values."""
    rows = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in values.items()]
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _picture(tag: str, png: bytes) -> Any:
    """Return an image summary that holds a PNG file as it is."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = PNG_SIZE.unpack_from(png, 16)
    image = Summary.Image(width=width, height=height, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


BACKEND = TensorBoard

import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_prep import pipeline
from data_prep.pipeline import PARTIAL, PrepareOptions, held_out, info, prepare
from data_prep.shards import Manifest, iter_documents, load_manifest
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from tests.helpers.corpus import python_source_files, small_set

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money.\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(TEXT * (number + 1) + f"{number}\n")
    return folder


def run(corpus: Path, out: Path, **options: Any) -> tuple[Manifest, str]:
    """The manifest, and what was said on the way."""
    console = Console(file=io.StringIO(), width=200)
    settings = {"vocab_size": 300, "seq_len": 32, "val_fraction": 0.2, "workers": 1, **options}
    manifest = prepare(PrepareOptions(**{"inputs": [corpus], "out": out, **settings}), console)
    return manifest, console.file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_workers_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    small_set(tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(prepared)
    assert {"manifest.json", "tokenizer.model", "train-000000.tar", "val-000000.tar"} <= set(contents(prepared))


def test_the_manifest_tells_what_went_in(corpus: Path, tmp_path: Path) -> None:
    (corpus / "broken.txt").write_bytes(b"\xff" + TEXT.encode())
    (corpus / "empty.txt").write_bytes(b"")
    manifest, said = run(corpus, tmp_path / "out")
    [source] = manifest.sources
    assert (source.name, source.documents, source.replaced, source.empty) == ("corpus", 41, 1, 1)
    assert source.text_bytes == sum(path.stat().st_size for path in corpus.iterdir()) + 2
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert load_manifest(tmp_path / "out") == manifest
    assert manifest.tokenizer.round_trip
    assert manifest.dtype == "uint16"
    for word in ("41 documents from 1 source, 1 with broken UTF-8 (now U+FFFD), 1 empty left out", "MB/s", "tokens/s"):
        assert word in said


def test_the_same_document_is_always_in_the_same_split(corpus: Path, tmp_path: Path) -> None:
    def held(out: Path) -> set[str]:
        tokenizer = Tokenizer.load(out / "tokenizer.model")
        return {tokenizer.decode(ids) for ids in iter_documents(out, "val")}

    run(corpus, tmp_path / "small")
    first = held(tmp_path / "small")
    for number in range(20):
        (corpus / f"0-more-{number}.txt").write_text(f"{number} more " * 30)
    run(corpus, tmp_path / "large", seq_len=16, val_fraction=0.3)
    second = held(tmp_path / "large")
    old = {path.read_text() for path in corpus.iterdir() if "more" not in path.name}
    assert first <= second & old
    assert first == {text for text in old if held_out(text, 0.2)}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds(text: str, a: float, b: float) -> None:
    assert held_out(text, min(a, b)) <= held_out(text, max(a, b))
    assert not held_out(text, 0.0)
    assert held_out(text, 1.0)


def test_the_fraction_held_out_is_what_was_asked() -> None:
    assert abs(sum(held_out(str(number), 0.1) for number in range(10_000)) - 1000) < 120


def test_no_validation_split(corpus: Path, tmp_path: Path) -> None:
    manifest, _ = run(corpus, tmp_path / "out", val_fraction=0)
    assert list(manifest.splits) == ["train"]
    assert manifest.splits["train"].documents == 40
    assert verify(tmp_path / "out") == []


def test_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "first")
    model = tmp_path / "first" / "tokenizer.model"
    manifest, said = run(corpus, tmp_path / "second", tokenizer=model)
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert (tmp_path / "second" / "train-000000.tar").read_bytes() == (
        tmp_path / "first" / "train-000000.tar"
    ).read_bytes()
    assert manifest.options.kind is None
    assert manifest.tokenizer.round_trip
    assert "warning" not in said


def test_a_tokenizer_that_loses_text_is_recorded(corpus: Path, tmp_path: Path) -> None:
    (corpus / "spaces.txt").write_text("two  spaces")
    model = tmp_path / "f.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([TEXT.strip()] * 9), model_writer=file, vocab_size=34, minloglevel=4
        )
    manifest, said = run(corpus, tmp_path / "out", tokenizer=model)
    assert not manifest.tokenizer.round_trip
    assert said.count("warning: this tokenizer does not decode to exactly the text") == 1
    assert verify(tmp_path / "out") == []


def test_a_large_vocabulary_takes_four_bytes(corpus: Path, tmp_path: Path) -> None:
    every = "".join(map(chr, range(0x20000, 0x20000 + 42_000))) + "".join(map(chr, range(0x3400, 0xA000)))
    (corpus / "characters.txt").write_text(every)
    with pytest.raises(ValueError, match="use --vocab-size") as caught:
        run(corpus, tmp_path / "out", vocab_size=400)
    needed = int(str(caught.value).split("need ")[1].split(";")[0])
    assert needed > 1 << 16
    manifest, _ = run(corpus, tmp_path / "out", vocab_size=needed)
    assert (manifest.dtype, manifest.numpy_dtype.itemsize) == ("uint32", 4)
    assert verify(tmp_path / "out") == []
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.model")
    ids = [ids for split in manifest.splits for ids in iter_documents(tmp_path / "out", split)]
    assert max(map(max, ids)) >= 1 << 16
    assert every in map(tokenizer.decode, ids)


def test_info_prints_a_table(prepared: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    info(prepared, console)
    said = console.file.getvalue()
    for word in (
        "train",
        "val",
        "64 + 1 tokens of uint16",
        "512 pieces (bpe",
        "decodes to exactly",
        "sha256",
        "files:",
    ):
        assert word in said


def test_verify_shows_progress_and_finds_nothing(prepared: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    assert pipeline.verify(prepared, console) == []
    assert "verify" in console.file.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_len": 0}, "seq_len: found 0, expected 1 to"),
        ({"val_fraction": 1.0}, "val_fraction: found 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction: found nan"),
        ({"workers": 0}, "workers: found 0"),
        ({"shard_bytes": 0}, "shard_bytes: found 0"),
        ({"sample_bytes": 0}, "sample_bytes: found 0"),
        ({"vocab_size": -5}, "vocab_size: found -5"),
        ({"vocab_size": 100}, "use --vocab-size "),
        ({"vocab_size": 50_000}, "the largest that this corpus supports is "),
        ({"kind": "word"}, "kind: found 'word', expected 'bpe' or 'unigram'"),
        ({"inputs": []}, "no input given"),
        ({"inputs": ["nowhere"]}, "nowhere: no such file or folder"),
        ({"tokenizer": Path("nowhere.model")}, "nowhere.model: cannot read the tokenizer"),
        ({"seq_len": 900_000}, "but one row needs 900000; give more text, a smaller --seq-len"),
        ({"val_fraction": 1e-9}, "the val split has 0 tokens in 0 documents, but one row needs 32; give more text"),
        ({"val_fraction": 1 - 1e-9}, "--val-fraction"),
    ],
)
def test_bad_options_and_input(corpus: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        run(corpus, tmp_path / "out", **options)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="the corpus is empty"):
        run(tmp_path / "corpus", tmp_path / "out")


def test_a_bad_line_far_in_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    (corpus / "z.jsonl").write_text('{"text": "good"}\n{"body": 1}\n')
    with pytest.raises(ValueError, match=r"z\.jsonl: line 2"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_that_is_taken(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(corpus, out)
    before = contents(out)
    with pytest.raises(ValueError, match="already holds a prepared set"):
        run(corpus, out)
    assert contents(out) == before
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds .* but no manifest\.json"):
        run(corpus, out)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        run(corpus, corpus / "00.txt")
    with pytest.raises(ValueError, match="cannot be written"):
        run(corpus, corpus / "00.txt" / "below")


def test_a_folder_with_other_files_keeps_them(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README").write_text("mine")
    with pytest.raises(ValueError, match="largest"):
        run(corpus, out, vocab_size=9999)
    assert contents(out) == {"README": b"mine"}
    run(corpus, out)
    assert set(contents(out)) == {"README", "manifest.json", "tokenizer.model", "train-000000.tar", "val-000000.tar"}


def test_two_at_once_in_one_folder(corpus: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out" / PARTIAL
    partial.mkdir(parents=True)
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing a set here"):
            run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out")


def test_remains_of_a_killed_run_are_cleared(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole")
    out = tmp_path / "out"
    (out / PARTIAL).mkdir(parents=True)
    # As after a kill between the last moves: some shards in place, the manifest not.
    (out / "train-000000.tar").write_bytes(b"half")
    (out / "train-000009.tar").write_bytes(b"old")
    (out / PARTIAL / "val-000000.tar").write_bytes(b"half")
    run(corpus, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that holds `request.param` bytes: a tmpfs, or a limit on file size where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if mount and subprocess.run(command, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        # One file of the set may be smaller than the whole disk would be.
        with file_size_limit(request.param // 4):
            yield folder


class file_size_limit:
    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.old[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


@pytest.mark.parametrize("small_disk", [8 << 10, 100 << 10, 300 << 10], indirect=True)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(small_disk: Path, workers: int) -> None:
    for out in (small_disk, small_disk / "new"):
        with pytest.raises(ValueError, match=r"the disk is full .* bytes free .* choose another --out") as caught:
            small_set(out, limit_bytes=500_000, workers=workers)
        assert str(out) in str(caught.value)
        assert list(small_disk.iterdir()) == []


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    with file_size_limit(100_000), pytest.raises(ValueError, match="the disk is full or a limit is reached"):
        small_set(tmp_path / "out", limit_bytes=500_000)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
from pathlib import Path
from tests.helpers.corpus import small_set
if __name__ == "__main__":
    small_set(Path(sys.argv[1]), limit_bytes=4_000_000, workers=2, shard_bytes=70_000)
"""


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_a_run_that_is_stopped_leaves_no_set(tmp_path: Path, how: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    out = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "script.py"), str(out)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(root)}, start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (out / PARTIAL / "train-000002.tar").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if how == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert how == "kill" or said.decode().count("KeyboardInterrupt") == 1
    assert out.exists() == (how == "kill")
    with pytest.raises(ValueError, match="manifest"):
        load_manifest(out) if out.exists() else load_manifest(tmp_path)
    # No worker lives on.
    while time.monotonic() < deadline and alive(process.pid):
        time.sleep(0.05)
    assert not alive(process.pid)
    small_set(out, limit_bytes=300_000, val_fraction=0)
    assert verify(out) == []
    assert not (out / PARTIAL).exists()


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_sources_of_jsonl_and_text_are_told_apart(corpus: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(5))
    (tmp_path / "extra.jsonl").write_text(lines)
    manifest, _ = run(
        corpus, tmp_path / "out", inputs=[corpus, tmp_path / "extra.jsonl", *python_source_files(5000)], vocab_size=400
    )
    assert [source.name for source in manifest.sources] == ["corpus", "extra.jsonl", "files"]
    assert manifest.sources[1].documents == 5

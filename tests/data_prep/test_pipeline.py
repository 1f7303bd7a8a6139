"""What a set holds and says, whatever the options and whatever is wrong with the input."""

import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_prep.identity import held_out, text_hash
from data_prep.options import PrepareOptions, checked
from data_prep.report import terminal
from data_prep.report.terminal import print_info, print_plan
from data_prep.shards import PARTIAL, iter_documents, load_manifest
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from testbed.corpus import TEXT, contents, python_source_files, run, small_set


def in_split(text: str, val_fraction: float) -> bool:
    return held_out(text_hash(text.encode(), "split"), val_fraction)


def test_any_number_of_workers_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    small_set(tmp_path / "set", workers=2)
    assert contents(tmp_path / "set") == contents(prepared)
    assert {"manifest.json", "tokenizer.model", "train-000000.tar", "val-000000.tar"} <= set(
        contents(prepared)
    )


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
    for word in ("sample ", "learn ", "tokenise ", "pack ", "MB/s", "tokens/s", "wrote "):
        assert word in said
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    found = {(record["kind"], record["file"]) for record in rejects}
    assert found == {("broken_utf8", "corpus/broken.txt"), ("empty", "corpus/empty.txt")}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sources"][0]["findings"] == {"broken_utf8": 1, "empty": 1}


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
    assert first == {text for text in old if in_split(text, 0.2)}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds(text: str, a: float, b: float) -> None:
    assert in_split(text, min(a, b)) <= in_split(text, max(a, b))
    assert not in_split(text, 0.0)
    assert in_split(text, 1.0)


def test_the_fraction_held_out_is_what_was_asked() -> None:
    assert abs(sum(in_split(str(number), 0.1) for number in range(10_000)) - 1000) < 120


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
            sentence_iterator=iter([TEXT.strip()] * 9),
            model_writer=file,
            vocab_size=34,
            minloglevel=4,
        )
    manifest, said = run(corpus, tmp_path / "out", tokenizer=model)
    assert not manifest.tokenizer.round_trip
    assert said.count("warning: this tokenizer does not decode to exactly the text") == 1
    assert verify(tmp_path / "out") == []


def test_a_large_vocabulary_takes_four_bytes(corpus: Path, tmp_path: Path) -> None:
    every = "".join(map(chr, range(0x20000, 0x20000 + 42_000))) + "".join(
        map(chr, range(0x3400, 0xA000))
    )
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
    print_info(prepared, console)
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
    assert terminal.verify_with_progress(prepared, console) == []
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
        (
            {"seq_len": 900_000},
            "but one row needs 900000; give more text, or a smaller --seq-len, or a smaller "
            "--val-fraction",
        ),
        (
            {"val_fraction": 1e-9},
            "the val split has 0 tokens in 0 documents of 40, but one row needs 32; give a larger "
            "(such as 0.1, or 0)",
        ),
        ({"val_fraction": 1 - 1e-9}, "--val-fraction"),
    ],
)
def test_bad_options_and_input(
    corpus: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run(corpus, tmp_path / "out", **options)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {PARTIAL}


NUMBERS = st.integers(-5, 2**70) | st.floats() | st.booleans() | st.text(max_size=3) | st.none()
TEXTS = st.text(max_size=4) | st.sampled_from(["\udcff", "a\0b", "", "\x1b[2J\n"]) | st.integers()
OPTIONS = {
    **dict.fromkeys(
        ["seq_len", "vocab_size", "workers", "shard_bytes", "sample_bytes", "val_fraction"], NUMBERS
    ),
    **dict.fromkeys(["text_field", "kind", "packing", "dedup", "encoder"], TEXTS),
    **dict.fromkeys(
        ["out", "tokenizer", "rules"],
        st.text(st.sampled_from("a/.~\0\udcffé*[ "), max_size=4).map(Path),
    ),
    "task": st.tuples(st.integers(-2, 4), st.integers(-2, 4)),
    "inputs": st.lists(TEXTS.map(str), max_size=3),
}


@given(name=st.sampled_from(sorted(OPTIONS)), data=st.data())
def test_any_option_is_taken_or_refused_in_a_line(name: str, data: st.DataObject) -> None:
    value = data.draw(OPTIONS[name])
    try:
        checked(PrepareOptions(**{"inputs": ["a"], "out": Path("out"), name: value}), None)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert "found" in str(error) or name in ("inputs", "tokenizer", "task", "out")
    else:
        assert name != "text_field" or (value and value.encode())
        assert name not in ("seq_len", "vocab_size", "shard_bytes") or type(value) is int


def test_a_set_whose_name_is_no_utf_8(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9 \x1b[2J")
    run(corpus, out)
    for tell in (
        print_info,
        lambda folder, console: print_plan(
            PrepareOptions(inputs=[corpus], out=folder / "new"), console
        ),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        tell(out, Console(file=stream, width=200))
        stream.flush()
        shown = "".join(stream.buffer.getvalue().decode().split())  # a long path is broken anywhere
        assert "caf⟨U+DCE9⟩⟨U+001B⟩[2J" in shown
    assert verify(out) == []


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="the corpus is empty"):
        run(tmp_path / "corpus", tmp_path / "out")


def test_a_bad_line_is_left_out_and_kept_or_stops_a_strict_run(
    corpus: Path, tmp_path: Path
) -> None:
    (corpus / "z.jsonl").write_text('{"text": "good"}\n{"body": 1}\n\n{"text": "bad"\n')
    with pytest.raises(ValueError, match=r"z\.jsonl: line 2") as caught:
        run(corpus, tmp_path / "strict", strict=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "strict").glob("*.*"))
    manifest, _ = run(corpus, tmp_path / "out")
    [source] = manifest.sources
    assert (source.documents, source.dropped) == (41, {"malformed_json": 1, "no_text": 1})
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [(r["kind"], r["file"], r["line"]) for r in rejects] == [
        ("no_text", "corpus/z.jsonl", 2),
        ("empty_line", "corpus/z.jsonl", 3),
        ("malformed_json", "corpus/z.jsonl", 4),
    ]
    assert rejects[0]["raw"] == '{"body": 1}'


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
    with pytest.raises(ValueError, match="Not a directory; check the path"):
        run(corpus, corpus / "00.txt" / "below")


def test_a_folder_with_other_files_keeps_them(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README").write_text("mine")
    with pytest.raises(ValueError, match="largest"):
        run(corpus, out, vocab_size=9999)
    assert contents(out) == {"README": b"mine"}
    run(corpus, out)
    made = {"manifest.json", "tokenizer.model", "train-000000.tar", "val-000000.tar"}
    assert set(contents(out)) == {"README", "report.html", "report.json", "rejects.jsonl", *made}


def test_two_at_once_in_one_folder(corpus: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out" / PARTIAL
    partial.mkdir(parents=True)
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing a set here"):
            run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out")


def test_remains_of_a_killed_run_are_cleared(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole" / "out")
    out = tmp_path / "out"
    (out / PARTIAL).mkdir(parents=True)
    # As after a kill between the last moves: some shards in place, the manifest not.
    (out / "train-000000.tar").write_bytes(b"half")
    (out / "train-000009.tar").write_bytes(b"old")
    (out / PARTIAL / "val-000000.tar").write_bytes(b"half")
    run(corpus, out)
    assert contents(out) == contents(tmp_path / "whole" / "out")


def test_the_sources_of_jsonl_and_text_are_told_apart(corpus: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(5))
    (tmp_path / "extra.jsonl").write_text(lines)
    manifest, _ = run(
        corpus,
        tmp_path / "out",
        inputs=[corpus, tmp_path / "extra.jsonl", *python_source_files(5000)],
        vocab_size=400,
    )
    assert [source.name for source in manifest.sources] == ["corpus", "extra.jsonl", "files"]
    assert manifest.sources[1].documents == 5


def test_a_set_inside_the_input_is_no_corpus(corpus: Path, tmp_path: Path) -> None:
    first, _ = run(corpus, corpus / "set")
    second, _ = run(corpus, tmp_path / "second")
    assert second == first
    third, _ = run(corpus, tmp_path / "third", inputs=[str(corpus / "**" / "*")])
    assert third.sources == first.sources
    (corpus / "set" / "manifest.json").unlink()  # as a kill just before its last move leaves it
    (corpus / "set" / PARTIAL).mkdir()
    again, _ = run(corpus, corpus / "set")
    assert again == first


def test_sources_of_one_name_stay_apart(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "one")
    manifest, _ = run(
        corpus, tmp_path / "two", append=tmp_path / "one", vocab_size=16384, seq_len=32
    )
    assert [source.name for source in manifest.sources] == ["corpus", "corpus (2)"]


def test_an_error_of_a_rule_is_told_by_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tests.jsonl").write_text("not json\n")
    (tmp_path / "rules.yaml").write_text("rules: [decontaminate: {files: [tests.jsonl]}]\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"tests\.jsonl, line 1: not JSON"):
            run(corpus, tmp_path / "out", rules=tmp_path / "rules.yaml", workers=workers)


def test_a_set_and_the_out_folder_are_no_input(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "set")
    with pytest.raises(ValueError, match="a prepared set, whose documents are tokens already"):
        run(tmp_path / "set", tmp_path / "out")
    with pytest.raises(ValueError, match="is an INPUT, and cannot be --out as well"):
        run(corpus, corpus)
    with pytest.raises(ValueError, match="already holds a prepared set"):
        print_plan(PrepareOptions([corpus], tmp_path / "set"))

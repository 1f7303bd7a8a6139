import contextlib
import fcntl
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_prep import show
from data_prep.chunks import held_out
from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare, train_tokenizer
from data_prep.shards import PARTIAL, Manifest, iter_documents, load_manifest, write_shard
from data_prep.show import dry_run, info
from data_prep.tokenizer import Tokenizer, text_hash
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


def in_split(text: str, val_fraction: float) -> bool:
    return held_out(text_hash(text.encode(), "split"), val_fraction)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_workers_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    small_set(tmp_path / "set", workers=2)
    assert contents(tmp_path / "set") == contents(prepared)
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
    for word in ("sample ", "learn ", "tokenise ", "pack ", "MB/s", "tokens/s", "wrote "):
        assert word in said
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
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
    assert show.verify(prepared, console) == []
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
            "but one row needs 900000; give more text, or a smaller --seq-len, or a smaller --val-fraction",
        ),
        (
            {"val_fraction": 1e-9},
            "the val split has 0 tokens in 0 documents of 40, but one row needs 32; give a larger (such as 0.1, or 0)",
        ),
        ({"val_fraction": 1 - 1e-9}, "--val-fraction"),
    ],
)
def test_bad_options_and_input(corpus: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        run(corpus, tmp_path / "out", **options)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {PARTIAL}


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="the corpus is empty"):
        run(tmp_path / "corpus", tmp_path / "out")


def test_a_bad_line_is_left_out_and_kept_or_stops_a_strict_run(corpus: Path, tmp_path: Path) -> None:
    (corpus / "z.jsonl").write_text('{"text": "good"}\n{"body": 1}\n\n{"text": "bad"\n')
    with pytest.raises(ValueError, match=r"z\.jsonl: line 2") as caught:
        run(corpus, tmp_path / "strict", strict=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "strict").glob("*.*"))
    manifest, _ = run(corpus, tmp_path / "out")
    [source] = manifest.sources
    assert (source.documents, source.dropped) == (41, {"malformed_json": 1, "no_text": 1})
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
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
        corpus, tmp_path / "out", inputs=[corpus, tmp_path / "extra.jsonl", *python_source_files(5000)], vocab_size=400
    )
    assert [source.name for source in manifest.sources] == ["corpus", "extra.jsonl", "files"]
    assert manifest.sources[1].documents == 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for the tests of tasks and appending."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    options = PrepareOptions(python_source_files(400_000), path.with_suffix(".work"), vocab_size=400)
    train_tokenizer(options, path, Console(quiet=True))
    assert [entry.name for entry in path.parent.iterdir()] == ["t.model"]
    with pytest.raises(ValueError, match=r"t\.model: exists already"):
        train_tokenizer(options, path, Console(quiet=True))
    return path


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run over many small pieces and units of three sources, with copies within and across them."""
    monkeypatch.setattr("data_prep.read.pieces.PIECE_BYTES", 20_000)
    monkeypatch.setattr("data_prep.read.inputs.UNIT_BYTES", 60_000)
    whole = [path.read_bytes().decode("utf-8", "replace") for path in python_source_files(600_000)]
    texts = [text[at : at + 3000] for text in whole for at in range(0, len(text), 3000)]
    for name, some in (("a", texts[::2]), ("b", [*texts[1::2], *texts[::6]])):
        lines = (json.dumps({"text": text}) + "\n" for text in some)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "c").mkdir()
    for number, text in enumerate(texts[:40:2]):
        (tmp_path / "c" / f"{number:02}.py").write_text(text.replace("self", "this", 3))
    return {
        "inputs": [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c"],
        "shard_bytes": 40_000,
        "dedup": "near",
        "val_fraction": 0.1,
        "rules": Path(__file__).parents[2] / "configs" / "clean" / "light.yaml",
    }


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_tasks_in_any_order_and_a_merge_give_the_bytes_of_one_run(
    pieces: dict[str, Any], model: Path, tmp_path: Path, packing: str
) -> None:
    options = {**pieces, "tokenizer": model, "packing": packing}
    run(tmp_path, tmp_path / "local", **options)
    for tasks, made in ((1, [0]), (3, [2, 0, 1]), (4, [3, 1])):  # of four, two never came: the merge does their part
        out = tmp_path / f"tasks-{tasks}"
        for task in made:
            manifest, said = run(tmp_path, out, task=(task, tasks), **options)
            assert manifest is None
            assert f"task {task} of {tasks} is done" in said
            assert not list(out.glob("*.tar"))
        prepare(PrepareOptions(**{"vocab_size": 300, "seq_len": 32, "workers": 2, **options, "out": out}))
        same = {name: raw for name, raw in contents(out).items() if not name.startswith("report")}
        assert same == {name: raw for name, raw in contents(tmp_path / "local").items() if name in same}
        assert verify(out) == []


def test_duplicates_go_within_and_across_sources(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    manifest, said = run(tmp_path, tmp_path / "out", tokenizer=model, **pieces)
    a, b, c = manifest.sources
    assert a.duplicates < 3 and b.duplicates > 5 and c.duplicates > 10
    assert "near" in said
    exact, _ = run(tmp_path, tmp_path / "exact", tokenizer=model, **{**pieces, "dedup": "exact"})
    assert sum(s.duplicates for s in exact.sources) < sum(s.duplicates for s in manifest.sources)
    plain, _ = run(tmp_path, tmp_path / "plain", tokenizer=model, **{**pieces, "dedup": "none"})
    for made in (manifest, exact):
        kept = sum(source.documents + source.duplicates for source in made.sources)
        assert kept == sum(source.documents for source in plain.sources)
    tokenizer = Tokenizer.load(model)
    texts = [tokenizer.decode(ids) for split in ("train", "val") for ids in iter_documents(tmp_path / "exact", split)]
    assert len({" ".join(text.casefold().split()) for text in texts}) == len(texts)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["duplicates"]["near"] + report["duplicates"]["exact"] == a.duplicates + b.duplicates + c.duplicates
    for example in report["duplicates"]["examples"]:
        assert example["similarity"] >= 0.7
        assert example["kept"] != example["dropped"]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_appending_is_preparing_both_at_once(pieces: dict[str, Any], model: Path, tmp_path: Path, packing: str) -> None:
    options = {**pieces, "packing": packing}
    first, *more = options.pop("inputs")
    run(tmp_path, tmp_path / "both", inputs=[first, *more], tokenizer=model, **options)
    run(tmp_path, tmp_path / "one", inputs=[first], tokenizer=model, **options)
    before = contents(tmp_path / "one")
    run(tmp_path, tmp_path / "two", inputs=more, append=tmp_path / "one", rules=options["rules"], val_fraction=0.1)
    assert contents(tmp_path / "one") == before
    both, two = contents(tmp_path / "both"), contents(tmp_path / "two")
    assert len([name for name in both if name.startswith("train")]) > 3
    assert {n for n in both if not n.startswith("rep")} == {n for n in two if not n.startswith("rep")}
    for name in both:
        if name.endswith((".tar", ".npy", ".model", "manifest.json")):
            assert two[name] == both[name], name
    shared = [name for name in before if (tmp_path / "two" / name).samefile(tmp_path / "one" / name)]
    assert "train-000000.tar" in shared  # not written again
    assert verify(tmp_path / "two") == []
    with pytest.raises(ValueError, match=r"seq_len: found 64, but .*one was made with 32; leave the option out"):
        run(tmp_path, tmp_path / "three", inputs=more, append=tmp_path / "one", seq_len=64)


def test_kitoken_makes_the_same_set_or_is_given_up(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "plain", tokenizer=model, **pieces)
    _, said = run(tmp_path, tmp_path / "fast", tokenizer=model, encoder="kitoken", **pieces)
    assert "warning" not in said
    plain, fast = contents(tmp_path / "plain"), contents(tmp_path / "fast")
    assert {n: raw for n, raw in fast.items() if n[:3] != "rep"} == {n: r for n, r in plain.items() if n[:3] != "rep"}
    (tmp_path / "c" / "zz.txt").write_text((tmp_path / "c" / "02.py").read_text().replace(" ", "\t"))
    foreign = tmp_path / "foreign.model"
    with foreign.open("wb") as file:
        lines = iter([TEXT.strip()] * 9)
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines, model_writer=file, vocab_size=60, model_type="bpe", minloglevel=4
        )
    run(tmp_path, tmp_path / "slow", tokenizer=foreign, **pieces)
    manifest, said = run(tmp_path, tmp_path / "given-up", tokenizer=foreign, encoder="kitoken", workers=2, **pieces)
    said = " ".join(said.split())
    assert "kitoken and SentencePiece give different ids; kitoken is given up for SentencePiece" in said
    assert manifest == load_manifest(tmp_path / "slow")


def test_a_dry_run_writes_nothing(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    console = Console(file=io.StringIO(), width=120)
    dry_run(PrepareOptions(**pieces, out=tmp_path / "out", tokenizer=model, task=(1, 3)), console)
    said = console.file.getvalue()
    for word in ("a.jsonl", "b.jsonl", "near", "task       1 of 3", "held out", "nothing was written"):
        assert word in said
    assert sorted(tmp_path.rglob("*")) == before


def test_stdin(model: Path, tmp_path: Path) -> None:
    files = python_source_files(300_000)
    lines = "".join(json.dumps({"text": path.read_text()}) + "\n" for path in files)
    (tmp_path / "in.jsonl").write_text(lines)
    command = [sys.executable, "-m", "dnt_scale.cli", "data", "prepare", "-", "--out", str(tmp_path / "piped")]
    command += ["--vocab-size", "400", "--seq-len", "32", "--val-fraction", "0.2", "--workers", "1"]
    subprocess.run(command, input=lines.encode(), check=True, capture_output=True, cwd=Path(__file__).parents[2])
    run(tmp_path, tmp_path / "filed", inputs=[tmp_path / "in.jsonl"], vocab_size=400)
    for name, raw in contents(tmp_path / "filed").items():
        if name.endswith((".tar", ".model")):
            assert (tmp_path / "piped" / name).read_bytes() == raw


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": (3, 3)}, "task: found 3, expected 0 to 2"),
        ({"task": (0, 0)}, "tasks: found 0, expected 1 to"),
        ({"task": (0, 2), "tokenizer": None}, "task: tasks need a tokenizer that all of them share"),
        ({"task": (0, 2), "inputs": ["-"]}, "task: stdin cannot be shared by tasks"),
        ({"rules": Path("nowhere.yaml")}, "nowhere.yaml"),
        ({"append": Path("nowhere")}, "nowhere: no such folder; expected one made by `dnt data prepare`"),
    ],
)
def test_options_that_do_not_go_together(
    corpus: Path, model: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run(corpus, tmp_path / "out", **{"tokenizer": model, **options})
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_choice_after_a_stop_makes_what_it_would_have_made(
    pieces: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, tmp_path / "whole" / "out", tokenizer=model, **{**pieces, "dedup": "exact"})
    written = 0

    def stop_at_the_fifth(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        if written == 5:
            raise KeyboardInterrupt
        return write_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.shards.write_shard", stop_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "out", tokenizer=model, **pieces)
    assert len(list((tmp_path / "out" / PARTIAL).rglob("train-*.tar"))) == 4
    run(tmp_path, tmp_path / "out", tokenizer=model, **{**pieces, "dedup": "exact"})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


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


def test_appending_to_a_set_that_is_not_whole(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    first, *more = pieces.pop("inputs")
    run(tmp_path, tmp_path / "one", inputs=[first], tokenizer=model, **pieces)
    rest = {"inputs": more, "append": tmp_path / "one", "rules": pieces["rules"], "val_fraction": 0.1}
    for name in ("tokenizer.model", "fingerprints.npy"):
        path = tmp_path / "one" / name
        good = path.read_bytes()
        path.unlink()
        path.write_bytes(good[:-1] + b"?")
        with pytest.raises(ValueError, match=rf"{name}: SHA-256 is .* the set to append to must be whole"):
            run(tmp_path, tmp_path / "two", **rest)
        path.write_bytes(good)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (tmp_path / "one").iterdir():
        (linked / path.name).symlink_to(f"../one/{path.name}")
    run(tmp_path, tmp_path / "two", **{**rest, "append": linked})
    assert verify(tmp_path / "two") == []
    assert not any(path.is_symlink() for path in (tmp_path / "two").iterdir())


def test_sources_of_one_name_stay_apart(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "one")
    manifest, _ = run(corpus, tmp_path / "two", append=tmp_path / "one", vocab_size=16384, seq_len=32)
    assert [source.name for source in manifest.sources] == ["corpus", "corpus (2)"]


def test_an_error_of_a_rule_is_told_by_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tests.jsonl").write_text("not json\n")
    (tmp_path / "rules.yaml").write_text("rules: [decontaminate: {files: [tests.jsonl]}]\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"tests\.jsonl, line 1: not JSON"):
            run(corpus, tmp_path / "out", rules=tmp_path / "rules.yaml", workers=workers)


RAW = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))


@settings(deadline=None, max_examples=25)
@given(st.lists(RAW, max_size=6), st.lists(RAW | st.text(max_size=40).map(lambda t: json.dumps({"text": t}).encode())))
def test_whatever_goes_in_what_survives_comes_out(
    tmp_path_factory: pytest.TempPathFactory, model: Path, files: list[bytes], lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    for number, raw in enumerate(files):
        (folder / f"{number}.txt").write_bytes(raw)
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    (folder / "plain.txt").write_text(TEXT)
    run(folder, folder / "out", inputs=[folder], tokenizer=model, seq_len=4, val_fraction=0)
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer.model")
    back = [tokenizer.decode(ids) for ids in iter_documents(folder / "out", "train")]
    wanted = [raw.decode("utf-8", "replace") for raw in files]
    for line in b"\n".join(lines).split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"))
            if isinstance(value, dict) and isinstance(value.get("text"), str):
                wanted.append(re.sub("[\ud800-\udfff]", "\ufffd", value["text"]))
    assert sorted(back) == sorted([*filter(None, wanted), TEXT])
    assert verify(folder / "out") == []
    shutil.rmtree(folder)


def test_another_text_field_is_asked_for_where_no_line_has_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some text", "id": 1}\n' * 3)
    for tokenizer in (None, model):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the fields 'body', 'id'.*another --text-field"):
            run(tmp_path, tmp_path / "out", inputs=[tmp_path / "a.jsonl"], tokenizer=tokenizer)
    run(
        tmp_path,
        tmp_path / "out",
        inputs=[tmp_path / "a.jsonl"],
        tokenizer=model,
        text_field="body",
        seq_len=2,
        val_fraction=0,
    )


def test_rules_that_drop_everything_are_named(corpus: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("rules: [gopher_quality: {min_words: 100000, max_words: null}]\n")
    for tokenizer in (None, model):
        with pytest.raises(ValueError, match=r"none of the 40 documents is left .*40 dropped by gopher_quality"):
            run(corpus, tmp_path / "out", rules=tmp_path / "rules.yaml", tokenizer=tokenizer)


def test_a_set_and_the_out_folder_are_no_input(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "set")
    with pytest.raises(ValueError, match="a prepared set, whose documents are tokens already"):
        run(tmp_path / "set", tmp_path / "out")
    with pytest.raises(ValueError, match="is an INPUT, and cannot be --out as well"):
        run(corpus, corpus)
    with pytest.raises(ValueError, match="already holds a prepared set"):
        dry_run(PrepareOptions([corpus], tmp_path / "set"))


def test_appending_to_a_cleaned_set_asks_for_rules(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    first, *more = pieces.pop("inputs")
    run(tmp_path, tmp_path / "one", inputs=[first], tokenizer=model, **pieces)
    rest = {"inputs": more, "append": tmp_path / "one", "val_fraction": 0.1}
    with pytest.raises(ValueError, match="one was cleaned by rules; give them, or others, or --clean none"):
        run(tmp_path, tmp_path / "two", **rest)
    manifest, _ = run(tmp_path, tmp_path / "two", **rest, rules=pieces["rules"].with_name("none.yaml"))
    assert len({source.rules for source in manifest.sources}) == 2


def test_what_goes_on_and_what_does_not_fit_is_told(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    for task in (0, 1):
        run(tmp_path, tmp_path / "out", tokenizer=model, task=(task, 2), **pieces)
    other = {**pieces, "rules": None}
    _, said = run(tmp_path, tmp_path / "out", tokenizer=model, task=(0, 2), **other)
    assert "going on with" not in said
    assert "are of another input, other options or other library versions, and are not used" in said
    made = len(list((tmp_path / "out" / PARTIAL / "chunks").glob("*/*.npz")))
    _, said = run(tmp_path, tmp_path / "out", tokenizer=model, **pieces)
    assert 0 < int(re.search(r"going on with (\d+) finished parts", said)[1]) < made

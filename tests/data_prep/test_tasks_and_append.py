"""Sets made in tasks, appended to, resumed, or with a tokenizer that exists."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_prep.options import PrepareOptions
from data_prep.pipeline import prepare, train_tokenizer
from data_prep.report.terminal import print_plan
from data_prep.shards import PARTIAL, iter_documents, load_manifest, write_shard
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from testbed.corpus import TEXT, contents, python_source_files, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for the tests of tasks and appending."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    options = PrepareOptions(
        python_source_files(400_000), path.with_suffix(".work"), vocab_size=400
    )
    train_tokenizer(options, path, Console(quiet=True))
    assert [entry.name for entry in path.parent.iterdir()] == ["t.model"]
    with pytest.raises(ValueError, match=r"t\.model: exists already"):
        train_tokenizer(options, path, Console(quiet=True))
    return path


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run over many small pieces and units of three sources, with copies within and
    across them."""
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


# of four tasks, two never came: the merge does their part
@pytest.mark.parametrize(
    ("packing", "every"),
    [("concat", [(1, [0]), (3, [2, 0, 1]), (4, [3, 1])]), ("best_fit", [(4, [3, 1])])],
)
def test_tasks_in_any_order_and_a_merge_give_the_bytes_of_one_run(
    pieces: dict[str, Any],
    model: Path,
    tmp_path: Path,
    packing: str,
    every: list[tuple[int, list[int]]],
) -> None:
    options = {**pieces, "tokenizer": model, "packing": packing}
    run(tmp_path, tmp_path / "local", **options)
    for tasks, made in every:
        out = tmp_path / f"tasks-{tasks}"
        for task in made:
            manifest, said = run(tmp_path, out, task=(task, tasks), **options)
            assert manifest is None
            assert f"task {task} of {tasks} is done" in said
            assert not list(out.glob("*.tar"))
        prepare(
            PrepareOptions(
                **{"vocab_size": 300, "seq_len": 32, "workers": 2, **options, "out": out}
            )
        )
        same = {name: raw for name, raw in contents(out).items() if not name.startswith("report")}
        assert same == {
            name: raw for name, raw in contents(tmp_path / "local").items() if name in same
        }
        assert verify(out) == []


def test_duplicates_go_within_and_across_sources(
    pieces: dict[str, Any], model: Path, tmp_path: Path
) -> None:
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
    texts = [
        tokenizer.decode(ids)
        for split in ("train", "val")
        for ids in iter_documents(tmp_path / "exact", split)
    ]
    assert len({" ".join(text.casefold().split()) for text in texts}) == len(texts)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        report["duplicates"]["near"] + report["duplicates"]["exact"]
        == a.duplicates + b.duplicates + c.duplicates
    )
    for example in report["duplicates"]["examples"]:
        assert example["similarity"] >= 0.7
        assert example["kept"] != example["dropped"]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_appending_is_preparing_both_at_once(
    pieces: dict[str, Any], model: Path, tmp_path: Path, packing: str
) -> None:
    options = {**pieces, "packing": packing}
    first, *more = options.pop("inputs")
    run(tmp_path, tmp_path / "both", inputs=[first, *more], tokenizer=model, **options)
    run(tmp_path, tmp_path / "one", inputs=[first], tokenizer=model, **options)
    before = contents(tmp_path / "one")
    run(
        tmp_path,
        tmp_path / "two",
        inputs=more,
        append=tmp_path / "one",
        rules=options["rules"],
        val_fraction=0.1,
    )
    assert contents(tmp_path / "one") == before
    both, two = contents(tmp_path / "both"), contents(tmp_path / "two")
    assert len([name for name in both if name.startswith("train")]) > 3
    assert {n for n in both if not n.startswith("rep")} == {
        n for n in two if not n.startswith("rep")
    }
    for name in both:
        if name.endswith((".tar", ".npy", ".model", "manifest.json")):
            assert two[name] == both[name], name
    shared = [
        name for name in before if (tmp_path / "two" / name).samefile(tmp_path / "one" / name)
    ]
    assert "train-000000.tar" in shared  # not written again
    assert verify(tmp_path / "two") == []
    with pytest.raises(
        ValueError, match=r"seq_len: found 64, but .*one was made with 32; leave the option out"
    ):
        run(tmp_path, tmp_path / "three", inputs=more, append=tmp_path / "one", seq_len=64)


def test_kitoken_makes_the_same_set_or_is_given_up(
    pieces: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    run(tmp_path, tmp_path / "plain", tokenizer=model, **pieces)
    _, said = run(tmp_path, tmp_path / "fast", tokenizer=model, encoder="kitoken", **pieces)
    assert "warning" not in said
    plain, fast = contents(tmp_path / "plain"), contents(tmp_path / "fast")
    assert {n: raw for n, raw in fast.items() if n[:3] != "rep"} == {
        n: r for n, r in plain.items() if n[:3] != "rep"
    }
    (tmp_path / "c" / "zz.txt").write_text(
        (tmp_path / "c" / "02.py").read_text().replace(" ", "\t")
    )
    foreign = tmp_path / "foreign.model"
    with foreign.open("wb") as file:
        lines = iter([TEXT.strip()] * 9)
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_writer=file,
            vocab_size=60,
            model_type="bpe",
            minloglevel=4,
        )
    run(tmp_path, tmp_path / "slow", tokenizer=foreign, **pieces)
    manifest, said = run(
        tmp_path, tmp_path / "given-up", tokenizer=foreign, encoder="kitoken", workers=2, **pieces
    )
    said = " ".join(said.split())
    assert (
        "kitoken and SentencePiece give different ids; kitoken is given up for SentencePiece"
        in said
    )
    assert manifest == load_manifest(tmp_path / "slow")


def test_a_dry_run_writes_nothing(pieces: dict[str, Any], model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    console = Console(file=io.StringIO(), width=120)
    print_plan(
        PrepareOptions(**pieces, out=tmp_path / "out", tokenizer=model, task=(1, 3)), console
    )
    said = console.file.getvalue()
    for word in (
        "a.jsonl",
        "b.jsonl",
        "near",
        "task       1 of 3",
        "held out",
        "nothing was written",
    ):
        assert word in said
    assert sorted(tmp_path.rglob("*")) == before


def test_stdin(model: Path, tmp_path: Path) -> None:
    files = python_source_files(300_000)
    lines = "".join(json.dumps({"text": path.read_text()}) + "\n" for path in files)
    (tmp_path / "in.jsonl").write_text(lines)
    command = [
        sys.executable,
        "-m",
        "dnt_scale.cli",
        "data",
        "prepare",
        "-",
        "--out",
        str(tmp_path / "piped"),
    ]
    command += ["--vocab-size", "400", "--seq-len", "32", "--val-fraction", "0.2", "--workers", "1"]
    subprocess.run(
        command,
        input=lines.encode(),
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    run(tmp_path, tmp_path / "filed", inputs=[tmp_path / "in.jsonl"], vocab_size=400)
    for name, raw in contents(tmp_path / "filed").items():
        if name.endswith((".tar", ".model")):
            assert (tmp_path / "piped" / name).read_bytes() == raw


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": (3, 3)}, "task: found 3, expected 0 to 2"),
        ({"task": (0, 0)}, "tasks: found 0, expected 1 to"),
        (
            {"task": (0, 2), "tokenizer": None},
            "task: tasks need a tokenizer that all of them share",
        ),
        ({"task": (0, 2), "inputs": ["-"]}, "task: stdin cannot be shared by tasks"),
        ({"rules": Path("nowhere.yaml")}, "nowhere.yaml"),
        (
            {"append": Path("nowhere")},
            "nowhere: no such folder; expected one made by `dnt data prepare`",
        ),
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


def test_appending_to_a_set_that_is_not_whole(
    pieces: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    first, *more = pieces.pop("inputs")
    run(tmp_path, tmp_path / "one", inputs=[first], tokenizer=model, **pieces)
    rest = {
        "inputs": more,
        "append": tmp_path / "one",
        "rules": pieces["rules"],
        "val_fraction": 0.1,
    }
    for name in ("tokenizer.model", "fingerprints.npy"):
        path = tmp_path / "one" / name
        good = path.read_bytes()
        path.unlink()
        path.write_bytes(good[:-1] + b"?")
        with pytest.raises(
            ValueError, match=rf"{name}: SHA-256 is .* the set to append to must be whole"
        ):
            run(tmp_path, tmp_path / "two", **rest)
        path.write_bytes(good)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (tmp_path / "one").iterdir():
        (linked / path.name).symlink_to(f"../one/{path.name}")
    run(tmp_path, tmp_path / "two", **{**rest, "append": linked})
    assert verify(tmp_path / "two") == []
    assert not any(path.is_symlink() for path in (tmp_path / "two").iterdir())


RAW = st.binary(max_size=60) | st.text(max_size=60).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(RAW, max_size=6),
    st.lists(RAW | st.text(max_size=40).map(lambda t: json.dumps({"text": t}).encode())),
)
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
    findings = Counter(
        json.loads(line)["kind"]
        for line in (folder / "out" / "rejects.jsonl").read_text().splitlines()
    )
    assume(not findings["utf16"] + findings["utf32"])
    # What is hardly text is left out, and counted.
    missing = Counter([*filter(None, wanted), TEXT]) - Counter(back)
    assert len(back) + missing.total() == len([*filter(None, wanted), TEXT])
    assert (
        missing.total() == findings["not_text"] + findings["other_encoding"] + findings["stand_in"]
    )
    assert verify(folder / "out") == []
    shutil.rmtree(folder)


def test_another_text_field_is_asked_for_where_no_line_has_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some text", "id": 1}\n' * 3)
    for tokenizer in (None, model):
        with pytest.raises(
            ValueError, match=r"a\.jsonl, line 1: the fields 'body', 'id'.*another --text-field"
        ):
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
    (tmp_path / "rules.yaml").write_text(
        "rules: [gopher_quality: {min_words: 100000, max_words: null}]\n"
    )
    for tokenizer in (None, model):
        with pytest.raises(
            ValueError, match=r"none of the 40 documents is left .*40 dropped by gopher_quality"
        ):
            run(corpus, tmp_path / "out", rules=tmp_path / "rules.yaml", tokenizer=tokenizer)


def test_appending_to_a_cleaned_set_asks_for_rules(
    pieces: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    first, *more = pieces.pop("inputs")
    run(tmp_path, tmp_path / "one", inputs=[first], tokenizer=model, **pieces)
    rest = {"inputs": more, "append": tmp_path / "one", "val_fraction": 0.1}
    with pytest.raises(
        ValueError, match="one was cleaned by rules; give them, or others, or --clean none"
    ):
        run(tmp_path, tmp_path / "two", **rest)
    manifest, _ = run(
        tmp_path, tmp_path / "two", **rest, rules=pieces["rules"].with_name("none.yaml")
    )
    assert len({source.rules for source in manifest.sources}) == 2


def test_what_goes_on_and_what_does_not_fit_is_told(
    pieces: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    for task in (0, 1):
        run(tmp_path, tmp_path / "out", tokenizer=model, task=(task, 2), **pieces)
    other = {**pieces, "rules": None}
    _, said = run(tmp_path, tmp_path / "out", tokenizer=model, task=(0, 2), **other)
    assert "reusing" not in said
    assert "are of another input, other options or other library versions, and are not used" in said
    made = len(list((tmp_path / "out" / PARTIAL / "chunks").glob("*/*.npz")))
    _, said = run(tmp_path, tmp_path / "out", tokenizer=model, **pieces)
    assert 0 < int(re.search(r"reusing (\d+) finished parts", said)[1]) < made

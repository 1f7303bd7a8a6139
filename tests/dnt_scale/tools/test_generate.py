"""`dnt generate` of one prompt and of many, each text as if it were alone."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import save_file

from data_prep.shards import load_manifest
from data_prep.tokenizer import Tokenizer
from dnt_scale import config
from dnt_scale.cli.main import main
from dnt_scale.config import ConfigError, ModelConfig
from dnt_scale.tools.convert_weights import from_file
from dnt_scale.tools.generate import Asked, Continuation, Writer, held_back, new_cache, window_start
from dnt_scale.tools.prompts import Continuations, read_prompts
from dnt_scale.tools.sampling import Sampling, sample
from testbed.configs import composed
from testbed.run import Ranks, tiny
from testbed.waiting import until
from tests.helpers.models import busy

PROMPTS = ["def ", "", "import os\n" * 30, "class Größe:", "x" * 40, "return", "# a longer comment"]
CONTEXT = 64
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def writer(corpus: Path) -> Writer:
    """A model of random weights with the corpus's tokenizer."""
    changes = ["model.context=64", "model.positions=rope", "model.kv_heads=1"]
    section = composed(*tiny(corpus, corpus.parent / "none", *changes)).model
    assert isinstance(section, ModelConfig)
    model = busy(section.model_copy(update={"tied_head": False, "vocab_size": 600}), torch.float32)
    manifest = load_manifest(corpus)
    tokenizer = Tokenizer.load(corpus / manifest.tokenizer.file)
    assert tokenizer.vocab_size < 600
    return Writer(model, tokenizer, manifest.eos_id, Asked())


def all_of(writer: Writer, prompts: list[str], batch: int) -> list[Continuation]:
    found = [each for advance in writer.each(prompts, batch) for each in advance.finished]
    assert sorted(each.index for each in found) == list(range(len(prompts)))
    return sorted(found, key=lambda each: each.index)


@torch.inference_mode()
def anew(writer: Writer, prompt: str, sampling: Sampling, seed: int, tokens: int) -> list[int]:
    """The ids of a text whose window is read anew for each token."""
    generator = torch.Generator().manual_seed(seed)
    ids = [writer.eos, *writer.tokenizer.encode(prompt)]
    for _ in range(tokens):
        window = ids[window_start(len(ids), writer.model.config.context) :]
        logits = writer.model(torch.tensor([window]))[0, -1, : writer.tokenizer.vocab_size]
        ids.append(sample(logits, sampling, generator, ids[1:]))
        if ids[-1] == writer.eos:
            break
    return ids


def test_a_text_depends_on_no_other_and_is_that_without_a_cache(writer: Writer) -> None:
    writer = replace(writer, asked=Asked(80, GREEDY))
    alone = all_of(writer, PROMPTS, 1)
    assert alone == all_of(writer, PROMPTS, 3) == all_of(writer, PROMPTS, 16)
    assert sum(each.tokens == 80 for each in alone) > 3  # beyond the context
    for prompt, each in zip(PROMPTS, alone, strict=True):
        ids = anew(writer, prompt, GREEDY, 0, 80)
        whole = writer.tokenizer.decode(ids[1:])
        assert prompt + each.text == whole.rstrip("\ufffd") and each.prompt == prompt


def test_a_sampled_text_depends_on_no_other(writer: Writer) -> None:
    sampling = Sampling(1.5, 0, top_p=0.9, min_p=0.001, repetition_penalty=1.2)
    writer = replace(writer, asked=Asked(30, sampling, seed=5))
    alone = all_of(writer, PROMPTS, 1)
    assert alone == all_of(writer, PROMPTS, 4)
    again = all_of(writer, ["def "] * 3, 3)
    assert again[0].text == alone[0].text != again[1].text != again[2].text
    assert alone[0].text == "".join(piece.text for piece in writer.stream("def "))[4:]


@torch.inference_mode()
def test_the_same_seed_gives_the_text_that_it_gave_before_there_was_a_cache(writer: Writer) -> None:
    tokens = CONTEXT - 8
    writer = replace(writer, asked=Asked(tokens, Sampling(0.8, 50), seed=3))
    generator = torch.Generator().manual_seed(3)
    ids = [writer.eos, *writer.tokenizer.encode("def f(")]
    for _ in range(tokens):
        logits = writer.model(torch.tensor([ids]))[0, -1]
        logits[writer.tokenizer.vocab_size :] = -torch.inf
        kth = logits.topk(50).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
        likely = torch.softmax((logits - logits.max()) / 0.8, dim=0)
        ids.append(int(torch.multinomial(likely, 1, generator=generator)))
        if ids[-1] == writer.eos:
            break
    assert len(ids) > 20
    found = "".join(piece.text for piece in writer.stream("def f("))
    assert found == writer.tokenizer.decode(ids[1:]).rstrip("\ufffd")


@pytest.mark.parametrize("context", [1, 2, 3, 64, 65])
def test_a_window_holds_as_much_as_fits_and_moves_by_half(context: int) -> None:
    starts = [window_start(length, context) for length in range(1, 5 * context + 5)]
    sizes = [length - start for length, start in enumerate(starts, 1)]
    assert sizes[:context] == list(range(1, context + 1)) and max(sizes) == context
    assert min(sizes[context:]) == max(1, context // 2)
    assert starts == sorted(starts)
    assert len(set(starts)) <= 10 or context < 4  # so seldom it is read anew


def test_a_text_ends_before_what_it_is_to_stop_at(writer: Writer) -> None:
    writer = replace(writer, asked=Asked(40, GREEDY))
    (whole,) = all_of(writer, ["def "], 1)
    assert whole.end == "length" and len(whole.text) > 20
    stop = whole.text[12:15]
    at = whole.text.index(stop)
    for stops in ((stop,), ("never there", stop), (whole.text[at : at + 9], stop)):
        stopping = replace(writer, asked=replace(writer.asked, stops=stops))
        (cut,) = all_of(stopping, ["def "], 1)
        assert (cut.text, cut.end) == (whole.text[:at], "stop") and cut.tokens < 40
        pieces = [piece.text for piece in stopping.stream("def ")]
        assert "".join(pieces) == "def " + cut.text


def test_what_may_become_a_stop_is_held_back() -> None:
    assert held_back("abc", ["cd"]) == 1 and held_back("abc", ["bcd", "cx"]) == 2
    assert held_back("abc", ["x", "abcabc"]) == 3 and held_back("abc", ["c", "ab"]) == 0
    assert held_back("", ["ab"]) == 0 and held_back("ab", []) == 0


def test_none_is_sampled_where_none_is_asked_for(writer: Writer) -> None:
    writer = replace(writer, asked=Asked(0))
    assert "".join(piece.text for piece in writer.stream("def ")) == "def "
    found = all_of(writer, PROMPTS, 2)
    assert {(each.text, each.tokens, each.end) for each in found} == {("", 0, "length")}


def test_prompts_are_lines_or_a_field_of_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffone \r\n\n  two\x0bthree\n".encode() + b"\xff")
    assert read_prompts(text) == ["one ", "  two\x0bthree", "\ufffd"]
    lines.write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(lines) == ["a\nb", ""]
    for content, says in (
        ('{"prompt": "a"}\n{"text": "b"}', 'line 2: found \'{"text": "b"}\', expected a JSON obj'),
        ("[1", "line 1: found '[1', expected"),
        ('{"prompt": 3}', "with a text as its field"),
        (" \n\n", "no prompts"),
    ):
        lines.write_text(content)
        with pytest.raises(ConfigError, match=f"{lines}") as caught:
            read_prompts(lines)
        assert says in str(caught.value)


def test_texts_are_there_once_and_in_order_whatever_interrupts(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    each = [Continuation(index, f"p{index}", "t" * index, index, "length") for index in range(4)]
    with Continuations(out, {"seed": 1, "stops": ("a",)}) as file:
        file.add(each[2])
        file.add(each[0])
        with pytest.raises(ConfigError, match="another process is writing it"):
            Continuations(out, {"seed": 1, "stops": ("a",)})
    with file.partial.open("ab") as torn:
        torn.write(b'{"index": 1, "pro')
    for changed, says in (({"seed": 2, "stops": ("a",)}, "begun with seed 1, now it is 2"),):
        with pytest.raises(ConfigError, match=says):
            Continuations(out, changed)
    with Continuations(out, {"seed": 1, "stops": ("a",)}) as file:
        assert set(file.lines) == {0, 2}
        file.add(each[3])
        file.add(each[1])
        assert not out.exists()
        file.finish()
    found = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert found[3] == {"index": 3, "prompt": "p3", "text": "ttt", "tokens": 3, "end": "length"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(ConfigError, match="exists already"):
        Continuations(out, {})
    with pytest.raises(ConfigError, match="no folder"):
        Continuations(tmp_path / "no" / "out", {})
    Path(f"{out}x.partial").write_bytes(b"{}\n[]\n")
    with pytest.raises(ConfigError, match="line 2: damaged"):
        Continuations(Path(f"{out}x"), {})


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that has a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("made")
    chosen = tiny(corpus, folder / "run", "model.tied_head=false")
    run = composed(*chosen)
    assert isinstance(run.model, ModelConfig)
    save_file(busy(run.model, torch.float32).state_dict(), folder / "weights.safetensors")
    from_file(folder / "weights.safetensors", chosen)
    (folder / "run" / "config.yaml").write_text(config.to_yaml(run))
    return folder / "run"


def generate(*words: object) -> int:
    return main(["generate", *map(str, words)])


def write_killed(words: list[str]) -> None:
    generate(*words)


def test_a_killed_command_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, other = (tmp_path / name for name in ("prompts.txt", "out.jsonl", "other.jsonl"))
    prompts.write_text("\n".join(f"def f{number}(" for number in range(60)))
    words = [made, "--prompts", prompts, "--tokens", 30, "--seed", 7, "--out"]
    group = Ranks(write_killed, ([*map(str, words), str(out), "--batch", "2"],), 1, {})
    partial = Path(f"{out}.partial")
    until(
        lambda: (partial.exists() and partial.read_bytes().count(b"\n") > 2) or not group.running,
        every=0.001,
    )
    group.kill(signal.SIGKILL)
    group.wait()
    there = len(partial.read_bytes().splitlines()) - 1
    assert 0 < there < 60
    assert generate(*words, out, "--temperature", 0.5) == 2
    assert "begun with temperature 0.8, now it is 0.5" in capsys.readouterr().err
    assert generate(*words, out, "--batch", 16) == 0
    said = capsys.readouterr()
    assert " of 60 are there" in said.err and f"{out}: 60 texts" in said.out
    assert "prompts/s" in said.err and "tokens/s" in said.err
    assert generate(*words, other) == 0
    assert out.read_bytes() == other.read_bytes()


def test_texts_of_many_prompts_are_shown_in_their_order(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"def f{n}("}) for n in range(5)))
    words = ["--tokens", 8, "--stop", "(", "--stop", "e"]
    assert generate(made, "--prompts", prompts, "--batch", 2, *words) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["index"], line["prompt"]) for line in found] == [
        (number, f"def f{number}(") for number in range(5)
    ]
    assert generate(made, "--prompt", "def f0(", *words) == 0
    shown = capsys.readouterr()
    assert shown.out == f"def f0({found[0]['text']}\n"
    assert f"{found[0]['tokens']} tokens in " in shown.err and " tokens/s" in shown.err


def test_what_does_not_go_together_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, empty = tmp_path / "prompts.txt", tmp_path / "empty.txt"
    prompts.write_text("one\n")
    empty.write_text("\n")
    many = ["--prompts", prompts]
    for words, says in (
        ([*many, "--prompt", ""], "found both"),
        (["--batch", 2], "--batch: goes with --prompts"),
        (["--out", tmp_path / "o"], "--out: goes with --prompts"),
        (["--prompts", empty], "empty.txt: no prompts"),
        (["--prompts", tmp_path / "none"], "none: No such file"),
        (["--prompts", tmp_path], "Is a directory"),
        ([*many, "--out", prompts], "exists already"),
        ([*many, "--out", tmp_path / "no" / "o"], "there is no folder"),
    ):
        assert generate(made, *words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and says in line
    for option, value in (("--top-p", 0), ("--top-p", 1.1), ("--min-p", -1), ("--stop", "")):
        with pytest.raises(SystemExit) as ended:
            generate(made, option, value)
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {option}: ")


def test_a_cache_that_memory_has_no_room_for_is_refused(writer: Writer) -> None:
    with pytest.raises(ConfigError, match="GB of memory are free; give a smaller --batch"):
        new_cache(writer.model, 1 << 28, CONTEXT)

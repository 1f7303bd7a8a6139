import hashlib
import io
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.identity import text_hash
from data_prep.tokenizer import PART_CHARS, FastPathDiffers, Tokenizer
from data_prep.train_tokenizer import TextSample, train
from testbed.corpus import python_source_files

pytestmark = pytest.mark.slow

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [path.read_bytes().decode("utf-8", "replace") for path in python_source_files(600_000)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(
    request: pytest.FixtureRequest, sources: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / f"{request.param}.model"
    train(sources, 512, path, request.param)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def foreign(path: Path, **settings: object) -> Path:
    """A model with SentencePiece's own defaults: it normalises, adds a space, and knows few
    characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["some words to learn from"] * 9),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=4,
        **{"vocab_size": 40, **settings},
    )
    path.write_bytes(model.getvalue())
    return path


def number_in(error: ValueError, before: str) -> int:
    return int(re.findall(re.escape(before) + r"(\d+)", str(error))[0])


def test_what_it_says_of_itself(tokenizer: Tokenizer, model: Path) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (512, 1)
    assert tokenizer.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()


def test_real_text_comes_back(tokenizer: Tokenizer, sources: list[str]) -> None:
    for text in sources:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert len(ids) < len(text)


@settings(max_examples=300, deadline=None)
@given(
    ANY_TEXT
    | st.lists(st.sampled_from(["\u2581", " ", "\n", "\r", "\t", "\0", "a", "</s>", "é"])).map(
        "".join
    )
)
@example("")
@example("\0\0a\0")
@example("</s><s><unk><0x0A>▁</s>")
@example("a\u2581 \u2581\u2581b\u2581")
@example("\u2585 \u2047 \ufffd \ufeff")
@example("  two  \r\n\r\n\t three   ")
@example("👩‍👩‍👧 \U0010ffff \u202e")
@example("\x7f\x01\x1b[0m")
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_long_document_goes_in_parts(
    tokenizer: Tokenizer, model: Path, sources: list[str]
) -> None:
    text = "\n".join(sources)
    assert len(text) > 4 * PART_CHARS
    whole = sentencepiece.SentencePieceProcessor(model_file=str(model)).Encode(text)
    ids = tokenizer.encode(text)
    # Unigram breaks ties by float32 sums, which grow with the length.
    assert ids == whole if model.stem == "bpe" else abs(len(ids) - len(whole)) <= len(whole) // 1000
    one_line = text.replace("\n", " ")
    for long in (text, one_line):
        assert tokenizer.decode(tokenizer.encode(long)) == long


def test_training_again_gives_the_same_file(
    model: Path, sources: list[str], tmp_path: Path
) -> None:
    train(sources, 512, tmp_path / "again.model", "unigram" if "unigram" in model.name else "bpe")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_training_text_may_hold_anything(tmp_path: Path) -> None:
    texts = [
        "</s> <unk> <0x0A> <s> the cat\n",
        "a\u2581b \u2585 c\0d\r\n",
        "x" * 5000,
        "\ufeff\u2028",
    ] * 30
    with pytest.raises(ValueError, match="the largest that this corpus supports") as caught:
        train(texts, 5000, tmp_path / "t.model")
    train(texts, number_in(caught.value, "supports is "), tmp_path / "t.model")
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert not any(tokenizer.eos_id in tokenizer.encode(text) for text in texts)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocabulary_size_out_of_bounds(tmp_path: Path, kind: str) -> None:
    texts = ["the cat sat on the mat\n" * 20]
    with pytest.raises(
        ValueError, match="found 5000, but the largest that this corpus supports is"
    ) as high:
        train(texts, 5000, tmp_path / "t.model", kind)
    with pytest.raises(
        ValueError, match=r"found 200, but .* need \d+; use --vocab-size \d+ or more"
    ) as low:
        train(texts, 200, tmp_path / "t.model", kind)
    most, least = number_in(high.value, "supports is "), number_in(low.value, "need ")
    assert least <= most
    for limit in {least, most}:
        train(texts, limit, tmp_path / "t.model", kind)
        assert Tokenizer.load(tmp_path / "t.model").vocab_size == limit
    with pytest.raises(ValueError, match="no text to train"):
        train(["\n\n"], 300, tmp_path / "t.model", kind)


def sample(texts: list[str], max_bytes: int, pieces: int = 1) -> list[str]:
    """The choice, offered in so many pieces with what each may leave out by itself."""
    whole = TextSample(max_bytes)
    for start in range(pieces):
        part = TextSample(max_bytes, whole.limit)
        for text in texts[start::pieces]:
            part.add(text_hash(text.encode(), "sample"), text)
        for rank, text in part.items():
            whole.add(rank, text)
    return [text for _, text in whole.items()]


@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
def test_a_sample_does_not_depend_on_the_order_or_the_pieces(pieces: int) -> None:
    texts = [f"document {number} " * (number % 7 + 1) for number in range(500)]
    chosen = sample(texts, 5000)
    assert chosen == sample(texts[::-1], 5000, pieces)
    assert 5000 <= sum(map(len, chosen)) < 5000 + 100
    assert len(set(chosen)) == len(chosen) < 300
    assert sorted(sample(texts, 10**9, pieces)) == sorted(texts)
    assert sample(["x" * 1000], 10) == ["x" * 10]
    assert sample([], 10) == []
    assert sample(["twice"] * 9, 10**9) == ["twice"]


def test_kitoken_gives_the_ids_of_sentencepiece(sources: list[str], tmp_path: Path) -> None:
    train(sources, 512, tmp_path / "t.model", "bpe")
    plain, fast = (
        Tokenizer.load(tmp_path / "t.model", encoder) for encoder in ("sentencepiece", "kitoken")
    )
    for text in [
        *sources,
        "a\u2581b \u2585 c\0d\r\n",
        "\ufeff\u2028 \t\n",
        "x" * 40_000,
        "\U0001f600 é\u0301 </s>",
    ]:
        assert fast.encode(text) == plain.encode(text)
        fast.compare_with_sentencepiece(text, "here")


def test_kitoken_that_differs_is_found(tmp_path: Path) -> None:
    fast = Tokenizer.load(foreign(tmp_path / "f.model", model_type="bpe"), "kitoken")
    fast.compare_with_sentencepiece("some words", "here")
    with pytest.raises(
        FastPathDiffers, match=r"here: kitoken and SentencePiece give different ids"
    ):
        fast.compare_with_sentencepiece("some\twords", "here")  # SentencePiece makes it a space


def test_a_foreign_model_is_used_as_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(foreign(tmp_path / "f.model"))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "f.model"))
    text = "some  words\nto\u2581learn " * 20_000
    assert tokenizer.encode(text) == plain.Encode(text)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (2, plain.vocab_size())
    assert tokenizer.decode(tokenizer.encode("some  words")) == "some words"


def test_bad_models(tmp_path: Path) -> None:
    whole = foreign(tmp_path / "f.model").read_bytes()
    for content in (b"", b"hello world", b"{}", whole[: len(whole) // 2], b"\x1f\x8b\x08" * 50):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model: .*expected a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="cannot read the tokenizer: No such file"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(ValueError, match="no end-of-sequence"):
        Tokenizer.load(foreign(tmp_path / "no-eos.model", eos_id=-1))


@pytest.mark.parametrize("ids", [[-1], [512], [3, 10**9]])
def test_ids_out_of_range(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= id < 512"):
        tokenizer.decode(ids)

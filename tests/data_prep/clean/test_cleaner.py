import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean.cleaner import (
    EXCERPT,
    SAMPLES,
    CleanConfig,
    Cleaner,
    CleanStats,
    CleanVerdict,
    read_rules,
)

SHIPPED = Path(__file__).parents[3] / "configs" / "clean"
ESSAY = """The old harbour lies to the north of the town, and nobody has ever counted the boats \
that sleep in it.
In the morning the fishermen come back with baskets of herring, which they sell to whoever is \
awake by then.
Later, children run along the quay with bread for the gulls. Their mothers have warned them \
about the water!
When evening falls, a lamp is lit at the end of the mole, and it can be seen from the hills \
behind the church."""


def rules(folder: Path, text: str) -> Path:
    path = folder / "rules.yaml"
    path.write_text(text)
    return path


def clean(folder: Path, text: str, *documents: str) -> tuple[list[CleanVerdict], CleanStats]:
    stats = CleanStats()
    cleaner = Cleaner(read_rules(rules(folder, text)))
    return [cleaner(document, stats) for document in documents], stats


def test_rules_run_in_order_and_are_counted(tmp_path: Path) -> None:
    text = """
rules:
  - normalize: {form: NFKC}
  - gopher_quality: {min_words: 2, min_mean_word_length: 1, min_stop_words: 0}
  - mask_pii:
"""
    verdicts, stats = clean(tmp_path, text, "ﬁsh a@b.org c@d.org", "one", "two words")
    assert verdicts == [
        CleanVerdict("fish <EMAIL> <EMAIL>", None, ""),
        CleanVerdict(None, "gopher_quality", "words 1 < 2"),
        CleanVerdict("two words", None, ""),
    ]
    told = stats.to_json()
    assert list(told) == ["normalize", "gopher_quality", "mask_pii"]
    assert [(rule["seen"], rule["changed"], rule["dropped"]) for rule in told.values()] == [
        (3, 1, 0),
        (3, 0, 1),
        (2, 1, 0),
    ]
    assert [rule["counts"] for rule in told.values()] == [{}, {"words": 1}, {"emails": 2}]
    assert [sample["text"] for sample in told["gopher_quality"]["samples"]] == ["one"]
    assert told["gopher_quality"]["samples"][0]["detail"] == "words 1 < 2"
    assert stats.dropped() == {"normalize": 0, "gopher_quality": 1, "mask_pii": 0}


def test_the_order_matters(tmp_path: Path) -> None:
    shorten = "  - c4_quality: {min_sentences: 0}\n"
    count = "  - gopher_quality: {min_words: 6, min_stop_words: 0}\n"
    document = "Menu\nThese are five good words."
    ((first,), _), ((second,), _) = (
        clean(tmp_path, "rules:\n" + order, document)
        for order in (shorten + count, count + shorten)
    )
    assert first == CleanVerdict(None, "gopher_quality", "words 5 < 6")
    assert second == CleanVerdict("These are five good words.", None, "")


def test_a_document_of_which_nothing_is_left_is_dropped(tmp_path: Path) -> None:
    verdicts, stats = clean(tmp_path, "rules: [{c4_quality: {min_sentences: 0}}]", "Menu\nHome")
    assert verdicts == [CleanVerdict(None, "c4_quality", "nothing is left of it")]
    assert stats.dropped() == {"c4_quality": 1}


def test_samples_are_beginnings_and_few(tmp_path: Path) -> None:
    documents = [f"{number} " * 1000 for number in range(20)]
    _, stats = clean(tmp_path, "rules: [{gopher_quality: {}}]", *documents)
    samples = stats.to_json()["gopher_quality"]["samples"]
    assert len(samples) == SAMPLES
    assert all(len(sample["text"]) == EXCERPT and sample["detail"] for sample in samples)


@pytest.fixture(scope="module")
def cleaner(tmp_path_factory: pytest.TempPathFactory) -> Cleaner:
    text = (
        "rules: [{mask_pii: {}}, {c4_quality: {min_sentences: 1, min_line_words: 2}}, "
        "{gopher_quality: {min_words: 3}}]"
    )
    return Cleaner(read_rules(rules(tmp_path_factory.mktemp("rules"), text)))


@settings(deadline=None)
@given(
    parts=st.lists(
        st.lists(st.text("ab.{@ \n", max_size=20) | st.just("a@b.org the of."), max_size=6),
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_merging_in_any_order_gives_the_same(
    cleaner: Cleaner, parts: list[list[str]], seed: int
) -> None:
    def merged(pieces: list[list[str]]) -> dict[str, Any]:
        total = CleanStats()
        for documents in pieces:
            stats = CleanStats()
            for document in documents:
                cleaner(document, stats)
            total.merge(CleanStats.from_json(json.loads(json.dumps(stats.to_json()))))
        return total.to_json()

    expected = merged([[document for documents in parts for document in documents]])
    shuffled = random.Random(seed).sample(parts, len(parts))
    assert json.dumps(merged(shuffled)) == json.dumps(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules: [{gopher_qualty: {}}]",
            r"rules\.0: found the rule 'gopher_qualty', .*did you mean gopher_quality\?",
        ),
        (
            "rules: [{zzz: {}}]",
            r"rules\.0: found the rule 'zzz', .*expected one of fix_text, normalize",
        ),
        (
            "rules: [{normalize: {}}, {mask_pii: {emial: true}}]",
            r"rules\.1\.mask_pii\.emial: .*did you mean email\?",
        ),
        (
            "rules: [{fix_text: {zzz: true}}]",
            r"rules\.0\.fix_text\.zzz: found a field that there is not; expected no fields",
        ),
        (
            "rules: [{gopher_quality: {min_words: many}}]",
            r"rules\.0\.gopher_quality\.min_words: .*integer, found 'many'",
        ),
        (
            "rules: [{gopher_quality: {min_words: -1}}]",
            r"min_words: .*greater than or equal to 0, found -1",
        ),
        ("rules: [{mask_pii: {email: 1}}]", r"mask_pii\.email: .*valid boolean, found 1"),
        (
            "rules: [{normalize: {form: nfc}}]",
            r"normalize\.form: Input should be 'NFC', 'NFD', .*found 'nfc'",
        ),
        ("rules: [{language: {}}]", r"rules\.0\.language\.keep: missing, and has no default"),
        ("rules: [{language: {keep: en}}]", r"language\.keep: .*valid list, found 'en'"),
        ("rules: [{language: {keep: [english]}}]", r"language\.keep\.0: .*found 'english'"),
        (
            "rules: [{gopher_repetition: {max_top_ngram: {1: 0.5}}}]",
            r"max_top_ngram.*greater than or equal to 2",
        ),
        ("rules: [{mask_pii: [email]}]", r"rules\.0\.mask_pii: .*found \['email'\]"),
        (
            "rules: [{decontaminate: {files: [none.txt]}}]",
            r"decontaminate\.files: no file matches 'none\.txt' in",
        ),
        (
            "rules: [{decontaminate: {files: [rules.yaml]}}]",
            r"decontaminate\.files: found .*rules\.yaml, expected \.txt or",
        ),
        ("rules: {normalize: {}}", r"rules: found \{'normalize': \{\}\}, expected a list"),
        ("rules: [normalize]", r"rules\.0: found 'normalize', expected one rule and its settings"),
        (
            "rules: [{normalize: {}, fix_text: {}}]",
            r"rules\.0: found .*expected one rule and its settings",
        ),
        ("rules: [{normalize: {}}, {normalize: {}}]", r"rules\.1: found normalize again"),
        ("- normalize: {}", r"found \[.*expected one field, rules"),
        ("rules: []\nmore: 1", r"found the fields rules, more, expected one field, rules"),
        ("", r"found None, expected one field, rules"),
        ("rules: [", r"not YAML \(while parsing"),
        (
            "rules: !!python/object/apply:os.getcwd []",
            r"not YAML \(could not determine a constructor",
        ),
        ("[" * 5000, r"not YAML"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = rules(tmp_path, text)
    with pytest.raises(ValueError, match=rf"(?s)^{path}.*{message}") as caught:
        read_rules(path)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"gone\.yaml: cannot read the cleaning rules: No such file"
    ):
        read_rules(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="Is a directory"):
        read_rules(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"bytes\.yaml: not YAML"):
        read_rules(tmp_path / "bytes.yaml")


def with_tests(folder: Path, content: str) -> CleanConfig:
    (folder / "tests").mkdir(parents=True, exist_ok=True)
    (folder / "tests" / "a.jsonl").write_text(content)
    return read_rules(
        rules(
            folder, "rules: [{decontaminate: {files: ['tests/*.jsonl', tests/a.jsonl], ngram: 4}}]"
        )
    )


def test_test_files_lie_beside_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_tests(Path("here"), '{"q": "What is your name?"}')
    monkeypatch.chdir("/")
    stats = CleanStats()
    verdict = Cleaner(config)("Tell me: WHAT is your name", stats)
    assert verdict == CleanVerdict(
        None, "decontaminate", "shares 4 words with a test file: what is your name"
    )
    assert stats.to_json()["decontaminate"]["counts"] == {"documents": 1}


def test_the_fingerprint_is_of_what_decides(tmp_path: Path) -> None:
    base = read_rules(rules(tmp_path, "rules: [{mask_pii: {}}, {normalize: {}}]")).fingerprint()
    assert len(base) == 64 and int(base, 16) >= 0
    same = "# a comment\nrules:\n  - mask_pii: {email: true}\n  - normalize:\n"
    assert read_rules(rules(tmp_path, same)).fingerprint() == base
    for other in (
        "[{normalize: {}}, {mask_pii: {}}]",
        "[{mask_pii: {}}]",
        "[{mask_pii: {ip: false}}, {normalize: {}}]",
    ):
        assert read_rules(rules(tmp_path, f"rules: {other}")).fingerprint() != base
    tests = with_tests(tmp_path / "a", '{"q": "x"}').fingerprint()
    assert with_tests(tmp_path / "b", '{"q": "x"}').fingerprint() == tests
    assert with_tests(tmp_path / "b", '{"q": "y"}').fingerprint() != tests
    vanished = with_tests(tmp_path / "b", "{}")
    (tmp_path / "b" / "tests" / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot read the test file"):
        vanished.fingerprint()


@pytest.mark.parametrize("name", ["light.yaml", "web.yaml"])
def test_the_rules_that_are_shipped(name: str) -> None:
    cleaner, stats = Cleaner(read_rules(SHIPPED / name)), CleanStats()
    assert cleaner(ESSAY, stats) == CleanVerdict(ESSAY, None, "")
    for broken in ("word", "spam spam " * 500, "1 2 3 4 5 6 7 8 9 10 " * 50, "QUJDREVGR0g" * 5000):
        assert cleaner(broken, stats).text is None, broken[:20]


def test_the_shipped_rules_differ_on_code() -> None:
    code = Path(__file__).read_text()
    web, light = (Cleaner(read_rules(SHIPPED / f"{name}.yaml")) for name in ("web", "light"))
    assert web(code, CleanStats()).text is None
    assert light(code, CleanStats()).text == code


def test_languages_are_the_text_that_was_written(tmp_path):
    """To YAML 1.1 `no`, Norwegian, is false, and so are `off` and `n`; `yes` and `on` are true."""
    (tmp_path / "rules.yaml").write_text("rules: [{language: {keep: [no, en, on]}}]\n")
    [(_, settings)] = read_rules(tmp_path / "rules.yaml").rules
    assert settings.keep == ["no", "en", "on"]

"""Which sets a run reads, and which sets do not go together."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards import load_manifest, manifest_sha256, write_manifest
from dnt_scale.config import ConfigError, DataConfig
from dnt_scale.data.token_sets import SHARES, TokenSet, any_set, identity, load_sets, tokens_a_place
from testbed.corpus import small_set
from testbed.run import synthetic_set


def mixture(**sets):
    return DataConfig.model_validate(
        {
            "mixture": {
                name: {"path": path, "weight": weight} for name, (path, weight) in sets.items()
            }
        }
    )


def test_one_set_is_itself(corpus):
    [source] = load_sets(DataConfig(path=corpus))
    assert source == TokenSet("", corpus, load_manifest(corpus))
    assert identity((source,)) == manifest_sha256(corpus)
    assert source.shuffle_seed(2**64 - 1) == 2**64 - 1
    assert source.field == "data.path"


def test_shares_are_the_weights_largest_first(corpus):
    sources = load_sets(mixture(b=(corpus, 0.25), a=(corpus, 0.5), c=(corpus, 0.25)))
    assert [(source.name, source.share) for source in sources] == [
        ("a", SHARES // 2),
        *((n, SHARES // 4) for n in "bc"),
    ]
    assert [source.weight for source in sources] == [0.5, 0.25, 0.25]
    assert sources[1].field == "data.mixture.b.path"
    assert len({source.shuffle_seed(3) for source in sources} | {3}) == 4


def test_shares_are_of_rows_and_weights_of_tokens(corpus, packed):
    part = tokens_a_place(load_manifest(packed))
    split = load_manifest(packed).splits["train"]
    assert part == split.tokens / (split.rows * 64) < 0.97
    docs, padded = sorted(
        load_sets(mixture(a=(corpus, 6), b=(packed, 2))), key=lambda source: source.name
    )
    assert (docs.weight, padded.weight) == (0.75, 0.25)
    assert padded.share / docs.share == pytest.approx(1 / 3 / part, rel=1e-8)
    assert tokens_a_place(docs.manifest) == 1


def test_a_tiny_weight_still_gives_rows(corpus, packed):
    assert load_sets(mixture(a=(corpus, 1e9), b=(packed, 1e-9)))[1].share == 1


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000), min_size=2, max_size=2),
    scale=st.sampled_from([1, 2, 0.25, 1000]),
)
def test_only_what_decides_the_rows_is_in_the_identity(corpus, packed, weights, scale):
    a, b = weights
    found = identity(load_sets(mixture(x=(corpus, a), y=(packed, b))))
    assert found == identity(load_sets(mixture(y=(packed, scale * b), x=(corpus, scale * a))))
    others = [
        mixture(x=(corpus, a), y=(packed, b + 0.5)),
        mixture(x=(corpus, a), z=(packed, b)),
        mixture(x=(packed, a), y=(corpus, b)),
        mixture(x=(corpus, a), y=(corpus, b)),
        DataConfig(path=corpus),
    ]
    assert found not in [identity(load_sets(other)) for other in others]


def test_another_tokenizer_is_named(corpus, tmp_path):
    other = synthetic_set(tmp_path / "other")
    with pytest.raises(ConfigError) as caught:
        load_sets(mixture(wiki=(corpus, 2), code=(other, 1)))
    message = str(caught.value)
    assert message.startswith(f"data.mixture.code.path: {other} has tokenizer (sha256) ")
    assert (
        f"but {corpus} (wiki) has {load_manifest(corpus).tokenizer.sha256[:12]}; prepare both"
        in message
    )


def test_another_row_length_is_named(corpus, tmp_path):
    small_set(tmp_path / "a", val_fraction=0.0, limit_bytes=200_000)
    small_set(tmp_path / "b", val_fraction=0.0, limit_bytes=200_000, seq_len=32)
    assert load_manifest(tmp_path / "a").tokenizer == load_manifest(tmp_path / "b").tokenizer
    with pytest.raises(
        ConfigError,
        match=r"data\.mixture\.b\.path: .* has seq_len 32, but .* \(a\) has 64; prepare both",
    ):
        load_sets(mixture(a=(tmp_path / "a", 1), b=(tmp_path / "b", 1)))


def test_an_altered_eos_is_named(corpus, tmp_path):
    other = Path(shutil.copytree(corpus, tmp_path / "set"))
    manifest = load_manifest(other)
    write_manifest(other, manifest.model_copy(update={"eos_id": manifest.eos_id + 1}))
    with pytest.raises(ConfigError, match=r"data\.mixture\.b\.path: .* has eos_id"):
        load_sets(mixture(a=(corpus, 1), b=(other, 1)))


def test_a_missing_set_is_named(corpus, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "none")):
        load_sets(mixture(a=(corpus, 1), b=(tmp_path / "none", 1)))


def test_any_set_of_a_mixture_will_do_for_what_they_share(corpus, packed, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert any_set(mixture(a=(a, 1), b=(packed, 1), c=(corpus, 9)))[0].folder == packed
    assert any_set(DataConfig(path=corpus)) == load_sets(DataConfig(path=corpus))
    for data in (mixture(a=(a, 1), b=(b, 1)), DataConfig(path=a)):
        with pytest.raises(ValueError, match=str(a)):
            any_set(data)

import os
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import dedup
from data_prep.dedup import (
    BANDS,
    FINGERPRINT,
    PERMUTATIONS,
    FoundDuplicates,
    find_duplicates,
    fingerprints,
    similarity,
)
from testbed.corpus import python_source_files

pytestmark = pytest.mark.slow

ALONE = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def plain_shingles(text: str) -> set[tuple[str, ...]]:
    """What dedup.py's head says, a character at a time."""
    words = [""]
    for character in text.casefold():
        if character.isspace():
            words.append("")
        elif unicodedata.category(character)[0] in "PS" or unicodedata.category(character) in (
            "Cc",
            "Cf",
        ):
            continue
        elif unicodedata.name(character, "").startswith(ALONE):
            words += [character, ""]
        else:
            words[-1] += character
    words = [word for word in words if word]
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: str, b: str) -> float:
    first, second = plain_shingles(a), plain_shingles(b)
    return len(first & second) / len(first | second)


def python_documents(count: int, seed: int, scratch: Path) -> list[str]:
    """Real text in documents of 60 to 400 words, none like another, in the order of a seed."""
    rng = random.Random(seed)
    words = [
        word
        for path in python_source_files(4_000_000)
        for word in path.read_text(errors="replace").split()
    ]
    documents = []
    start = 0
    while start < len(words):
        size = rng.randint(60, 400)
        documents.append(" ".join(words[start : start + size]))
        start += size
    rng.shuffle(documents)
    found = find(documents, scratch)
    return [text for text, original in zip(documents, found.original, strict=True) if original < 0][
        :count
    ]


def changed(text: str, rng: random.Random) -> str:
    """1 to 20 % of the words replaced, scattered or in one run."""
    words = text.split()
    count = max(1, round(len(words) * rng.uniform(0.01, 0.2)))
    start = rng.randrange(len(words) - count)
    places = rng.choice([range(start, start + count), rng.sample(range(len(words)), count)])
    for place in places:
        words[place] = f"w{rng.randrange(10**6)}"
    return " ".join(words)


def find(texts: list[str], scratch: Path, near: bool = True, cut: int = 100) -> FoundDuplicates:
    parts = [fingerprints(texts[i : i + cut]) for i in range(0, len(texts), cut)]
    return find_duplicates(parts, scratch, near=near)


def random_words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def test_planted_near_duplicates_are_found_and_nothing_else_is_removed(scratch: Path) -> None:
    rng = random.Random(1)
    originals = python_documents(800, 1, scratch)
    copies = [changed(text, rng) for text in originals]
    texts = originals + copies
    found = find(texts, scratch).original
    truth = [jaccard(a, b) for a, b in zip(originals, copies, strict=True)]
    alike = [number for number, value in enumerate(truth) if value >= 0.8]
    assert len(alike) > 150
    assert sum(value < 0.5 for value in truth) > 150
    recall = sum(found[len(originals) + number] == number for number in alike) / len(alike)
    assert recall >= 0.95
    for number in np.flatnonzero(found >= 0):
        assert jaccard(texts[number], texts[found[number]]) >= 0.5


def test_the_estimate_is_near_the_true_similarity(scratch: Path) -> None:
    rng = random.Random(2)
    originals = python_documents(400, 2, scratch)
    copies = [changed(text, rng) for text in originals]
    estimate = similarity(fingerprints(originals), fingerprints(copies))
    error = estimate - np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    assert np.sqrt((error**2).mean()) < 0.045
    assert abs(error.mean()) < 0.01
    assert np.abs(error).max() < 0.2


def test_agreement_by_chance_is_taken_off() -> None:
    made = np.zeros(4, FINGERPRINT)
    for number, differing in enumerate((0, 96, 127, 128)):
        made["signature"][number, :differing] = 1
    assert similarity(made[0], made).tolist() == pytest.approx(
        [1, (0.25 - 1 / 256) / (255 / 256), 1 / 255, 0]
    )


def test_agrees_with_datasketch(scratch: Path) -> None:
    rng = random.Random(3)
    texts = [
        text
        for original in python_documents(250, 3, scratch)
        for text in (original, changed(original, rng))
    ]
    hashes = [MinHash(num_perm=128) for _ in texts]
    index = MinHashLSH(threshold=0.8, num_perm=128)
    looked_up = set()
    for number, text in enumerate(texts):
        hashes[number].update_batch(
            [" ".join(shingle).encode() for shingle in plain_shingles(text)]
        )
        looked_up |= {
            (n, number)
            for n in index.query(hashes[number])
            if hashes[n].jaccard(hashes[number]) >= 0.8
        }
        index.insert(number, hashes[number])
    values = np.array([one.hashvalues for one in hashes])
    made = fingerprints(texts)
    tables = ((values[:, None] == values).mean(axis=2), similarity(made[:, None], made))
    theirs, ours = (
        {(a, b) for a, b in np.argwhere(table >= 0.8).tolist() if a < b} for table in tables
    )
    # Each errs by 0.035 or so: on pairs within 0.1 of the threshold they may differ, and on no
    # others.
    truth = {(a, b): jaccard(texts[a], texts[b]) for a, b in ours | theirs}
    assert all(0.7 < truth[pair] < 0.9 for pair in ours ^ theirs)
    assert sum(value >= 0.9 for value in truth.values()) >= 5
    assert len(ours & theirs) > 30
    # What its index finds at 0.8 is above our 0.7, and found by ours.
    original = find(texts, scratch).original
    assert len(looked_up) > 30
    assert sum(original[b] == a for a, b in looked_up) / len(looked_up) >= 0.95


def test_exact_duplicates_ignore_case_and_spacing(scratch: Path) -> None:
    texts = [
        "Hello  world,\n a b c",
        "other",
        "hello WORLD, A b\tC ",
        "hello world a b c",
        "other",
        "STRASSE",
        "straße",
    ]
    found = find(texts, scratch, near=False)
    assert found.original.tolist() == [-1, -1, 0, -1, 1, -1, 5]
    assert (found.exact, found.near, found.clusters, found.compared) == (3, 0, 3, 0)
    assert found.largest == [(2, 0), (2, 1), (2, 5)]


def test_exact_duplicates_come_first_and_point_to_what_stays(scratch: Path) -> None:
    words = random_words(200, 4)
    text, like = " ".join(words), " ".join(words[:-3])
    found = find([text, "between", like, like.upper(), text, text + "!"], scratch, cut=1)
    assert found.original.tolist() == [-1, -1, 0, 0, 0, 0]
    assert (found.exact, found.near, found.clusters, found.largest) == (2, 2, 1, [(5, 0)])


def test_chains_remove_only_what_resembles_a_document_that_stays(scratch: Path) -> None:
    words = random_words(1000, 5)
    a, b, c = (" ".join(words[start : start + 500]) for start in (0, 55, 110))
    assert jaccard(a, b) == jaccard(b, c) > 0.79
    assert jaccard(a, c) < 0.65
    assert find([a, b, c], scratch).original.tolist() == [-1, 0, -1]
    assert find([b, c, a], scratch).original.tolist() == [-1, 0, 0]
    assert find([c, a, b], scratch).original.tolist() == [-1, -1, 0]
    assert find([a, b, c, c + "!"], scratch).original.tolist() == [-1, 0, -1, 2]


def test_a_bucket_of_several_families(scratch: Path) -> None:
    made = np.tile(synthetic(np.random.default_rng(11), 5), 2)
    made["exact"][:, 0] = np.arange(10)
    made["bands"] = np.random.default_rng(12).integers(0, 2**64, (10, BANDS), dtype=np.uint64)
    made["bands"][:, 20] = 7
    found = find_duplicates([made], scratch, near=True)
    assert found.original.tolist() == [-1] * 5 + [0, 1, 2, 3, 4]
    assert (found.exact, found.near, found.clusters) == (0, 5, 5)


def test_tiny_texts(scratch: Path) -> None:
    texts = [
        "",
        " \n",
        "!!!",
        "???",
        "...",
        "a",
        "A.",
        "b",
        "a b",
        "a b c d",
        "a, b, c, d",
        "!!!",
        "a b c d e",
        "a b c d f",
    ]
    found = find(texts, scratch)
    assert found.original.tolist() == [-1, 0, -1, -1, -1, -1, 5, -1, -1, -1, 9, 2, -1, -1]
    assert (found.exact, found.near) == (2, 2)


def test_languages_without_spaces(scratch: Path) -> None:
    rng = random.Random(6)
    chinese = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(300))
    edited = chinese[:150] + "。" + chinese[155:]
    other = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(300))
    assert find([chinese, other, edited], scratch).original.tolist() == [-1, -1, 0]


def test_nothing_to_do(scratch: Path) -> None:
    assert fingerprints([]).shape == (0,)
    for near in (False, True):
        for parts in ([], [fingerprints([])], [fingerprints([]), fingerprints(["a"])]):
            found = find_duplicates(parts, scratch, near=near)
            assert (found.original == -1).all()
            assert len(found.original) == sum(map(len, parts))
            assert found.largest == []
    assert list(scratch.iterdir()) == []


def test_fingerprints_of_another_layout_are_refused(scratch: Path) -> None:
    with pytest.raises(ValueError, match=r"fingerprints: found uint64 .* make them again"):
        find_duplicates([np.zeros(3, np.uint64)], scratch, near=True)
    assert list(scratch.iterdir()) == []


def test_progress_adds_up(scratch: Path) -> None:
    parts = [fingerprints(random_words(30, 7)), fingerprints(random_words(12, 8))]
    for near, total in ((False, 42), (True, 42 * (1 + BANDS))):
        told: list[int] = []
        find_duplicates(parts, scratch, near=near, progress=told.append)
        assert sum(told) == total


def test_a_fingerprint_is_pinned() -> None:
    """Sets that grow compare with fingerprints made long ago, on another machine: these may never
    change."""
    made = fingerprints(["The quick brown fox jumps over the lazy dog, and 敏捷的棕毛狐狸 too."])[0]
    assert [f"{half:016x}" for half in made["exact"]] == ["6bf30c4a618262b1", "f889372d523892f4"]
    assert (
        f"{made['bands'][0]:016x} {made['bands'][-1]:016x}" == "5f1fba8f7fd0e927 c1d54ad73365ba62"
    )
    assert made["signature"].tobytes().hex()[:32] == "873255f8cfdf090ff14f9c026a500278"


def test_threads_and_kernels_do_not_matter() -> None:
    code = (
        "import hashlib, random; from data_prep.dedup import fingerprints; rng = random.Random(0)\n"
        "texts = [' '.join(str(rng.randrange(99)) for _ in range(rng.randrange(900))) for _ in "
        "range(600)]\n"
        "print(hashlib.sha256(fingerprints(texts).tobytes()).hexdigest())"
    )
    settings_of = (
        {"RAYON_NUM_THREADS": "1", "RENSA_FORCE_KERNEL": "scalar"},
        {"RAYON_NUM_THREADS": "4"},
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | env, check=True, capture_output=True
        ).stdout
        for env in settings_of
    ]
    assert printed[0] == printed[1]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(), max_size=8))
def test_any_text_has_a_fingerprint_of_its_own(texts: list[str]) -> None:
    together = fingerprints(texts)
    assert together.dtype == FINGERPRINT
    for number, text in enumerate(texts):
        assert fingerprints([text])[0] == together[number]


def test_lone_surrogates_and_long_documents_among_others() -> None:
    words = random_words(60_000, 9)
    long = " ".join(words)
    texts = ["a \ud800 b", long, "\x00", "x" * 400_000, long + " end", "中" * 300_000]
    together = fingerprints(texts)
    for number, text in enumerate(texts):
        assert fingerprints([text])[0] == together[number]
    assert similarity(together[1], together[4]) > 0.95
    # Punctuation moves the places where a long text is cut, and must not matter.
    assert (fingerprints([", ".join(words)])["bands"] == together[1]["bands"]).all()


few = st.text(st.sampled_from("aAbß1٣é .-,\n\t\u00ad\u2003中あไ"), max_size=30)


@settings(max_examples=500, deadline=None)
@given(few, few, st.integers(0, 30))
def test_minhashes_are_equal_when_the_shingles_are(a: str, b: str, place: int) -> None:
    for other in (b, a[:place] + "-" + a[place:], a.upper(), a + b):
        if plain_shingles(a) == {()} or plain_shingles(other) == {()}:
            continue
        first, second = fingerprints([a, other])
        same = (first["bands"] == second["bands"]).all() and (
            first["signature"] == second["signature"]
        ).all()
        assert same == (plain_shingles(a) == plain_shingles(other))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=5),
    memory_bytes=st.sampled_from([500, 2000, 6000]),
)
def test_neither_parts_nor_memory_change_the_result(
    seed: int, count: int, cuts: list[int], memory_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    families = synthetic(rng, 6)
    made = families[rng.integers(0, 6, count)]
    # Relatives of every degree, about the threshold.
    differs = rng.random((count, PERMUTATIONS)) < rng.random((count, 1)) * 0.3
    made["signature"] = np.where(differs, rng.integers(0, 256, differs.shape), made["signature"])
    alone = rng.random((count, BANDS)) < 0.7
    made["bands"] = np.where(
        alone, rng.integers(0, 2**64, alone.shape, dtype=np.uint64), made["bands"]
    )
    made["exact"][:, 0] = rng.integers(0, count, count)
    with tempfile.TemporaryDirectory() as folder:
        found = find_duplicates([made], Path(folder), near=True)
        other = find_duplicates(
            np.split(made, sorted(cuts)), Path(folder), near=True, memory_bytes=memory_bytes
        )
    assert (found.original == other.original).all()
    assert (found.exact, found.near, found.clusters, found.largest) == (
        other.exact,
        other.near,
        other.clusters,
        other.largest,
    )
    assert found.exact + found.near == (found.original >= 0).sum()
    for number in np.flatnonzero(found.original >= 0):
        stays = found.original[number]
        assert stays < number
        assert found.original[stays] == -1
    firsts = {
        tuple(key): number for number, key in reversed(list(enumerate(made["exact"].tolist())))
    }
    near = [number for number in firsts.values() if found.original[number] >= 0]
    assert len(near) == found.near
    assert all(similarity(made[number], made[found.original[number]]) >= 0.7 for number in near)


def synthetic(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(count * FINGERPRINT.itemsize), FINGERPRINT).copy()


def test_a_bucket_of_equal_documents_is_linear(scratch: Path) -> None:
    count = 50_000
    made = np.repeat(fingerprints(["one and the same text, but for its punctuation"]), count)
    made["exact"][:, 0] = np.arange(count)
    found = find_duplicates([made], scratch, near=True)
    assert (found.exact, found.near, found.largest) == (0, count - 1, [(count, 0)])
    assert found.compared <= (BANDS + 1) * count


def test_a_bucket_of_unlike_documents_is_linear(scratch: Path) -> None:
    count = 3000
    made = synthetic(np.random.default_rng(10), count)
    made["bands"][:, 3] = 7
    made[count - 1] = made[0]
    made[count - 1]["exact"] = 0
    found = find_duplicates([made], scratch, near=True)
    assert np.flatnonzero(found.original >= 0).tolist() == [count - 1]
    assert found.compared <= 130 * count


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_bounded(scratch: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from data_prep.dedup import FINGERPRINT, find_duplicates
from testbed.peak import peak_kb

connected_components(coo_array((2, 2)))

def parts():
    for part in range(100):
        size = 3000 * FINGERPRINT.itemsize
        make = lambda part: np.frombuffer(np.random.default_rng(part).bytes(size), FINGERPRINT)
        made = make(part).copy()
        if part:  # some are like documents of the part before
            made[-100:] = make(part - 1)[:100]
            made["exact"][-100:, 0] = np.arange(100 * part, 100 * part + 100)
        yield made

for part in parts():
    pass
before = peak_kb()
small = find_duplicates(parts(), Path(sys.argv[1]), near=True, memory_bytes=8 << 20)
print(small.near, (peak_kb() - before) / 1024)
large = find_duplicates(parts(), Path(sys.argv[1]), near=True)
print((small.original == large.original).all(), (peak_kb() - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, scratch], check=True, capture_output=True, text=True
    ).stdout
    near, used, same, unbounded = done.split()
    assert (near, same) == ("9900", "True")
    # 300,000 fingerprints are 94 MB; what stays in memory are 2.4 MB of result and 9,900 links.
    assert float(used) < 17 < float(unbounded)


def test_a_long_chain_is_not_quadratic(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is like the one before and after it alone, so that one cluster holds all and every
    second one stays."""
    count = 600
    made = synthetic(np.random.default_rng(3), count)
    numbers, bytes_of = (
        np.arange(count),
        np.random.default_rng(4).integers(0, 256, (128, count), dtype=np.uint8),
    )
    for slot in range(PERMUTATIONS):
        made["signature"][:, slot] = bytes_of[slot, (numbers + slot) // 4 % count]
    for band in (0, 1):
        made["bands"][:, band] = (numbers + band) // 2
    found = find_duplicates([made], scratch, near=True)
    assert found.original.tolist() == [-1, 0] + [
        n if odd else -1 for n in range(2, count, 2) for odd in (0, 1)
    ]
    assert found.compared > count**2 // 5
    monkeypatch.setattr(dedup, "_COMPARISONS", 20 * count)
    monkeypatch.setattr(dedup, "_BUCKET_ROUNDS", 4)
    bounded = find_duplicates([made], scratch, near=True)
    assert bounded.near == 20
    assert bounded.compared < 25 * count

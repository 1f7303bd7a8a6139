"""Rules that a document must pass: read from a YAML file, applied in its order, counted by name.

    rules:
      - normalize: {form: NFC}
      - gopher_quality: {min_words: 50}

The rules and their settings are in rules.py.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from data_prep.clean.page import Page
from data_prep.clean.rules import RULES, Decontaminate, Settings
from data_prep.files import sha256_of
from data_prep.identity import text_hash
from data_prep.words import closest, problems_of

SAMPLES = 3
EXCERPT = 500
TEST_FILES = (".txt", ".jsonl")


class CleanVerdict(NamedTuple):
    """`text` is None if the `rule` dropped the document because of `detail`, else what the rules
    made of it."""

    text: str | None
    rule: str | None
    detail: str


class DroppedSample(NamedTuple):
    """A document that a rule dropped: a hash of it, its beginning, and why."""

    rank: int
    text: str
    detail: str


@dataclass
class RuleStats:
    """Of one rule: documents that reached it, that it changed, that it dropped; `counts` of what in
    it acted how often (drops by measure, masks by kind, lines by fault); up to SAMPLES of the
    dropped ones, those of the smallest hash."""

    seen: int = 0
    changed: int = 0
    dropped: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[DroppedSample] = field(default_factory=list)

    def merge(self, other: "RuleStats") -> None:
        self.seen += other.seen
        self.changed += other.changed
        self.dropped += other.dropped
        self.counts.update(other.counts)
        self.samples = sorted({*self.samples, *other.samples})[:SAMPLES]


@dataclass
class CleanStats:
    """What rules did, by name and in order. Parts merged in any order give the same."""

    rules: dict[str, RuleStats] = field(default_factory=dict)

    def merge(self, other: "CleanStats") -> None:
        """Add what another part of the corpus gave."""
        for name, stats in other.rules.items():
            self.rules.setdefault(name, RuleStats()).merge(stats)

    def dropped(self) -> dict[str, int]:
        """Return how many documents were dropped, by rule."""
        return {name: stats.dropped for name, stats in self.rules.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values: {rule: {seen, changed, dropped, counts: {what: n}, samples: [{rank,
        text, detail}]}}."""
        return {
            name: {
                "seen": stats.seen,
                "changed": stats.changed,
                "dropped": stats.dropped,
                "counts": dict(sorted(stats.counts.items())),
                "samples": [sample._asdict() for sample in stats.samples],
            }
            for name, stats in self.rules.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CleanStats":
        """Return what `to_json` was called on."""
        rules = {
            name: RuleStats(
                stats["seen"],
                stats["changed"],
                stats["dropped"],
                Counter(stats["counts"]),
                [DroppedSample(**sample) for sample in stats["samples"]],
            )
            for name, stats in value.items()
        }
        return cls(rules)


@dataclass(frozen=True)
class CleanConfig:
    """Rules in order: the name and the settings of each."""

    rules: tuple[tuple[str, Settings], ...]

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of all that decides a verdict: rules, settings, and the content of
        the test files.

        Raises ValueError for a test file that cannot be read.
        """
        parts: list[Any] = []
        for name, settings in self.rules:
            values = settings.model_dump(mode="json")
            if isinstance(settings, Decontaminate):
                values["files"] = [_sha256(Path(file)) for file in settings.files]
            parts.append([name, values])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cleaner:
    """The rules, ready to be applied; one a worker process.

    Raises ValueError for a test file of `decontaminate` that cannot be read.
    """

    def __init__(self, config: CleanConfig) -> None:
        self._rules = [(name, RULES[name][1](settings)) for name, settings in config.rules]

    def __call__(self, text: str, stats: CleanStats) -> CleanVerdict:
        """Apply the rules to a document, and count in `stats`."""
        for name, _ in self._rules:
            stats.rules.setdefault(name, RuleStats())
        page = Page(text)
        for name, rule in self._rules:
            counted = stats.rules[name]
            counted.seen += 1
            outcome = rule(page)
            if outcome.counts:
                counted.counts.update(outcome.counts)
            if outcome.text == page.text:
                continue
            if not outcome.text:
                detail = outcome.detail or "nothing is left of it"
                rank = text_hash(page.text.encode("utf-8", "surrogatepass"), "dropped")
                counted.merge(
                    RuleStats(dropped=1, samples=[DroppedSample(rank, page.text[:EXCERPT], detail)])
                )
                return CleanVerdict(None, name, detail)
            counted.changed += 1
            page = Page(outcome.text)
        return CleanVerdict(page.text, None, "")


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are truth values: to YAML 1.1 `no`, Norwegian, is false."""


_Loader.yaml_implicit_resolvers = {
    letter: [
        resolver
        for resolver in resolvers
        if letter in "tTfF" or resolver[0] != "tag:yaml.org,2002:bool"
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_rules(path: Path) -> CleanConfig:
    """Read a YAML file of rules. The files of `decontaminate` are found from its folder.

    Raises ValueError naming the file, the field, what was found and what was expected.
    """
    try:
        value = yaml.load(Path(path).read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read the cleaning rules: {error.strerror}; check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not YAML ({' '.join(str(error).split())}); correct it"
        ) from error
    if not isinstance(value, dict) or list(value) != ["rules"]:
        found = (
            f"the fields {', '.join(map(str, value))}"
            if isinstance(value, dict)
            else f"{value!r:.60}"
        )
        raise ValueError(f"{path}: found {found}, expected one field, rules, with a list of rules")
    if not isinstance(value["rules"], list):
        raise ValueError(
            f"{path}: rules: found {value['rules']!r:.60}, expected a list such as `- normalize: "
            f"{{}}`"
        )
    rules: dict[str, Settings] = {}
    for number, entry in enumerate(value["rules"]):
        where = f"{path}: rules.{number}"
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(
                f"{where}: found {entry!r:.60}, expected one rule and its settings, as `normalize: "
                f"{{}}`"
            )
        [(name, settings)] = entry.items()
        if name not in RULES:
            near = closest(str(name), RULES)
            hint = f"did you mean {near}?" if near else f"expected one of {', '.join(RULES)}"
            raise ValueError(f"{where}: found the rule {name!r:.60}, which there is not; {hint}")
        if name in rules:
            raise ValueError(
                f"{where}: found {name} again, expected each rule once; remove one of them"
            )
        given = {} if settings is None else settings
        rules[name] = _settings(f"{where}.{name}", RULES[name][0], given, Path(path).parent)
    return CleanConfig(tuple(rules.items()))


def _settings(where: str, model: type[Settings], value: object, folder: Path) -> Settings:
    try:
        settings = model.model_validate(value)
    except ValidationError as error:
        first = problems_of(error)[0]
        place = ".".join([where, *first.field])
        if first.kind == "extra_forbidden":
            near = closest(first.field[-1], model.model_fields)
            fields = ", ".join(model.model_fields) or "no fields"
            hint = f"did you mean {near}?" if near else f"expected {fields}"
            raise ValueError(f"{place}: found a field that there is not; {hint}") from error
        if first.kind == "missing":
            raise ValueError(f"{place}: missing, and has no default; add it") from error
        found = f"{first.found!r:.60}"
        raise ValueError(f"{place}: {first.message}, found {found}; correct it") from error
    if isinstance(settings, Decontaminate):
        files = [
            file
            for pattern in settings.files
            for file in _test_files(f"{where}.files", folder, pattern)
        ]
        return settings.model_copy(update={"files": list(dict.fromkeys(files))})
    return settings


def _test_files(where: str, folder: Path, pattern: str) -> list[str]:
    place = folder.absolute() / Path(pattern).expanduser()
    found = sorted(glob.glob(str(place), recursive=True))  # noqa: PTH207 (a pattern may be absolute)
    if not found:
        raise ValueError(
            f"{where}: no file matches {pattern!r} in {folder}; expected .txt or .jsonl test files "
            "there"
        )
    for file in found:
        if not file.endswith(TEST_FILES):
            raise ValueError(
                f"{where}: found {file}, expected .txt or .jsonl; narrow the pattern {pattern!r}"
            )
    return found


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read the test file: {error.strerror}; check decontaminate.files"
        ) from error

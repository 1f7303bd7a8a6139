"""report.html and report.json: what a person opens to judge a prepared set, stage by stage and
source by source."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from data_prep.read.documents import KINDS
from data_prep.report.markup import visible
from data_prep.set_files import Count
from data_prep.words import counted, percent, rate, ratio, size

EXCERPT_CHARS = 500
SUMMARY_NOTES = 4
# findings that leave a record out before it is a document; no cleaning rule has such a name
UNREADABLE = (
    "malformed_json",
    "no_text",
    "other_encoding",
    "not_text",
    "stand_in",
    "other_json",
    "empty",
)

# findings of single lines and rows, which have a line of their own on the screen
LINES = ("malformed_json", "empty_line")


def _shortened(value: object) -> object:
    """Cut a text to EXCERPT_CHARS characters, with lone surrogates, which no file can hold,
    escaped."""
    if not isinstance(value, str):
        return value
    text = value[: EXCERPT_CHARS + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


ReportText = Annotated[str, BeforeValidator(_shortened)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(_Model):
    """The beginning of a document that stayed."""

    place: ReportText
    text: ReportText


class SourceReport(_Model):
    """One INPUT. Counts are of documents; `read` and `read_bytes` (UTF-8) before cleaning,
    `documents` and what follows after it and without duplicates. `findings` are by kind, and
    `named` is where the first of each is; `dropped` and `changed` are by rule.

    `byte_lengths[i]` and `token_lengths[i]` count the kept documents of 2**i to 2**(i+1) - 1 bytes
    and tokens.
    """

    name: ReportText
    files: Count
    read: Count
    read_bytes: Count
    findings: dict[ReportText, Count]
    named: dict[ReportText, ReportText] = {}
    dropped: dict[ReportText, Count]
    changed: dict[ReportText, Count]
    exact: Count
    near: Count
    documents: Count
    text_bytes: Count
    tokens: Count
    byte_lengths: tuple[Count, ...]
    token_lengths: tuple[Count, ...]
    examples: tuple[Example, ...]


class SampleReport(_Model):
    """The beginning of a document that a rule dropped, and why."""

    text: ReportText
    detail: ReportText


class RuleReport(_Model):
    """Documents that a cleaning rule saw, changed and dropped."""

    seen: Count
    changed: Count
    dropped: Count
    samples: tuple[SampleReport, ...]


class DuplicateExample(_Model):
    """A kept and a dropped document (places and beginnings) and the estimated Jaccard similarity of
    their shingles."""

    kept: ReportText
    dropped: ReportText
    similarity: Annotated[float, Field(ge=0, le=1)]
    kept_text: ReportText
    dropped_text: ReportText


class DuplicateReport(_Model):
    """Documents left out as copies; `largest` holds (documents in the cluster, place of the kept
    one)."""

    exact: Count
    near: Count
    clusters: Count
    largest: tuple[tuple[Count, ReportText], ...]
    examples: tuple[DuplicateExample, ...]


class TokenizerReport(_Model):
    """`kind` and `sample_bytes` are null for a tokenizer that was given; `round_trip`: all that was
    checked came back exactly."""

    kind: ReportText | None
    vocab_size: Count
    sample_bytes: Count | None
    encoder: ReportText
    checked_documents: Count
    checked_bytes: Count
    round_trip: bool


class SplitReport(_Model):
    """Train or val; `padding` counts token positions of its rows that are not predicted."""

    documents: Count
    text_bytes: Count
    tokens: Count
    rows: Count
    shards: Count
    shard_bytes: Count
    padding: Count


class Reject(_Model):
    """A finding: line 0 is the whole file; `raw` is what stood there."""

    kind: ReportText
    file: ReportText
    line: Count
    action: ReportText
    detail: ReportText = ""
    raw: ReportText = ""


class Report(_Model):
    """All of report.json. Texts are cut to EXCERPT_CHARS characters; `rules` are in order of
    application."""

    name: ReportText
    options: dict[ReportText, ReportText | int | FiniteFloat | bool | None]
    sources: tuple[SourceReport, ...]
    rules: dict[ReportText, RuleReport]
    duplicates: DuplicateReport | None
    tokenizer: TokenizerReport
    splits: dict[ReportText, SplitReport]
    rejects: tuple[Reject, ...]


Stage = Literal["unreadable", "rules", "exact", "near", "other", "kept"]
STAGES: dict[Stage, str] = {
    "kept": "kept",
    "unreadable": "unreadable",
    "rules": "dropped by rules",
    "exact": "exact duplicates",
    "near": "near duplicates",
    "other": "left out otherwise",
}


class Step(NamedTuple):
    """Documents that leave the funnel at one stage, by rule where it has several."""

    stage: Stage
    label: str
    lost: int


def funnel(report: Report, sources: Sequence[SourceReport]) -> list[Step]:
    """Return where records of the sources went, in the order in which they are left out; what
    stayed last."""
    findings: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for source in sources:
        findings.update(source.findings)
        dropped.update(source.dropped)
    steps = [Step("unreadable", kind, findings[kind]) for kind in UNREADABLE if findings[kind]]
    names = dict.fromkeys([*report.rules, *dropped])
    steps += [Step("rules", name, dropped[name]) for name in names if name not in UNREADABLE]
    if report.duplicates:
        steps.append(Step("exact", "exact duplicates", sum(source.exact for source in sources)))
        steps.append(Step("near", "near duplicates", sum(source.near for source in sources)))
    kept = sum(source.documents for source in sources)
    lost = sum(step.lost for step in steps if step.stage != "unreadable")
    if rest := sum(source.read for source in sources) - lost - kept:
        steps.append(Step("other", "left out otherwise", rest))
    return [*steps, Step("kept", "kept", kept)]


def count_by_stage(steps: Sequence[Step]) -> dict[Stage, int]:
    """Return how many documents leave a funnel at each stage."""
    return {stage: sum(step.lost for step in steps if step.stage == stage) for stage in STAGES}


def find_notes(report: Report) -> list[str]:
    """Return what somebody who is about to train on the set should look at first, a line each."""
    found, named = Counter[str](), dict[str, str]()
    for source in report.sources:
        found.update(source.findings)
        named = dict(source.named) | named
    lines = [line] if (line := format_left_out(found, named)) else []
    if not report.tokenizer.round_trip:
        lines.append(
            "The tokenizer does not give back the exact text of every document that was checked"
        )
    if "val" not in report.splits:
        lines.append("There is no validation split")
    for name, rule in report.rules.items():
        if rule.dropped > 0.5 * rule.seen:
            of_seen = f"of the {rule.seen:,} documents it saw"
            lines.append(f"Rule {name} dropped {rule.dropped:,} {of_seen}")
    for source in report.sources:
        lines += _source_notes(report, source)
    for name, split in report.splits.items():
        if split.padding > 0.1 * (split.tokens + split.padding):
            share = percent(split.padding, split.tokens + split.padding)
            lines.append(f"{share} of the {name} rows is padding")
    return lines


def _source_notes(report: Report, source: SourceReport) -> list[str]:
    """Return what is odd about a source, a line each."""
    lines, name = [], f'"{source.name}"'
    count = count_by_stage(funnel(report, [source]))
    if not source.documents:
        lines.append(f"Nothing of {name} is left")
    elif count["exact"] + count["near"] > 0.5 * source.read:
        lines.append(f"Most of {name} is duplicates")
    unreadable, records = count["unreadable"], sum(count.values())
    if unreadable > 0.01 * records:
        lines.append(f"{unreadable:,} of {records:,} records of {name} were unreadable")
    text_bytes = sum(each.text_bytes for each in report.sources)
    whole = ratio(text_bytes, sum(each.tokens for each in report.sources))
    if source.tokens and source.text_bytes < 0.6 * whole * source.tokens:
        here = rate(source.text_bytes, source.tokens)
        lines.append(
            f"Text of {name} takes a token for every {here} bytes, the whole set for {whole:.2f}"
        )
    return lines


def format_left_out(found: Mapping[str, int], named: Mapping[str, str]) -> str:
    """Return what of the input was left out, single bad lines aside, kind by kind, the largest
    first; "" for nothing.

    `named` is where the first of each kind is.
    """

    def kinds(*actions: str) -> str:
        known = [
            (kind, count)
            for kind, count in found.items()
            if kind in KINDS and kind not in LINES and count
        ]
        chosen = sorted((-count, kind) for kind, count in known if KINDS[kind][0] in actions)
        return ", ".join(f"{-count:,} {kind}{example(kind, -count)}" for count, kind in chosen)

    def example(kind: str, count: int) -> str:
        where = named.get(kind, "")
        return f" ({'such as ' if count > 1 else ''}{where})" if where else ""

    left = kinds("dropped", "passed over")
    beside = found.get("beside_data", 0)
    parts = [f"left out: {left}"] if left else []
    if beside:
        parts.append(
            f"read as documents: {counted(beside, 'text file')} beside "
            f"data{example('beside_data', beside)}"
        )
    return "; ".join(parts)


def format_summary(report: Report) -> str:
    """Return six to twelve lines for a terminal, without control characters: the funnel, the
    tokenizer, the splits."""
    steps = funnel(report, report.sources)
    count = count_by_stage(steps)
    found, kept = sum(count.values()), count["kept"]
    read_bytes, text_bytes, tokens, files = (
        sum(getattr(source, name) for source in report.sources)
        for name in ("read_bytes", "text_bytes", "tokens", "files")
    )
    lines = [
        ("found", f"{counted(found, 'document')}, {size(read_bytes)}, in {counted(files, 'file')}")
    ]
    if count["unreadable"]:
        lines.append(("", f"-{count['unreadable']:,} unreadable: {_losses(steps, 'unreadable')}"))
    if count["rules"]:
        lines.append(("rules", f"-{count['rules']:,}: {_losses(steps, 'rules')}"))
    else:
        lines.append(("rules", "dropped nothing" if report.rules else "none"))
    if report.duplicates:
        clusters = counted(report.duplicates.clusters, "cluster")
        lines.append(
            ("copies", f"-{count['exact']:,} exact, -{count['near']:,} near, in {clusters}")
        )
    else:
        lines.append(("copies", "not looked for"))
    lines.append(
        ("kept", f"{counted(kept, 'document')} ({percent(kept, found)}), {size(text_bytes)}")
    )
    tokenizer = report.tokenizer
    exact = "round trip exact" if tokenizer.round_trip else "round trip NOT exact"
    model = f"{tokenizer.kind or 'given'}, {tokenizer.vocab_size:,} pieces, {exact}"
    lines.append(("tokens", f"{tokens:,}, {rate(text_bytes, tokens)} bytes a token ({model})"))
    for name, split in report.splits.items():
        line = (
            f"{counted(split.documents, 'document')}, {counted(split.rows, 'row')}, "
            f"{counted(split.shards, 'shard')}"
        )
        padding = percent(split.padding, split.tokens + split.padding)
        lines.append((name, f"{line}, {padding} padding" if split.padding else line))
    lines += [("note", line) for line in find_notes(report)[:SUMMARY_NOTES]]
    return "\n".join(visible(f"{name:9} {line}").replace("\n", " ") for name, line in lines)


def _losses(steps: Sequence[Step], stage: Stage) -> str:
    losses = sorted(
        (step for step in steps if step.stage == stage and step.lost), key=lambda step: -step.lost
    )
    return ", ".join(f"{step.label} {step.lost:,}" for step in losses)

"""report.html: what stands in its tables and plots. Its layout is in page.html.j2."""

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.report.markup import (
    ByteSize,
    Cell,
    Excerpt,
    Line,
    Plot,
    Scaled,
    Strong,
    Table,
    bar,
    excerpt,
    histogram,
    table,
    templates,
)
from data_prep.report.models import (
    STAGES,
    Report,
    SourceReport,
    Stage,
    count_by_stage,
    find_notes,
    funnel,
)
from data_prep.words import counted, percent, rate, ratio, scaled

OPEN_SOURCES = 8
SECTIONS = (
    "Where the documents went",
    "Sources",
    "Cleaning rules",
    "Duplicates",
    "Findings in the input",
    "Tokenizer",
    "Splits",
    "Options",
)
FINDINGS = {
    "broken_utf8": "bytes that are not UTF-8 became U+FFFD",
    "lone_surrogate": "half a surrogate pair became U+FFFD",
    "nul": "NUL characters, kept",
    "byte_order_mark": "byte order mark, kept in text",
    "crlf": "Windows line ends, kept",
    "empty": "documents without text, left out",
    "empty_line": "blank lines between JSON records, passed over",
    "malformed_json": "lines that are not JSON, left out",
    "no_text": "records without a string in the text field, left out",
    "cut": "documents too large to hold, cut into several",
    "utf16": "files in UTF-16 with a byte order mark, read as such",
    "utf32": "files in UTF-32 with a byte order mark, read as such",
    "other_encoding": "texts of which much is not UTF-8, left out: convert them (iconv)",
    "not_text": "packed or binary content under the name of a text, left out",
    "stand_in": "files that only stand for another (a pointer, a server's error page), "
    "left out: fetch the real ones",
    "other_json": "JSON that holds no text in the text field, left out: --text-field names another",
    "trailing_bytes": "compressed files with bytes after their end, which are left out",
    "other_suffix": "files of another kind, passed over; name them or a glob to have them "
    "read as text",
    "card": "README, licence and the like beside data, passed over; name them to have them read",
    "hidden": "files and folders whose name begins with a dot, passed over",
    "prepared_set": "folders that hold a prepared set, not entered",
    "dead_link": "links to what is not there, passed over",
    "not_a_file": "pipes, sockets and devices, passed over",
    "beside_data": "text files beside JSON lines or parquet, read as documents",
}


def write_report(folder: Path, report: Report) -> None:
    """Write report.json and report.html into the folder; the same report gives the same bytes.
    Raises OSError."""
    text = json.dumps(report.model_dump(mode="json"), ensure_ascii=True, indent=1)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """Render the whole page: nothing on it runs or is fetched, and whatever came from the corpus is
    escaped."""
    byte_span = _span([source.byte_lengths for source in report.sources])
    token_span = _span([source.token_lengths for source in report.sources])
    stages = _stages(report)
    several = len(report.sources) > 1
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            anchors={heading: heading.split()[-1].lower() for heading in SECTIONS},
            headline=_headline(report),
            notes=find_notes(report),
            funnel=_funnel(report),
            fates=_fates(report, stages),
            legend=[(stage, STAGES[stage]) for stage in stages],
            amounts=_amounts(report),
            all_lengths=_lengths(report.sources, byte_span, token_span) if several else None,
            sources=[_source(source, byte_span, token_span) for source in report.sources],
            unfolded=len(report.sources) <= OPEN_SOURCES,
            rules=_rules(report),
            largest=_largest(report),
            pairs=_pairs(report),
            findings=_findings(report),
            rejects=_rejects(report),
            tokenizer=_tokenizer(report),
            splits=_splits(report),
            options=[(name, _plain(value)) for name, value in report.options.items()],
            excerpt=excerpt,
        )
    )


def _headline(report: Report) -> list[tuple[str, Cell]]:
    """Return the tiles at the top of the page: labels and values."""
    count = count_by_stage(funnel(report, report.sources))
    found = sum(count.values())
    text_bytes = sum(source.text_bytes for source in report.sources)
    tokens = sum(source.tokens for source in report.sources)
    return [
        ("tokens", Scaled(scaled(tokens, ("", "K", "M", "B", "T")), f"{tokens:,}")),
        ("of text", ByteSize(text_bytes)),
        ("documents", count["kept"]),
        (f"of {counted(found, 'document')} found", percent(count["kept"], found)),
        ("bytes a token", rate(text_bytes, tokens)),
        ("pieces of vocabulary", report.tokenizer.vocab_size),
    ]


def _funnel(report: Report) -> Table:
    """Return how many documents each stage left out of those that reached it."""
    steps = funnel(report, report.sources)
    found = left = sum(step.lost for step in steps)
    whole = bar(("kept", float(found > 0), f"{found:,}"))
    rows: list[list[Cell]] = [["found", whole, "", "", found]]
    for stage, label, lost in steps[:-1]:
        left -= lost
        parts = bar(
            ("kept", ratio(left, found), f"{left:,} left"),
            (stage, ratio(lost, found), f"{lost:,} left out"),
        )
        rows.append([label, parts, -lost, percent(lost, found) if lost else "", left])
    kept = bar(("kept", ratio(left, found), f"{left:,} kept"))
    rows.append(["kept", kept, "", "", Strong(left)])
    return table("lwrrr", ["stage", "", "left out", "", "left"], rows)


def _stages(report: Report) -> list[Stage]:
    """Return the stages that left something out, and those that looked for something to."""
    total = count_by_stage(funnel(report, report.sources))
    looked: tuple[Stage, ...] = ("kept", "exact", "near") if report.duplicates else ("kept",)
    return [stage for stage in STAGES if total[stage] or stage in looked]


def _fates(report: Report, stages: Sequence[Stage]) -> Table:
    """Return how many documents of each source every stage left out."""
    rows: list[list[Cell]] = []
    for source in report.sources:
        count = count_by_stage(funnel(report, [source]))
        found = sum(count.values())
        parts = [
            (stage, ratio(count[stage], found), f"{STAGES[stage]}: {count[stage]:,}")
            for stage in stages
        ]
        rows.append([source.name, bar(*parts), found, *(count[stage] for stage in stages)])
    head = ["source", "documents", "found", *(STAGES[stage] for stage in stages)]
    return table("lwr" + "r" * len(stages), head, rows)


def _amounts(report: Report) -> Table:
    """Return the text and the tokens that each source gives to the set."""
    tokens = sum(source.tokens for source in report.sources)
    densest = max((ratio(source.text_bytes, source.tokens) for source in report.sources), default=0)
    rows: list[list[Cell]] = []
    for source in report.sources:
        each = rate(source.text_bytes, source.tokens)
        share = percent(source.tokens, tokens)
        dense = ratio(ratio(source.text_bytes, source.tokens), densest)
        rows.append(
            [
                source.name,
                ByteSize(source.text_bytes),
                source.tokens,
                bar(("kept", ratio(source.tokens, tokens), f"{share} of the tokens")),
                share,
                bar(("kept", dense, f"{each} bytes a token")),
                each,
            ]
        )
    head = ["source", "text", "tokens", "share of tokens", "", "bytes a token", ""]
    return table("lrrwrwr", head, rows)


def _source(
    source: SourceReport, byte_span: tuple[int, int], token_span: tuple[int, int]
) -> dict[str, Any]:
    """Return what the box of a source holds: its summary, facts, plots and examples."""
    lines: list[tuple[str, Cell]] = [
        ("read", Line((counted(source.read, "document"), ", ", ByteSize(source.read_bytes)))),
        ("files", source.files),
    ]
    for name, counts in (
        ("dropped", source.dropped),
        ("changed", source.changed),
        ("findings", source.findings),
    ):
        if any(counts.values()):
            listed = (f"{kind} {count:,}" for kind, count in counts.items() if count)
            lines.append((name, ", ".join(listed)))
    return {
        "summary": f"{source.name}: {counted(source.documents, 'document')} kept",
        "facts": lines,
        "lengths": _lengths([source], byte_span, token_span) if source.documents else None,
        "examples": source.examples,
    }


def _lengths(
    sources: Sequence[SourceReport], byte_span: tuple[int, int], token_span: tuple[int, int]
) -> list[tuple[str, Plot]]:
    """Plot how long the kept documents are, in bytes and in tokens; with a caption each."""
    documents = sum(source.documents for source in sources)
    plots = []
    for unit, span, total, lengths in (
        ("bytes", byte_span, sum(s.text_bytes for s in sources), [s.byte_lengths for s in sources]),
        ("tokens", token_span, sum(s.tokens for s in sources), [s.token_lengths for s in sources]),
    ):
        counts = [sum(column) for column in itertools.zip_longest(*lengths, fillvalue=0)]
        mean = f"{ratio(total, documents):,.0f} on average"
        caption = f"documents by length in {unit}, {mean}"
        plots.append((caption, histogram(counts, *span, unit)))
    return plots


def _rules(report: Report) -> Table:
    """Return what each rule saw, changed and dropped."""
    most = max((rule.dropped for rule in report.rules.values()), default=0)
    rows: list[list[Cell]] = []
    for name, rule in report.rules.items():
        dropped = bar(("rules", ratio(rule.dropped, most), f"{rule.dropped:,} dropped"))
        share = percent(rule.dropped, rule.seen)
        rows.append([name, dropped, rule.dropped, share, rule.changed, rule.seen])
    return table("lwrrrr", ["rule", "", "dropped", "of seen", "changed", "seen"], rows)


def _largest(report: Report) -> Table:
    """Return the largest clusters of duplicates."""
    clusters = report.duplicates.largest if report.duplicates else ()
    most = max((count for count, _ in clusters), default=0)
    rows: list[list[Cell]] = [
        [place, bar(("near", ratio(count, most), f"{count:,} documents")), count]
        for count, place in clusters
    ]
    head = ["largest clusters, by the document that stayed", "", "documents"]
    return table("lwr", head, rows)


def _pairs(report: Report) -> list[tuple[Any, Excerpt, Excerpt]]:
    """Return the examples of duplicates, each with both texts and the words that differ marked."""
    examples = report.duplicates.examples if report.duplicates else ()
    return [(each, *differing(each.kept_text, each.dropped_text)) for each in examples]


def differing(left: str, right: str) -> tuple[Excerpt, Excerpt]:
    """Cut both texts into parts, and mark those that the other lacks."""
    ours, theirs = (re.findall(r"\s+|\S+", text) for text in (left, right))
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        for side, text in zip(sides, ("".join(ours[i:j]), "".join(theirs[k:m])), strict=True):
            if text:
                side.append((text, kind != "equal"))
    return Excerpt(tuple(sides[0])), Excerpt(tuple(sides[1]))


def _findings(report: Report) -> Table | None:
    """Return how often each kind was found; None where nothing was."""
    total: Counter[str] = Counter()
    for source in report.sources:
        total.update(source.findings)
    if not total.total() and not report.rejects:
        return None
    rows: list[list[Cell]] = [
        [kind, FINDINGS.get(kind, ""), count] for kind, count in total.most_common()
    ]
    return table("llr", ["finding", "what it means", "times"], rows)


def _rejects(report: Report) -> Table:
    """Return the first findings one by one."""
    rows: list[list[Cell]] = []
    for reject in report.rejects:
        place = f"{reject.file}, line {reject.line:,}" if reject.line else reject.file
        raw = excerpt(reject.raw) if reject.raw else ""
        rows.append([reject.kind, place, reject.action, reject.detail, raw])
    return table("lllll", ["finding", "where", "action", "detail", "what stood there"], rows)


def _tokenizer(report: Report) -> list[tuple[str, Cell]]:
    tokenizer = report.tokenizer
    model: Cell = "given"
    if tokenizer.kind:
        known = tokenizer.sample_bytes is not None
        sample: Cell = ByteSize(tokenizer.sample_bytes or 0) if known else "a sample"
        model = Line((f"{tokenizer.kind}, trained on ", sample, " of this text"))
    came_back = "the exact text came back"
    outcome = came_back if tokenizer.round_trip else "the exact text did NOT come back"
    checked = f"{outcome}: {counted(tokenizer.checked_documents, 'document')}, "
    text_bytes = sum(source.text_bytes for source in report.sources)
    tokens = sum(source.tokens for source in report.sources)
    return [
        ("model", model),
        ("vocabulary", f"{tokenizer.vocab_size:,} pieces"),
        ("encoder", tokenizer.encoder),
        ("compression", f"{rate(text_bytes, tokens)} bytes a token"),
        ("round trip", Line((checked, ByteSize(tokenizer.checked_bytes)))),
    ]


def _splits(report: Report) -> Table:
    head = ["split", "documents", "text", "tokens", "bytes a token", "rows", "padding", ""]
    rows: list[list[Cell]] = [
        [
            name,
            split.documents,
            ByteSize(split.text_bytes),
            split.tokens,
            rate(split.text_bytes, split.tokens),
            split.rows,
            split.padding,
            percent(split.padding, split.tokens + split.padding),
            split.shards,
            ByteSize(split.shard_bytes),
        ]
        for name, split in report.splits.items()
    ]
    return table("lrrrrrrrrr", [*head, "shards", "on disk"], rows)


def _span(lengths: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Return the powers of two that any document falls in, as a range of eight at least, for all
    plots to share."""
    powers = [place for counts in lengths for place, count in enumerate(counts) if count]
    low = min(powers, default=0)
    return low, max(max(powers, default=0) + 1, low + 8)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

"""report.html, section by section."""

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from data_prep.report.markup import (
    Cell,
    Child,
    bar,
    card,
    document,
    exact_size,
    excerpt,
    facts,
    folded,
    histogram,
    node,
    table,
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
    options: list[tuple[str, Child]] = [
        (name, _plain(value)) for name, value in report.options.items()
    ]
    sections = {
        "Where the documents went": _funnel(report),
        "Sources": _sources(report),
        "Cleaning rules": _rules(report),
        "Duplicates": _duplicates(report),
        "Findings in the input": _findings(report),
        "Tokenizer": _tokenizer(report),
        "Splits": _splits(report),
        "Options": card(facts(options)),
    }
    anchors = {heading: heading.split()[-1].lower() for heading in sections}
    links = [node("a", heading, href=f"#{anchors[heading]}") for heading in sections]
    parts: list[Child] = [node("h1", report.name), node("nav", *links), _headline(report)]
    if lines := find_notes(report):
        items = [node("li", line) for line in lines]
        parts.append(
            node("div", node("h3", "Worth a look"), node("ul", *items), class_="card notes")
        )
    for heading, content in sections.items():
        parts.append(node("section", node("h2", heading), content, id=anchors[heading]))
    return document(f"{report.name}: prepared set", *parts)


def _headline(report: Report) -> Element:
    count = count_by_stage(funnel(report, report.sources))
    found = sum(count.values())
    text_bytes = sum(source.text_bytes for source in report.sources)
    tokens = sum(source.tokens for source in report.sources)
    tiles: dict[str, Child] = {
        "tokens": node("span", scaled(tokens, ("", "K", "M", "B", "T")), title=f"{tokens:,}"),
        "of text": exact_size(text_bytes),
        "documents": f"{count['kept']:,}",
        f"of {counted(found, 'document')} found": percent(count["kept"], found),
        "bytes a token": rate(text_bytes, tokens),
        "pieces of vocabulary": f"{report.tokenizer.vocab_size:,}",
    }
    boxes = [
        node("div", node("b", value), node("small", label), class_="tile")
        for label, value in tiles.items()
    ]
    return node("div", *boxes, class_="tiles")


def _funnel(report: Report) -> Element:
    steps = funnel(report, report.sources)
    found = left = sum(step.lost for step in steps)
    rows: list[list[Cell]] = [
        ["found", bar(("kept", float(found > 0), f"{found:,}")), "", "", found]
    ]
    for stage, label, lost in steps[:-1]:
        left -= lost
        parts = bar(
            ("kept", ratio(left, found), f"{left:,} left"),
            (stage, ratio(lost, found), f"{lost:,} left out"),
        )
        rows.append([label, parts, f"{-lost:,}", percent(lost, found) if lost else "", left])
    rows.append(
        [
            "kept",
            bar(("kept", ratio(left, found), f"{left:,} kept")),
            "",
            "",
            node("b", f"{left:,}"),
        ]
    )
    note = (
        "What each stage left out of the documents that reached it. Shares are of all that were "
        "found."
    )
    return node(
        "div", node("p", note), card(table("lwrrr", ["stage", "", "left out", "", "left"], rows))
    )


def _sources(report: Report) -> Element:
    byte_span = _span([source.byte_lengths for source in report.sources])
    token_span = _span([source.token_lengths for source in report.sources])
    several = len(report.sources) > 1
    return node(
        "div",
        card(*_fates(report)),
        card(_amounts(report)),
        card(node("h3", "All sources"), _lengths(report.sources, byte_span, token_span))
        if several
        else None,
        *(
            _source(source, byte_span, token_span, len(report.sources) <= OPEN_SOURCES)
            for source in report.sources
        ),
    )


def _fates(report: Report) -> tuple[Element, Element]:
    """How many documents of each source every stage left out, and the legend of its bars."""
    total = count_by_stage(funnel(report, report.sources))
    looked: tuple[Stage, ...] = ("kept", "exact", "near") if report.duplicates else ("kept",)
    stages = [stage for stage in STAGES if total[stage] or stage in looked]
    rows: list[list[Cell]] = []
    for source in report.sources:
        count = count_by_stage(funnel(report, [source]))
        found = sum(count.values())
        parts = [
            (stage, ratio(count[stage], found), f"{STAGES[stage]}: {count[stage]:,}")
            for stage in stages
        ]
        rows.append([source.name, bar(*parts), found, *(count[stage] for stage in stages)])
    legend = [node("span", node("i", class_=stage), STAGES[stage]) for stage in stages]
    head = ["source", "documents", "found", *(STAGES[stage] for stage in stages)]
    return table("lwr" + "r" * len(stages), head, rows), node("div", *legend, class_="legend")


def _amounts(report: Report) -> Element:
    """Text and tokens that each source gives to the set."""
    tokens = sum(source.tokens for source in report.sources)
    most = max((ratio(source.text_bytes, source.tokens) for source in report.sources), default=0)
    rows: list[list[Cell]] = []
    for source in report.sources:
        each = rate(source.text_bytes, source.tokens)
        share = percent(source.tokens, tokens)
        dense = ratio(ratio(source.text_bytes, source.tokens), most)
        rows.append(
            [
                source.name,
                exact_size(source.text_bytes),
                source.tokens,
                bar(("kept", ratio(source.tokens, tokens), f"{share} of the tokens")),
                share,
                bar(("kept", dense, f"{each} bytes a token")),
                each,
            ]
        )
    return table(
        "lrrwrwr", ["source", "text", "tokens", "share of tokens", "", "bytes a token", ""], rows
    )


def _source(
    source: SourceReport, byte_span: tuple[int, int], token_span: tuple[int, int], unfolded: bool
) -> Element:
    lines: list[tuple[str, Child]] = [
        (
            "read",
            node("span", counted(source.read, "document"), ", ", exact_size(source.read_bytes)),
        ),
        ("files", f"{source.files:,}"),
    ]
    for name, counts in (
        ("dropped", source.dropped),
        ("changed", source.changed),
        ("findings", source.findings),
    ):
        if any(counts.values()):
            lines.append(
                (name, ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count))
            )
    plots = _lengths([source], byte_span, token_span) if source.documents else None
    texts = [
        part
        for example in source.examples
        for part in (node("h3", example.place), excerpt(example.text))
    ]
    folds = folded(f"How kept documents begin ({len(source.examples)})", *texts) if texts else None
    summary = node("summary", f"{source.name}: {counted(source.documents, 'document')} kept")
    box = node("details", summary, facts(lines), plots, folds, class_="card")
    if unfolded:
        box.set("open", "")
    return box


def _lengths(
    sources: Sequence[SourceReport], byte_span: tuple[int, int], token_span: tuple[int, int]
) -> Element:
    """How long the kept documents are, in bytes and in tokens."""
    documents = sum(source.documents for source in sources)
    figures = []
    for unit, span, total, lengths in (
        ("bytes", byte_span, sum(s.text_bytes for s in sources), [s.byte_lengths for s in sources]),
        ("tokens", token_span, sum(s.tokens for s in sources), [s.token_lengths for s in sources]),
    ):
        counts = [sum(column) for column in itertools.zip_longest(*lengths, fillvalue=0)]
        caption = f"documents by length in {unit}, {ratio(total, documents):,.0f} on average"
        figures.append(node("figure", node("figcaption", caption), histogram(counts, *span, unit)))
    return node("div", *figures, class_="pair")


def _rules(report: Report) -> Element:
    if not report.rules:
        return node("p", "The text was not cleaned.")
    most = max(rule.dropped for rule in report.rules.values())
    rows: list[list[Cell]] = []
    samples = []
    for name, rule in report.rules.items():
        dropped = bar(("rules", ratio(rule.dropped, most), f"{rule.dropped:,} dropped"))
        rows.append(
            [name, dropped, rule.dropped, percent(rule.dropped, rule.seen), rule.changed, rule.seen]
        )
        texts = [
            part
            for sample in rule.samples
            for part in (node("h3", sample.detail), excerpt(sample.text))
        ]
        if texts:
            samples.append(
                folded(f"{counted(len(rule.samples), 'document')} that {name} dropped", *texts)
            )
    head = ["rule", "", "dropped", "of seen", "changed", "seen"]
    note = "In the order in which they ran: a rule sees what those before it have kept."
    return node("div", node("p", note), card(table("lwrrrr", head, rows), *samples))


def _duplicates(report: Report) -> Element:
    copies = report.duplicates
    if copies is None:
        return node("p", "Duplicates were not looked for.")
    exact, near = (
        counted(copies.exact, "exact copy", "exact copies"),
        counted(copies.near, "near duplicate"),
    )
    note = node(
        "p",
        f"{exact} and {near} were left out, in {counted(copies.clusters, 'cluster')}. "
        "Of a cluster, the first document in reading order stayed.",
    )
    boxes = []
    if copies.largest:
        most = max(count for count, _ in copies.largest)
        rows: list[list[Cell]] = [
            [place, bar(("near", ratio(count, most), f"{count:,} documents")), count]
            for count, place in copies.largest
        ]
        boxes.append(
            card(
                table(
                    "lwr", ["largest clusters, by the document that stayed", "", "documents"], rows
                )
            )
        )
    pairs = []
    for example in copies.examples:
        kept, dropped = differing(example.kept_text, example.dropped_text)
        same = "These beginnings are equal; the texts differ further on, or not at all."
        pair = node(
            "div",
            node("div", node("h3", "kept: ", example.kept), excerpt(*kept)),
            node("div", node("h3", "left out: ", example.dropped), excerpt(*dropped)),
            class_="pair",
        )
        equal = node("p", same) if example.kept_text == example.dropped_text else None
        pairs.append(folded(f"{example.similarity:.2f} alike: {example.dropped}", equal, pair))
    if pairs:
        boxes.append(card(node("h3", "Examples, with the words that differ marked"), *pairs))
    return node("div", note, *boxes)


def differing(left: str, right: str) -> tuple[list[Child], list[Child]]:
    """Cut both texts into parts, and mark those that the other lacks."""
    ours, theirs = (re.findall(r"\s+|\S+", text) for text in (left, right))
    sides: tuple[list[Child], list[Child]] = ([], [])
    for kind, i, j, k, m in difflib.SequenceMatcher(
        None, ours, theirs, autojunk=False
    ).get_opcodes():
        for side, text in zip(sides, ("".join(ours[i:j]), "".join(theirs[k:m])), strict=True):
            side.append(node("mark", text) if text and kind != "equal" else text)
    return sides


def _findings(report: Report) -> Element:
    total: Counter[str] = Counter()
    for source in report.sources:
        total.update(source.findings)
    if not total.total() and not report.rejects:
        return node("p", "None: every record was read as it stood.")
    rows: list[list[Cell]] = [
        [kind, FINDINGS.get(kind, ""), count] for kind, count in total.most_common()
    ]
    rejects: list[list[Cell]] = []
    for reject in report.rejects:
        place = f"{reject.file}, line {reject.line:,}" if reject.line else reject.file
        rejects.append(
            [
                reject.kind,
                place,
                reject.action,
                reject.detail,
                excerpt(reject.raw) if reject.raw else "",
            ]
        )
    first = table("lllll", ["finding", "where", "action", "detail", "what stood there"], rejects)
    return node(
        "div",
        node("p", "With file and line in rejects.jsonl, beside this page."),
        card(
            table("llr", ["finding", "what it means", "times"], rows),
            folded(f"The first {len(rejects)}", first) if rejects else None,
        ),
    )


def _tokenizer(report: Report) -> Element:
    tokenizer = report.tokenizer
    model: Child = "given"
    if tokenizer.kind:
        sample = (
            exact_size(tokenizer.sample_bytes) if tokenizer.sample_bytes is not None else "a sample"
        )
        model = node("span", f"{tokenizer.kind}, trained on ", sample, " of this text")
    outcome = (
        "the exact text came back" if tokenizer.round_trip else "the exact text did NOT come back"
    )
    checked = counted(tokenizer.checked_documents, "document")
    text_bytes = sum(source.text_bytes for source in report.sources)
    tokens = sum(source.tokens for source in report.sources)
    return card(
        facts(
            [
                ("model", model),
                ("vocabulary", f"{tokenizer.vocab_size:,} pieces"),
                ("encoder", tokenizer.encoder),
                ("compression", f"{rate(text_bytes, tokens)} bytes a token"),
                (
                    "round trip",
                    node("span", f"{outcome}: {checked}, ", exact_size(tokenizer.checked_bytes)),
                ),
            ]
        )
    )


def _splits(report: Report) -> Element:
    head = [
        "split",
        "documents",
        "text",
        "tokens",
        "bytes a token",
        "rows",
        "padding",
        "",
        "shards",
        "on disk",
    ]
    rows: list[list[Cell]] = [
        [
            name,
            split.documents,
            exact_size(split.text_bytes),
            split.tokens,
            rate(split.text_bytes, split.tokens),
            split.rows,
            split.padding,
            percent(split.padding, split.tokens + split.padding),
            split.shards,
            exact_size(split.shard_bytes),
        ]
        for name, split in report.splits.items()
    ]
    return card(table("lrrrrrrrrr", head, rows))


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

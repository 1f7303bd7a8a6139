"""Parts of a self-contained HTML page: elements, tables, bars, histograms. Nothing on it runs or is
fetched.

Whatever text goes into `node` is escaped, and characters that could hide or reorder other text are
shown by their numbers. So text from a corpus can stand anywhere, and the page is well-formed by
construction.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

from data_prep.words import size

Child = str | Element | None
Cell = Child | int

# zero-width joiners shape the letters of Persian, Hindi and emoji; without them such text cannot be
# read
JOINERS = "\u200c\u200d"
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
PLOT_WIDTH, PLOT_HEIGHT, PLOT_TOP = 400, 96, 16
AXIS_LABELS = 8


def visible(text: str) -> str:
    """Show every control, format, private or unassigned character but tab and line feed by its
    number.

    So `visible("a\\0b\\u202e")` is "a⟨U+0000⟩b⟨U+202E⟩".
    """
    return text if text.isascii() and text.isprintable() else re.sub(r"[^\w \t\n]", _number, text)


def _number(match: re.Match[str]) -> str:
    char = match[0]
    if unicodedata.category(char) not in UNSEEN or char in JOINERS:
        return char
    return f"⟨U+{ord(char):04X}⟩"


def node(tag: str, *children: Child, **attributes: str) -> Element:
    """An element; a trailing "_" of an attribute's name is dropped (`class_`), None is no child."""
    element = Element(tag, {name.rstrip("_"): visible(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + visible(child)
        elif child:
            element.text = (element.text or "") + visible(child)
    return element


def table(columns: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Element:
    """A table that scrolls sideways where it must; `columns` has an "l" (text), "r" (number) or "w"
    (wide) a column."""
    style = {"l": "text", "r": "number", "w": "wide"}

    def line(tag: str, cells: Sequence[Cell]) -> Element:
        texts = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
        return node(
            "tr",
            *(
                node(tag, text, class_=style[kind])
                for kind, text in zip(columns, texts, strict=True)
            ),
        )

    body = node("tbody", *(line("td", row) for row in rows))
    return node("div", node("table", node("thead", line("th", head)), body), class_="scroll")


def bar(*parts: tuple[str, float, str]) -> Element:
    """A horizontal bar, filled by (CSS class, share of the bar's width in [0, 1], what the pointer
    shows)."""
    spans = [
        node("span", class_=name, style=f"width:{100 * share:.2f}%", title=title)
        for name, share, title in parts
        if share > 0
    ]
    return node("div", *spans, class_="bar")


def excerpt(*children: Child) -> Element:
    """Text of a corpus, with its own spaces and lines and in its own direction."""
    return node("pre", *children, dir="auto")


def folded(summary: str, *children: Child) -> Element:
    """Something to unfold by a click."""
    return node("details", node("summary", summary), *children)


def facts(pairs: Iterable[tuple[str, Child]]) -> Element:
    """Names and values."""
    return node(
        "dl", *(part for name, value in pairs for part in (node("dt", name), node("dd", value)))
    )


def card(*children: Child) -> Element:
    """A framed box."""
    return node("div", *children, class_="card")


def power(exponent: int) -> str:
    """2**exponent for an axis: 512, 1K, 2M."""
    thousands, rest = divmod(exponent, 10)
    return f"{2**rest}{['', 'K', 'M', 'G', 'T', 'P', 'E'][thousands]}"


def histogram(counts: Sequence[int], low: int, high: int, unit: str) -> Element:
    """A plot of documents a power of two: bar i, for low <= i < high, is of those of [2**i,
    2**(i+1)) `unit`."""
    step, most = PLOT_WIDTH / (high - low), max([*counts, 1])
    total = max(sum(counts), 1)
    bottom = PLOT_TOP + PLOT_HEIGHT
    marks = []
    for place, exponent in enumerate(range(low, high)):
        x = f"{place * step + 1:.1f}"
        if value := counts[exponent] if exponent < len(counts) else 0:
            tall = max(PLOT_HEIGHT * value / most, 1.5)
            title = (
                f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,} {unit}: {value:,} documents, "
                f"{value / total:.1%}"
            )
            box = {
                "x": x,
                "y": f"{bottom - tall:.1f}",
                "width": f"{step - 2:.1f}",
                "height": f"{tall:.1f}",
            }
            marks.append(node("rect", node("title", title), rx="2", **box))
        if place % -(-(high - low) // AXIS_LABELS) == 0:
            marks.append(node("text", power(exponent), x=x, y=str(bottom + 14)))
    return node(
        "svg",
        node("path", d=f"M0 {PLOT_TOP}H{PLOT_WIDTH}", class_="grid"),
        node("path", d=f"M0 {bottom}H{PLOT_WIDTH}", class_="axis"),
        node("text", f"{most:,}" if any(counts) else "no documents", x="1", y=str(PLOT_TOP - 4)),
        *marks,
        viewBox=f"0 0 {PLOT_WIDTH} {bottom + 18}",
        role="img",
    )


def exact_size(count: int) -> Element:
    """`size`, and the number of bytes under the pointer."""
    return node("span", size(count), title=f"{count:,} bytes")


def document(title: str, *children: Child) -> str:
    """The whole page as text."""
    policy = {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    }
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", **policy),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="color-scheme", content="light dark"),
        node("title", title),
        node("style", CSS),
    )
    html = node("html", head, node("body", node("main", *children)), lang="en")
    return "<!doctype html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


CSS = """
:root { --page: #f6f6f3; --card: #fff; --ink: #16181d; --muted: #646871; --line: #e2e2dc; --well: #efefea;
  --mark: #ffe08a; --kept: #2a78d6; --unreadable: #e34948; --rules: #e8762c; --exact: #4a3aa7; --near: #8f7fe8;
  --other: #8a8d93; --warn: #b4480f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121315; --card: #1b1d20; --ink: #e9e9e6; --muted: #9a9ea6; --line: #303338; --well: #26292d;
    --mark: #6b5310; --kept: #4a92e8; --unreadable: #e66767; --rules: #d9702e; --exact: #7263d9; --near: #a99df2;
    --other: #858991; --warn: #f0955a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; font-size: 15px; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 14px; margin: 18px 0 6px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 75ch; }
p, .small, figcaption, th { color: var(--muted); }
.small, figcaption { font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0 20px; font-size: 14px; }
a { color: var(--kept); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; }
.tile small { color: var(--muted); font-size: 13px; }
.card { padding: 14px 16px; margin: 10px 0; }
.notes { border-left: 4px solid var(--warn); }
.notes h3 { margin: 0 0 4px; color: var(--warn); }
.notes ul { margin: 0; padding-left: 18px; }
.notes li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr > :last-child { padding-right: 0; }
th { font-size: 12.5px; font-weight: 550; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
td.text { overflow-wrap: anywhere; min-width: 11em; }
td.wide { width: 45%; min-width: 140px; }
.bar { display: flex; height: 12px; margin-top: 5px; border-radius: 3px; overflow: hidden; background: var(--well);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar span { flex: none; min-width: 2px; border-right: 2px solid var(--card); }
.bar span:last-child { border: 0; }
.bar .kept, i.kept { background: var(--kept); }
.bar .unreadable, i.unreadable { background: var(--unreadable); }
.bar .rules, i.rules { background: var(--rules); }
.bar .exact, i.exact { background: var(--exact); }
.bar .near, i.near { background: var(--near); }
.bar .other, i.other { background: var(--other); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 2px; font-size: 13px; color: var(--muted); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px 24px; }
.pair > * { min-width: 0; }
figure { margin: 8px 0 0; }
svg { display: block; width: 100%; max-width: 560px; height: auto; overflow: visible; print-color-adjust: exact; }
svg rect { fill: var(--kept); }
svg text { fill: var(--muted); font-size: 11px; }
.grid { stroke: var(--line); stroke-dasharray: 2 3; }
.axis { stroke: var(--muted); }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 3px 16px; margin: 8px 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin: 8px 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details.card > summary { font-weight: 600; }
.card > h3:first-child { margin-top: 0; }
details:not(.card) > summary { color: var(--kept); }
pre { margin: 4px 0 10px; padding: 9px 12px; background: var(--well); border-radius: 6px; max-height: 22em;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td pre { margin: 0; max-height: 7em; min-width: 220px; }
mark { background: var(--mark); color: inherit; border-radius: 2px; print-color-adjust: exact; }
@media (max-width: 600px) {
  main { padding: 18px 12px 40px; } h1 { font-size: 23px; } .tile b { font-size: 20px; } .card { padding: 12px; }
  table { font-size: 13px; } th, td { padding-right: 9px; } td.text { min-width: 8.5em; }
  td.wide { min-width: 52px; width: auto; } svg text { font-size: 13px; } }
@media print { body { background: none; font-size: 12px; } main { max-width: none; padding: 0; } nav { display: none; }
  .tile, figure, tr, pre { break-inside: avoid; } h2, h3 { break-after: avoid; } pre { max-height: none; } }
"""

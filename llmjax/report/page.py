"""`report.html`: one static page with the numbers, curves, samples and config of a run; nothing is fetched or run."""

import base64
import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmjax.report.history import Series
from llmjax.report.plots import drawable, lines, svg


@dataclass(frozen=True)
class Page:
    """What the page shows; a part that is empty is left out."""

    title: str
    """name of the run"""
    subtitle: str = ""
    """one line below it"""
    figures: Sequence[tuple[str, str]] = ()
    """the numbers on top: (what, value)"""
    history: Mapping[str, Series] = field(default_factory=dict)
    """metrics to draw"""
    comparison: Sequence[Sequence[str]] = ()
    """rows of the table of compressors, the heading first"""
    comparison_note: str = ""
    """what is compared with what"""
    samples: Sequence[tuple[str, str]] = ()
    """(prompt, continuation)"""
    arithmetic: Sequence[tuple[str, str]] = ()
    """size of the run: (what, value)"""
    config: Sequence[tuple[str, str, str]] = ()
    """(path, value, what the field means)"""
    origin: Sequence[tuple[str, str]] = ()
    """how to make the run again: command, commit, packages"""


def write(page: Page, run_dir: str | Path) -> Path:
    """Write `run_dir/report.html`, whole or not at all. Returns its path."""
    path = Path(run_dir) / "report.html"
    partial = path.with_name(".report.html")
    partial.write_text(render(page), encoding="utf-8")
    return partial.replace(path)


def render(page: Page) -> str:
    """The page as HTML text."""
    samples = "".join(
        f'<blockquote><span class="prompt">{escape(prompt)}</span>{escape(text)}</blockquote>'
        for prompt, text in page.samples
    )
    fields = [(f"<code>{escape(p)}</code>", f"<code>{escape(v)}</code>", escape(doc)) for p, v, doc in page.config]
    body = [
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>",
        numbers(page.figures),
        section("Curves", f'<div class="curves">{curves(page.title, page.history)}</div>' if page.history else ""),
        section("Beside general compressors", comparison(page)),
        section("Samples", samples),
        section("Size of the run", pairs(page.arithmetic)),
        section("How to make it again", pairs(page.origin)),
        folded(f"Config ({len(fields)} fields)", table(("field", "value", "meaning"), fields) if fields else ""),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}</style>"
    )
    content = "\n".join(filter(None, body))
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body><main>\n{content}\n</main></body>\n</html>\n'


def escape(text: Any) -> str:
    """Text that stands in HTML as it is."""
    return html.escape(visible(str(text)))


def visible(text: str) -> str:
    """Text whose control characters, which neither HTML nor a terminal should be given, are a visible sign instead."""
    hidden = ("Cc", "Cs")
    kept = (c if c in "\n\t" or unicodedata.category(c) not in hidden else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(kept)


def section(title: str, content: str) -> str:
    """A part of the page under a heading; nothing where it is empty."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def folded(title: str, content: str) -> str:
    """A part that is opened by a click."""
    return f"<section><details><summary>{title}</summary>{content}</details></section>" if content else ""


def numbers(figures: Iterable[tuple[str, str]]) -> str:
    """The numbers on top as a row of tiles."""
    tiles = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in figures)
    return f'<dl class="numbers">{tiles}</dl>' if tiles else ""


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns without a heading."""
    cells = "".join(f'<tr><th scope="row">{escape(a)}</th><td>{escape(b)}</td></tr>' for a, b in rows)
    return f'<div class="wide"><table class="pairs">{cells}</table></div>' if cells else ""


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; it scrolls by itself where the screen is narrow."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading)
    rest = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def comparison(page: Page) -> str:
    """The table of compressors with its note."""
    if not page.comparison:
        return ""
    heading, *rows = page.comparison
    cells = [[escape(row[0]), *(f"<span>{escape(cell)}</span>" for cell in row[1:])] for row in rows]
    return f'<div class="compare">{table(heading, cells)}</div><p class="note">{escape(page.comparison_note)}</p>'


def curves(label: str, history: Mapping[str, Series]) -> str:
    """Every panel as an image inside the page; its text says the last values."""
    shown = []
    for panel in drawable({label: history}):
        last = ", ".join(f"{curve.label} {series.values[-1]:.4g}" for curve, series in lines(panel, history))
        picture = base64.b64encode(svg(panel, {label: history}).encode()).decode()
        alt = f"{panel.title} by step; last: {last}"
        shown.append(f'<img src="data:image/svg+xml;base64,{picture}" alt="{escape(alt)}" width="480" height="310">')
    return "".join(shown)


STYLE = """
:root { --ink: #1c2430; --soft: #5c6773; --rule: #d8dde5; --tint: #f4f6f9; --accent: #2563ab; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2, summary { margin: 2rem 0 .6rem; font-size: 1.1rem; font-weight: 650; }
summary { cursor: pointer; }
header p, .note { margin: .3rem 0 0; color: var(--soft); }
.note { font-size: .85rem; max-width: 46rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.numbers div { padding: .6rem .8rem; background: var(--tint); border-radius: .4rem; }
.numbers dt { color: var(--soft); font-size: .8rem; }
.numbers dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.numbers div:first-child dd { color: var(--accent); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
.pairs { width: 100%; }
.pairs th { width: 14rem; min-width: 8rem; }
.pairs td { overflow-wrap: anywhere; }
.compare td:not(:first-child), .compare th:not(:first-child) { text-align: right; }
.compare tbody tr:first-child td { font-weight: 650; color: var(--accent); }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
blockquote { margin: 0 0 .8rem; padding: .8rem 1rem; background: var(--tint); border-left: 3px solid var(--accent);
  font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 700; color: var(--accent); }
@media print {
  body { font-size: 11px; } main { max-width: none; padding: 0; }
  .numbers div, blockquote { background: none; border: 1px solid var(--rule); }
  img, tr, blockquote, .numbers { break-inside: avoid; } .curves { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; }
}
"""

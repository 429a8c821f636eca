"""A report as blocks, and the forms that blocks take: Markdown, and one self-contained HTML file.

Every text that reaches a block may be a user's: it is escaped here, in one place, for each form.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Points:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Code:
    """Text whose lines and spaces count."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Figures; the first ``names`` columns are names."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot.

    Attributes:
        caption: what it shows.
        alt: what somebody who does not see it must know; the figures stand in a table besides.
        svg: inline SVG.
    """

    caption: str
    alt: str
    svg: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, and what each member made of it, side by side."""

    prompt: str
    answers: Sequence[tuple[str, str]]


Block = Text | Points | Code | Table | Figure | Sample


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)


# --- Markdown --------------------------------------------------------------------------------


def as_markdown(page: Page) -> str:
    """Return a page as Markdown; a plot is its caption and its description."""
    parts = [f"# {_md(page.title)}", " ".join(map(_md, page.summary))]
    for section in page.sections:
        parts += [f"## {_md(section.title)}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Text(text):
            return _md(text)
        case Points(items):
            return "\n".join(f"- {_md(item)}" for item in items)
        case Code(text):
            return _fenced(text)
        case Figure(caption, alt, _):
            return f"*{_md(caption)}.* {_md(alt)} (Plot: report.html.)"
        case Sample(prompt, answers):
            told = [f"{_md(name)}:\n\n{_fenced(text)}" for name, text in answers]
            return "\n\n".join([f"Prompt:\n\n{_fenced(prompt)}", *told])
        case Table(caption, headings, rows, names):
            lines = [headings, ["---"] * names + ["---:"] * (len(headings) - names)]
            cells = [" | ".join(_md(cell) for cell in row) for row in rows]
            head = [f"| {' | '.join(map(_md, lines[0]))} |", f"| {' | '.join(lines[1])} |"]
            return "\n".join([f"{_md(caption)}:", "", *head, *(f"| {c} |" for c in cells)])


def _md(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """Return a block of code whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


# --- HTML ------------------------------------------------------------------------------------


def as_html(page: Page) -> str:
    """Return a page as one HTML file that loads nothing: style, plots and text are in it."""
    style = files("ars_kit").joinpath("report.css").read_text(encoding="utf-8")
    names = [(f"s{n}", section) for n, section in enumerate(page.sections)]
    contents = "".join(f'<li><a href="#{i}">{_h(s.title)}</a></li>' for i, s in names)
    body = "".join(
        f'<section id="{i}"><h2>{_h(s.title)}</h2>{"".join(map(_html, s.blocks))}</section>\n'
        for i, s in names
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_h(page.title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{_h(page.title)}</h1>
<p class="summary">{" ".join(map(_h, page.summary))}</p>
<nav aria-label="Contents"><ul>{contents}</ul></nav></header>
<main>
{body}</main>
</body>
</html>
"""


def _html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{_h(text)}</p>\n"
        case Points(items):
            return f"<ul>{''.join(f'<li>{_h(item)}</li>' for item in items)}</ul>\n"
        case Code(text):
            return f'<pre tabindex="0">{_h(text)}</pre>\n'
        case Figure(caption, _, svg):
            return f"<figure>{svg}<figcaption>{_h(caption)}</figcaption></figure>\n"
        case Sample(prompt, answers):
            told = "".join(
                f'<div class="answer"><h4>{_h(name)}</h4><p dir="auto">{_h(text)}</p></div>'
                for name, text in answers
            )
            head = f'<h3 class="prompt" dir="auto">{_h(prompt)}</h3>'
            return f'{head}<div class="answers">{told}</div>\n'
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{" class=name" if at < table.names else ""}>{_h(heading)}</th>'
        for at, heading in enumerate(table.headings)
    )
    rows = []
    for row in table.rows:
        cells = [
            f'<th scope="row">{_h(cell)}</th>'
            if at == 0
            else f"<td{' class=name' if at < table.names else ''}>{_h(cell)}</td>"
            for at, cell in enumerate(row)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_h(table.caption)}"><table>'
        f"<caption><span>{_h(table.caption)}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _h(text: str) -> str:
    """Return text that HTML shows as it is, in an element or in a quoted attribute."""
    # What is not a character of XML would end the page for a strict reader.
    clean = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    return html.escape(clean)

"""Plots of a report as inline SVG, drawn by matplotlib without a display.

Colours are names of CSS variables, so that one drawing is legible on light and dark paper and in
print; text takes the page's own colour. Members differ in lightness (cividis), controls in colour
(Okabe & Ito) and in dashes, so that no plot needs colour vision.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = 9
"""Lightnesses there are for members."""
HUES = 6
"""Colours there are for everything else."""
DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)))
MARKS = ("o", "s", "^", "D", "v", "P")
WIDTH, HEIGHT = 4.8, 2.9
"""Inches; on a phone, at 360 px, the letters are still 9 px high."""
INK, RULE = "#010203", "#010204"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a plot.

    Attributes:
        colour: ``m0`` ... for members, ``c0`` ... for the rest.
        mark: draw its points as well as the line.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: int = 0
    mark: bool = False


def shade(place: int, count: int) -> str:
    """Return a member's colour, dark to pale over the family."""
    return f"m{round(place * (SHADES - 1) / max(1, count - 1))}"


def lines(
    title: str,
    alt: str,
    drawn: Sequence[Line],
    *,
    x: str,
    y: str,
    marks: Mapping[str, Sequence[float]] | None = None,
    labels: Sequence[tuple[float, str]] = (),
    log: bool = False,
) -> str:
    """Draw lines.

    Args:
        title: of the plot, for people who hear it.
        alt: its description.
        drawn: the lines.
        x: what the horizontal axis is.
        y: what the vertical axis is.
        marks: short strokes at the bottom by what they mean, such as skipped steps.
        labels: names along the top, and where each belongs.
        log: draw the vertical axis logarithmically.
    """
    with _axes(title, alt) as (axes, finish):
        for line in drawn:
            axes.plot(
                line.xs,
                line.ys,
                color=_placeholder(line.colour),
                linestyle=DASHES[line.dash % len(DASHES)],
                linewidth=1.6,
                marker=MARKS[line.dash % len(MARKS)] if line.mark else None,
                markersize=3.5,
                label=line.name,
            )
        if log:
            from matplotlib.ticker import LogLocator  # noqa: PLC0415 -- as below

            # Its own labels are TeX, which an SVG with text in the page's font shows as it stands.
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        for at, (name, places) in enumerate((marks or {}).items()):
            bottom = [axes.get_ylim()[0]] * len(places)
            colour = _placeholder(f"c{(at + 3) % HUES}")
            axes.plot(places, bottom, "|", color=colour, markersize=9, label=name)
        # A name beyond the axis leaves no room to draw in: a single step is at 0, its name at 0.5.
        axes.set_xlim(*_spanning(axes.get_xlim(), [place for place, _ in labels]))
        for place, name in labels:
            axes.annotate(
                name,
                (place, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(axes, [line.name for line in drawn if not line.name.startswith("_")])
    return finish[0]


def bars(
    title: str,
    alt: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    y: str,
) -> str:
    """Draw groups of bars, one for each name; what was not measured leaves a gap."""
    with _axes(title, alt) as (axes, finish):
        width = 0.8 / max(1, len(series))
        for at, (name, values) in enumerate(series.items()):
            places = [i + (at - (len(series) - 1) / 2) * width for i in range(len(names))]
            there = [(p, v) for p, v in zip(places, values, strict=True) if v is not None]
            axes.bar(
                [p for p, _ in there],
                [v for _, v in there],
                width * 0.92,
                color=_placeholder(f"c{at % HUES}"),
                hatch=("", "///", "...")[at % 3],
                edgecolor=RULE,
                linewidth=0.4,
                label=name,
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(y)
        _legend(axes, list(series))
    return finish[0]


def dots(
    title: str,
    alt: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
    *,
    y: str,
) -> str:
    """Draw points with intervals, (low, value, high) each; what was not measured leaves a gap."""
    with _axes(title, alt) as (axes, finish):
        for at, (name, values) in enumerate(series.items()):
            nudge = (at - (len(series) - 1) / 2) * 0.12
            there = [(i + nudge, v) for i, v in enumerate(values) if v is not None]
            below = [v[1] - v[0] for _, v in there]
            above = [v[2] - v[1] for _, v in there]
            axes.errorbar(
                [p for p, _ in there],
                [v[1] for _, v in there],
                yerr=[below, above],
                fmt=MARKS[at % len(MARKS)],
                color=_placeholder(f"c{at % HUES}"),
                markersize=5,
                capsize=3,
                linewidth=1.2,
                label=name,
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(y)
        _legend(axes, list(series))
    return finish[0]


@contextmanager
def _axes(title: str, alt: str) -> Iterator[tuple[Axes, list[str]]]:
    """Lend axes; what was drawn on them stands in the list afterwards."""
    import matplotlib as mpl  # noqa: PLC0415 -- slow, and a command that draws nothing needs none
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    finish: list[str] = []
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.color": INK,
        "text.usetex": False,
        "text.parse_math": False,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.formatter.use_mathtext": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": RULE,
        "grid.linewidth": 0.5,
        "grid.alpha": 1.0,
        "axes.axisbelow": True,
        "hatch.color": RULE,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), finish
        out = io.StringIO()
        figure.patch.set_alpha(0.0)
        for axes in figure.axes:
            axes.patch.set_alpha(0.0)
        figure.savefig(out, format="svg", metadata={"Date": None})
    finish.append(_inline(out.getvalue(), title, alt))


def _spanning(limits: tuple[float, float], places: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis, further apart where a place lies beyond them."""
    return min((limits[0], *places)), max((limits[1], *places))


def _legend(axes: Axes, names: Sequence[str]) -> None:
    if len(names) > 1 or axes.get_legend_handles_labels()[1][1:]:
        axes.figure.legend(
            loc="outside lower center", ncols=3, frameon=False, fontsize=7.5, handlelength=3
        )


def _placeholder(name: str) -> str:
    """Return the colour that stands for a variable until the drawing is finished."""
    kind, number = name[0], int(name[1:])
    return f"#0a{10 if kind == 'm' else 11}{number:02x}"


def _inline(svg: str, title: str, alt: str) -> str:
    """Make a drawing part of a page: described, coloured by it, with names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    mine = "f" + re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{mine}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{mine}-", svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(r"#0a10([0-9a-f]{2})", lambda m: f"var(--m{int(m[1], 16)})", svg)
    svg = re.sub(r"#0a11([0-9a-f]{2})", lambda m: f"var(--c{int(m[1], 16)})", svg)
    head = f' role="img" aria-labelledby="{mine}-t {mine}-d"'
    told = f'<title id="{mine}-t">{escape(title)}</title><desc id="{mine}-d">{escape(alt)}</desc>'
    return re.sub(r"<svg([^>]*)>", rf"<svg{head}\1>{_literal(told)}", svg, count=1)


def _literal(text: str) -> str:
    """Return a replacement that stands for itself."""
    return text.replace("\\", r"\\")

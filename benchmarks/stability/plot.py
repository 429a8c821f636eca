"""A plot without a plotting library: for each provocation, every method's difference to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from stability.figures import Table

PANEL, LABEL, ROW, TOP, COLUMNS = 250, 180, 15, 34, 3
DOT, BETTER, WORSE, AXIS = 3.5, "#1a7f5a", "#b3412e", "#777"


def differences_svg(
    table: Table, provocations: Sequence[str], methods: Sequence[str], reference: str
) -> str:
    """Return an SVG of paired differences with 95 % intervals; one panel a provocation.

    A filled dot is one whose interval leaves zero out. Every panel has a scale of its own.
    """
    height = TOP + ROW * len(methods) + 26
    rows = -(-len(provocations) // COLUMNS)
    width = COLUMNS * (LABEL + PANEL)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {rows * height + 10}" '
            'font-family="sans-serif" font-size="11">'
        ),
        f'<rect width="{width}" height="{rows * height + 10}" fill="white"/>',
    ]
    for i, provocation in enumerate(provocations):
        x, y = (i % COLUMNS) * (LABEL + PANEL), (i // COLUMNS) * height
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(table, provocation, methods, reference)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _panel(table: Table, provocation: str, methods: Sequence[str], reference: str) -> Iterable[str]:
    found = {m: table.against(provocation, m, reference) for m in methods}
    # Half the panel is the median reach times three: one broken method must not flatten the rest.
    reaches = sorted(abs(f.mean) + (f.half or 0) for f in found.values() if f.mean is not None)
    scale = max(3 * reaches[len(reaches) // 2], 1e-4) if reaches else 1.0
    bottom = TOP + ROW * len(methods)

    def at(value: float) -> float:
        return LABEL + PANEL / 2 + max(-1.0, min(1.0, value / scale)) * (PANEL / 2 - 12)

    yield f'<text x="{LABEL}" y="20" font-weight="bold">{escape(provocation)}</text>'
    yield f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{TOP - 6}" y2="{bottom}" stroke="{AXIS}"/>'
    for value, anchor in ((-scale, "start"), (0.0, "middle"), (scale, "end")):
        yield (
            f'<text x="{at(value):.1f}" y="{bottom + 12}" text-anchor="{anchor}" fill="{AXIS}">'
            f"{value:+.3f}</text>"
        )
    for i, (name, f) in enumerate(found.items()):
        y = TOP + ROW * i + 4
        yield f'<text x="{LABEL - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
        if f.mean is None:
            said = table.deaths(provocation, name, reference) or "not run"
            place = f'x="{LABEL + PANEL - 4}" y="{y + 4}" text-anchor="end"'
            yield f'<text {place} fill="{AXIS}">{said}</text>'
            continue
        colour = BETTER if f.mean < 0 else WORSE
        half = f.half or 0.0
        yield (
            f'<line x1="{at(f.mean - half):.1f}" x2="{at(f.mean + half):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{colour}"/>'
        )
        yield (
            f'<circle cx="{at(f.mean):.1f}" cy="{y}" r="{DOT}" stroke="{colour}" '
            f'fill="{colour if f.clear else "white"}"><title>{f.mean:+.4f}</title></circle>'
        )
        if f.dead:
            said = table.deaths(provocation, name, reference)
            yield f'<text x="{LABEL + PANEL}" y="{y + 4}" text-anchor="end">{said}</text>'

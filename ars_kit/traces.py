"""The lines of a report's plots: losses over FLOPs, damping factors over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ars_kit import charts
from ars_kit.comparison import Comparison
from ars_kit.losses import smoothed
from ars_kit.reach import Spent, family_points, points
from ars_kit.records import RunRecord

MOST_POINTS = 400
"""Points that a line is drawn with at most: more are not seen, and a file stays small."""

TOTAL = "damping"
"""The product of all factors, beside those of single gates."""


def heldout_lines(run: RunRecord, comparison: Comparison) -> list[charts.Line]:
    """Return held-out losses over all FLOPs spent: of the members, and of each kind of control."""
    family = _by_member(list(family_points(run)))
    found = [
        charts.Line(
            name, [p.flops for p in ps], [p.loss for p in ps], charts.shade(i, len(family)), 0
        )
        for i, (name, ps) in enumerate(family.items())
    ]
    for at, group in enumerate(comparison.groups[1:]):
        control = group.runs[0]
        largest = control.largest or control.members[0]
        chain = any(control.member(m.parent) for m in control.members if m.parent)
        ps = points(control, largest.name, ancestors=True) if chain else []
        alone = [] if chain else [points(control, m.name, ancestors=False) for m in control.members]
        for nth, line in enumerate([ps, *alone]):
            if line:
                label = group.name if nth in (0, 1) else f"_{group.name} {line[0].member}"
                xs, ys = [p.flops for p in line], [p.loss for p in line]
                found.append(charts.Line(label, xs, ys, f"c{at % charts.HUES}", at + 1))
    return found


def _by_member(curve: Sequence[Spent]) -> dict[str, list[Spent]]:
    found: dict[str, list[Spent]] = {}
    for point in curve:
        found.setdefault(point.member, []).append(point)
    return found


def training_lines(run: RunRecord) -> list[charts.Line]:
    """Return smoothed training losses over all FLOPs spent, of each member that has begun."""
    found, spent = [], 0.0
    planned = {m["name"]: m["flops"] / m["steps"] for m in (run.plan or {}).get("members", [])}
    for i, member in enumerate(run.by_birth):
        rows = [r for r in member.history if not r["skipped"] and r["loss"] is not None]
        per_step = (
            member.metrics["flops"] / member.metrics["steps"]
            if member.metrics.get("steps")
            else planned.get(member.name)
        )
        if rows and per_step:
            xs = [spent + per_step * (row["step"] + 1) for row in rows]
            ys = smoothed([row["loss"] for row in rows])
            colour = charts.shade(i, len(run.members))
            found.append(charts.Line(member.name, _thin(xs), _thin(ys), colour, 0))
        if not member.metrics:  # where the next would begin is not known
            break
        spent += member.metrics["total_flops"]
    return found


@dataclass(frozen=True, slots=True)
class Factors:
    """What damped the steps of a family, counted through all of its members.

    Attributes:
        series: steps and factors of :data:`TOTAL` and each gate, without skipped steps.
        skipped: steps that were skipped.
        back: steps from which training went back.
        members: the middle step of each member that has begun, and its name.
        steps: how many there are in all.
    """

    series: dict[str, tuple[list[float], list[float]]]
    skipped: list[float]
    back: list[float]
    members: list[tuple[float, str]]
    steps: int

    @property
    def lowest(self) -> float:
        """The smallest total of a step that was taken."""
        return min(self.series[TOTAL][1], default=1.0)

    @property
    def quiet(self) -> list[str]:
        """Gates that changed no step."""
        return [name for name in self.series if not self._acts(name)]

    def lines(self) -> list[charts.Line]:
        """Return what there is to draw, smoothed."""
        acting = [n for n in self.series if self._acts(n)]
        return [
            charts.Line(name, _thin(xs), _thin(_eased(ys)), f"c{(i + 5) % charts.HUES}", i)
            for i, name in enumerate(acting)
            for xs, ys in [self.series[name]]
            if xs
        ]

    def _acts(self, name: str) -> bool:
        # The total is 1 as well where the norm memory alone amplifies.
        return name == TOTAL or any(abs(y - 1) > 1e-3 for y in self.series[name][1])


def factors_of(run: RunRecord) -> Factors:
    """Return the factors of all steps that were recorded."""
    gates = dict.fromkeys(g for m in run.finished for g in m.metrics["gates"])
    found = Factors({n: ([], []) for n in (TOTAL, *gates)}, [], [], [], 0)
    first = 0
    for member in run.by_birth:
        if not member.history:
            continue
        for row in member.history:
            at = first + row["step"]
            if row.get("went_back"):
                found.back.append(at)
            if row["skipped"]:
                found.skipped.append(at)
                continue
            values = {TOTAL: row["gradient"] * row["step_size"], **row}
            for name, (xs, ys) in found.series.items():
                if values.get(name) is not None:
                    xs.append(at)
                    ys.append(values[name])
        found.members.append((first + len(member.history) / 2, member.name))
        first += len(member.history)
    return replace(found, steps=first)


def wants_log(drawn_lines: Sequence[charts.Line]) -> bool:
    """Whether one line would flatten the rest: norm memory may amplify a tensor many times."""
    values = [y for line in drawn_lines for y in line.ys]
    return bool(values) and max(values) > 2 and min(values) > 0


def _eased(values: Sequence[float]) -> list[float]:
    """Return means over 9 steps, so that a line is legible; the table has the exact means."""
    half = 4
    return [
        sum(window := values[max(0, i - half) : i + half + 1]) / len(window)
        for i in range(len(values))
    ]


def _thin(values: Sequence[float]) -> list[float]:
    stride = -(-len(values) // MOST_POINTS)
    return [*values[::stride]] if len(values) % stride == 1 or stride == 1 else [
        *values[::stride], values[-1]
    ]  # fmt: skip

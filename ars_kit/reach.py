"""What it took to reach a held-out loss: FLOPs, seconds and dollars, interpolated on the curves.

A ratio of step counts says nothing where a step of one member costs more than one of another; what
is compared is what was spent until a loss was reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ars_kit.records import MemberRecord, RunRecord


@dataclass(frozen=True, slots=True)
class Spent:
    """A point of a curve, and everything that had been spent on the way to it.

    Attributes:
        member: whose curve it is.
        loss: held-out, nats per token.
        seconds: of training.
        cost: dollars.
    """

    member: str
    loss: float
    flops: float
    seconds: float
    cost: float

    def facts(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "member": self.member,
            "flops": self.flops,
            "seconds": self.seconds,
            "cost": self.cost,
        }


def path_to(run: RunRecord, name: str) -> list[MemberRecord]:
    """Return a member's line of descent, the root first, as far as the run's members go."""
    line: list[MemberRecord] = []
    at = run.member(name)
    while at is not None and at not in line:
        line.insert(0, at)
        at = run.member(at.parent) if at.parent else None
    return line


def points(run: RunRecord, name: str, *, ancestors: bool) -> list[Spent]:
    """Return the held-out curve that led to a member, in the order it was drawn.

    An ancestor counts as far as the member continued it: a branch before its end costs less than
    the whole.

    Args:
        run: whose.
        name: of the member.
        ancestors: begin at the root of its line, whose cost counts; or at its birth, from nothing.
    """
    line = path_to(run, name)
    line = line if ancestors else line[-1:]
    found: list[Spent] = []
    flops = seconds = cost = 0.0
    for member, heir in zip(line, [*line[1:], None], strict=True):
        # What the heir took over of it, in FLOPs: all, or what its branch had cost.
        share = float("inf") if heir is None else _inherited(member, heir)
        found += [
            replace(p, flops=p.flops + flops, seconds=p.seconds + seconds, cost=p.cost + cost)
            for p in _own(run, member)
            if p.flops <= share * (1 + 1e-9)
        ]
        if heir is not None and member.metrics:
            whole = member.metrics["total_flops"]
            flops += share
            taken = member.metrics["training_time"] * (share / whole if whole else 1.0)
            seconds, cost = seconds + taken, cost + taken / 3600 * _price(run, member)
    return found


def family_points(run: RunRecord) -> Iterator[Spent]:
    """Yield every member's curve, each after all that the members before it had cost.

    It ends with a member whose cost is not known: in training, or with damaged figures.
    """
    flops = seconds = cost = 0.0
    for member in run.by_birth:
        for p in _own(run, member):
            yield replace(p, flops=flops + p.flops, seconds=seconds + p.seconds, cost=cost + p.cost)
        if not member.metrics:
            return
        flops += member.metrics["total_flops"]
        taken = member.metrics["training_time"]
        seconds, cost = seconds + taken, cost + taken / 3600 * _price(run, member)


def first_at(curve: list[Spent], loss: float) -> Spent | None:
    """Return where a curve first comes down to ``loss``; None where it never does.

    Between two points of one member it is interpolated linearly in the loss. A birth is no such
    stretch: what lies at or below the loss from its first point on is reached there.
    """
    before: Spent | None = None
    for point in curve:
        if point.loss <= loss:
            if before is None or before.member != point.member or before.loss == point.loss:
                return point
            share = (before.loss - loss) / (before.loss - point.loss)
            return Spent(
                point.member,
                loss,
                before.flops + share * (point.flops - before.flops),
                before.seconds + share * (point.seconds - before.seconds),
                before.cost + share * (point.cost - before.cost),
            )
        before = point
    return None


def _price(run: RunRecord, member: MemberRecord) -> float:
    """Return what an hour of a member cost: a run may go on at another price."""
    return float(member.metrics.get("price_per_hour", run.settings.run.price_per_hour))


def _own(run: RunRecord, member: MemberRecord) -> list[Spent]:
    """Return a member's own points, from its birth, which may have cost something, on."""
    birth, price = member.metrics.get("setup_flops", 0.0), _price(run, member)
    return [
        Spent(
            member.name,
            row["loss"],
            birth + row["flops"],
            row["seconds"],
            row["seconds"] / 3600 * price,
        )
        for row in member.curve
        if row["loss"] is not None
    ]


def _inherited(member: MemberRecord, heir: MemberRecord) -> float:
    """Return the FLOPs of a member that its heir's weights had cost."""
    if not member.metrics:
        return 0.0
    before = member.metrics["lineage_flops"] - member.metrics["total_flops"]
    if not heir.metrics:  # still in training; a cooled parent is what most strategies take
        return float(member.metrics["total_flops"])
    return float(heir.metrics["lineage_flops"] - heir.metrics["total_flops"] - before)

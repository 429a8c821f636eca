"""What is compared: each arm lays a budget out over members, and names the strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ars_kit.roster import Member
from inheritance.scale import Scale

Layout = Callable[[Scale, float], tuple[Member, ...]]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to come by a family.

    Attributes:
        summary: for people.
        layout: the members to train with their tokens, for a family budget in multiples of what
            the largest member alone costs.
        strategy: as ``--strategy`` takes it.
        kappas: the budgets that are tried, in the same multiples; None tries the scale's.
        members: whether it yields every member; else the last alone is compared.
        like: the arm whose learning rate and first weights it takes over; None tunes its own.
    """

    summary: str
    layout: Layout
    strategy: str
    kappas: tuple[float, ...] | None = None
    members: bool = True
    like: str | None = "lineage"

    def ladder(self, scale: Scale) -> tuple[float, ...]:
        """Return the budgets that are tried."""
        return self.kappas or scale.kappas


def scratch(scale: Scale, _: float) -> tuple[Member, ...]:
    """Every member alone, on its own budget."""
    return tuple(
        replace(m, tokens=scale.whole(scale.ratio * n))
        for m, n in zip(scale.members, scale.parameters, strict=True)
    )


def lineage(early: float) -> Layout:
    """Return a chain whose cumulative cost at each member follows that member's scratch cost.

    The last member's lineage, which is the whole family, costs ``kappa`` times what that member
    costs from scratch. The first one costs ``1 + early`` times as much again, measured by its own,
    and those between them in between: more than their due where ``early`` is positive, since they
    are cheap and their heirs keep what they learned; less where it is negative, since what they
    spend the last one lacks.
    """

    def layout(scale: Scale, kappa: float) -> tuple[Member, ...]:
        top, last = scale.costs[-1], len(scale.costs) - 1
        spent, found = 0.0, []
        for i, member in enumerate(scale.members):
            due = kappa * scale.costs[i] * (1 + early * (last - i) / last)
            due = min(due, kappa * top)
            tokens = scale.whole((due - spent) / scale.per_token[i])
            spent += tokens * scale.per_token[i]
            found.append(replace(member, tokens=tokens))
        return tuple(found)

    return layout


def jump(share: float) -> Layout:
    """Return the smallest member and the largest, ``share`` of the budget before the growth."""

    def layout(scale: Scale, kappa: float) -> tuple[Member, ...]:
        budget = kappa * scale.costs[-1]
        first, last = scale.members[0], scale.members[-1]
        before = scale.whole(share * budget / scale.per_token[0])
        after = scale.whole((budget - before * scale.per_token[0]) / scale.per_token[-1])
        return replace(first, tokens=before), replace(last, tokens=after)

    return layout


def prune(scale: Scale, kappa: float) -> tuple[Member, ...]:
    """Return the largest on its own budget, the others on equal shares of theirs for what is left.

    A pruned member's step costs its own and its teacher's forward pass, a third of the parent's.
    """
    top = scale.costs[-1]
    steps = [
        scale.ratio * n * (f + teacher / 3)
        for n, f, teacher in zip(
            scale.parameters[:-1], scale.per_token[:-1], scale.per_token[1:], strict=True
        )
    ]
    share = max(0.0, kappa - 1) * top / sum(steps)
    small = tuple(
        replace(m, tokens=scale.whole(share * scale.ratio * n))
        for m, n in zip(scale.members[:-1], scale.parameters[:-1], strict=True)
    )
    largest = replace(scale.members[-1], tokens=scale.whole(scale.ratio * scale.parameters[-1]))
    return (*small, largest)


def no_growth(scale: Scale, kappa: float) -> tuple[Member, ...]:
    """Return the smallest member on the whole budget."""
    tokens = scale.whole(kappa * scale.costs[-1] / scale.per_token[0])
    return (replace(scale.members[0], tokens=tokens),)


WARM = "last_decay_fraction=none"
"""The last member cools for as long as every other; by default it would cool from birth on."""
ONCE = (1.0,)
ARMS = {
    "scratch": Arm("every member alone", scratch, "scratch", ONCE, like=None),
    "lineage": Arm("cooled lineage, grown exactly", lineage(0.3), f"progressive:{WARM}", like=None),
    "no-growth": Arm(
        "the smallest on the largest's budget", no_growth, "scratch", ONCE, False, "scratch"
    ),
    "prune": Arm(
        "the largest first, cut down, taught", prune, "prune", (1.05, 1.2), like="scratch"
    ),
    "late-lineage": Arm(
        "likewise, more of it for the last", lineage(-0.3), f"progressive:{WARM}", (1.0, 1.25)
    ),
    "even-lineage": Arm("likewise, each its due", lineage(0.0), f"progressive:{WARM}", (1.0, 1.05)),
    "jump": Arm("the smallest, then one growth", jump(0.3), f"progressive:{WARM}", members=False),
    "trunk": Arm("a trunk that never cools, branches cooled", lineage(0.3), "trunk", ONCE),
    "duplicate": Arm("blocks doubled in place", lineage(0.3), f"duplicate:{WARM}", ONCE),
    "even-duplicate": Arm(
        "likewise, each its due", lineage(0.0), f"duplicate:{WARM}", (0.8, 1.0, 1.05)
    ),
    "cooled-last": Arm(
        "likewise, the last cools from birth",
        lineage(0.0),
        "duplicate:last_decay_fraction=1",
        (0.8, 1.0),
    ),
    "exact-cooled-last": Arm(
        "likewise, grown exactly", lineage(0.0), "progressive:last_decay_fraction=1", (1.0, 1.05)
    ),
    "even-halves": Arm(
        "each its due, block and copy at half",
        lineage(0.0),
        f"duplicate:share=0.5,{WARM}",
        (0.8, 1.0),
    ),
    "distill": Arm("lineage, the parent teaches", lineage(0.3), f"distill:{WARM}", ONCE),
}
"""Every arm, the controls among them: ``scratch``, ``no-growth``, ``jump``, ``prune``. The one long
run, the largest straight on the family's budget, is the last member of ``scratch``. The first four
come first in every seed."""

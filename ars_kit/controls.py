"""Controls: the same text, seed and rules without one thing, so that its worth can be measured.

- ``scratch``: every member alone from fresh weights, with the first member's full iterations.
- ``no-growth``: the smallest member on what the family spent on the path to its largest.
- ``one-long-run``: the largest member on what the whole family spent.
- ``no-ars``: the same family under the bare base optimizer.

What was spent is read in FLOPs from the members' committed figures, never in steps: a step of a
large member costs more than one of a small one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.lora import WHOLE
from ars_kit.members import MemberPlan
from ars_kit.optim import GUARD, PER_MEMBER
from ars_kit.plan import RunPlan, plan_run
from ars_kit.roster import parse_roster
from ars_kit.schema import Choice
from ars_kit.settings import Settings

POINTS = 15
"""Points that the shortest member's held-out curve has at least, where controls ask for curves."""
ALONE = ("no-growth", "one-long-run")
"""Controls of one member on a budget of FLOPs."""


@dataclass(frozen=True, slots=True)
class Control:
    """A control before it is trained.

    Attributes:
        name: also its folder's, under ``controls``.
        plan: an ordinary run's.
        budget: FLOPs that it was given; None where it takes the family's iterations.
        source: where the budget comes from, in words.
    """

    name: str
    plan: RunPlan
    budget: float | None = None
    source: str = "the family's own iterations"

    def record(self) -> dict[str, Any]:
        """Return what ``control.json`` keeps: how the steps follow from the budget."""
        return {
            "control": self.name,
            "budget_flops": self.budget,
            "budget": self.source,
            "flops_per_step": None if self.budget is None else _per_step(self.plan.members[0]),
            "steps": sum(m.steps for m in self.plan.members),
            "planned_flops": sum(m.planned_flops for m in self.plan.members),
        }


def with_curve(plan: RunPlan) -> RunPlan:
    """Return a plan whose members draw held-out curves, if controls are to be compared by them."""
    run = plan.settings.run
    if not run.controls or run.heldout_every is not None:
        return plan
    every = max(1, min(m.steps for m in plan.members) // POINTS)
    settings = replace(plan.settings, run=replace(run, heldout_every=every))
    return replace(plan, settings=settings)


def plan_controls(
    plan: RunPlan, host: Host, metrics: Sequence[Mapping[str, Any]] | None = None
) -> list[Control]:
    """Lay out the controls that a run asks for.

    Args:
        plan: the family's.
        host: the installed plugins.
        metrics: of the family's members once they are committed; until then the plan's own FLOPs
            stand in for what they will have spent.

    Raises:
        ConfigError: a control would show nothing, as it would be the family itself; or cannot be.
    """
    return [_plan_control(name, plan, host, metrics) for name in plan.settings.run.controls]


def _plan_control(
    name: str, plan: RunPlan, host: Host, metrics: Sequence[Mapping[str, Any]] | None
) -> Control:
    settings = plan.settings
    reason = _pointless(name, plan, host)
    if reason:
        raise ConfigError(f"control {name!r} would show nothing: {reason}. Drop it")
    bare = replace(settings, run=replace(settings.run, controls=()))
    if name == "scratch":
        family = replace(settings.family, strategy=Choice("scratch"))
        fresh = _from_nothing(replace(bare, family=family))
        return Control(name, _timed(plan_run(fresh, host), plan))
    if name == "no-ars":
        # The guard against steps that are not finite is everybody's.
        kept = tuple(gate for gate in settings.optimizer.without if gate == GUARD.name)
        optimizer = replace(
            settings.optimizer, name=settings.optimizer.base, gates=(), without=kept
        )
        return Control(name, _timed(plan_run(replace(bare, optimizer=optimizer), host), plan))
    # Of equals the one at the end of the longest path: in a chain of one shape the last.
    large = max(plan.members, key=lambda m: (m.parameters, _spent(plan, None, m.name)))
    member = large if name == "one-long-run" else min(plan.members, key=lambda m: m.parameters)
    budget = _spent(plan, metrics, None if name == "one-long-run" else large.name)
    given = "the whole family" if name == "one-long-run" else f"the path to {large.name}"
    alone = _from_nothing(_alone(bare, member))
    # Planned once to know what a step of it costs here: all of it may train now, and a base teach.
    steps = max(1, round(budget / _per_step(plan_run(alone, host).members[0])))
    tokens = steps * settings.train.batch_size * settings.data.sequence_length
    alone = replace(alone, train=replace(alone.train, tokens=tokens))
    made = _timed(plan_run(alone, host), plan)
    return Control(name, made, budget, f"what {given} spent")


def _pointless(name: str, plan: RunPlan, host: Host) -> str | None:
    settings = plan.settings
    if name == "scratch" and settings.family.strategy.name == "scratch":
        return "the family's members start from scratch"
    wrapper = settings.optimizer.name.name
    if name == "no-ars" and wrapper not in host.shelves["wrappers"]:
        return f"the family's optimizer {wrapper} is no wrapper"
    if name in ALONE and len(plan.members) == 1:
        return f"the family has one member, {plan.members[0].name}"
    if name in ALONE and any(m.data != plan.members[0].data for m in plan.members):
        return "one member alone cannot read the texts that the members have of their own"
    return None


def _spent(plan: RunPlan, metrics: Sequence[Mapping[str, Any]] | None, member: str | None) -> float:
    """Return the FLOPs of the path to a member, or of everything."""
    if metrics is not None:
        if member is None:
            return float(sum(m["total_flops"] for m in metrics))
        return float(next(m["lineage_flops"] for m in metrics if m["model_id"] == member))
    by_name = {m.name: m for m in plan.members}
    if member is None:
        return sum(m.planned_flops for m in plan.members)
    total, at = 0.0, by_name.get(member)
    while at is not None:
        total += at.planned_flops
        at = by_name.get(at.parent or "")
    return total


def _per_step(member: MemberPlan) -> float:
    """Return the FLOPs of one step, a teacher's beside it included."""
    return member.planned_flops / member.steps


def _from_nothing(settings: Settings) -> Settings:
    """Return settings under which all trains where, for want of a base, nothing is inherited."""
    if settings.family.base is not None:
        return settings
    return replace(settings, train=replace(settings.train, trainable=WHOLE))


def _alone(settings: Settings, member: MemberPlan) -> Settings:
    """Return the settings under which one member, of the shape it has here, trains by itself."""
    family, optimizer = settings.family, settings.optimizer
    roster = {m.name: m for m in parse_roster(family.members)}
    shape = replace(roster[member.name], tokens=None)  # its own are not the budget
    spelled = str(shape) if ":" in family.members else shape.name
    if family.base is not None and family.depth == "grow":
        # Among its elders a depth is counted from the first; alone it is said outright.
        spelled = str(replace(shape, num_hidden_layers=member.config.num_hidden_layers))
    # Fresh weights where there is no base; what a strategy makes of a base is left to it.
    strategy = Choice("scratch") if family.base is None else family.strategy
    # What a wrapper interpolates over the family stays what it is for this member.
    placed: dict[str, Any] = {}
    for key in PER_MEMBER:
        first, last = getattr(optimizer, key)
        placed[key] = (first + (last - first) * member.position,) * 2
    return replace(
        settings,
        family=replace(family, members=spelled, strategy=strategy),
        optimizer=replace(optimizer, **placed),
    )


def _timed(made: RunPlan, family: RunPlan) -> RunPlan:
    """Return a control's plan with the family's recipe, and times by its members' FLOPs there."""
    made = replace(made, recipe=family.recipe)
    times = {m.name: m.seconds / m.planned_flops for m in family.members if m.seconds is not None}
    if not times:
        return made
    members = tuple(
        replace(m, seconds=times[m.name] * m.planned_flops) if m.name in times else m
        for m in made.members
    )
    return replace(made, members=members, speed_source=family.speed_source)

"""The plan's three scenarios, twice: as planned from price and hours, and as measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ars_kit.comparison import Comparison
from ars_kit.records import RunRecord
from ars_kit.spread import Spread

PLAN_MEMBERS = 9
"""Of the planned family, d10 to d18."""
PLAN_HOURS = (2.0, 1.0)
"""Planned hours of a member from fresh weights, and of one that inherits."""
PLAN_PRICE = 0.44
"""Planned dollars an hour."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way to train the family.

    Attributes:
        hours: as planned; no measurement.
        measured: dollars of training as measured here; None where no such run is there.
        seconds: likewise.
        run: what was measured, in words.
    """

    name: str
    hours: float
    measured: Spread | None
    seconds: Spread | None
    run: str | None

    @property
    def planned(self) -> float:
        """Dollars as planned: price times hours."""
        return PLAN_PRICE * self.hours

    def facts(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "scenario": self.name,
            "planned_hours": self.hours,
            "planned_cost": self.planned,
            "measured_cost": self.measured and self.measured.mean,
            "measured_seconds": self.seconds and self.seconds.mean,
            "seeds": self.measured.n if self.measured else 0,
            "measured_on": self.run,
        }


def scenarios(comparison: Comparison) -> list[Scenario]:
    """Return the plan's scenarios, each with the runs of the comparison that are it."""
    fresh, heir = PLAN_HOURS
    alone, chain = PLAN_MEMBERS * fresh, fresh + (PLAN_MEMBERS - 1) * heir
    return [
        _scenario("from scratch", alone, comparison, strategy="scratch", damped=None),
        _scenario("progressive", chain, comparison, strategy="progressive", damped=False),
        # The plan gives damping no hours of its own: "time stays equal".
        _scenario("progressive + ARS", chain, comparison, strategy="progressive", damped=True),
    ]


def _scenario(
    name: str, hours: float, comparison: Comparison, *, strategy: str, damped: bool | None
) -> Scenario:
    for group in comparison.groups:
        run = group.runs[0]
        fits = run.settings.family.strategy.name == strategy and len(run.members) > 1
        if fits and damped in (None, _is_damped(run)) and any(r.is_complete for r in group.runs):
            what = f"{group.name}: {len(run.members)} members, {run.settings.optimizer.name.name}"
            return Scenario(name, hours, group.spread("cost"), group.spread("training_time"), what)
    return Scenario(name, hours, None, None, None)


def _is_damped(run: RunRecord) -> bool:
    return run.settings.optimizer.name.name == "ars"

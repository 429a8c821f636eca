"""What the runs say: gaps to scratch, the budget at which they close, what that saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stability.figures import Figure, figure

from inheritance.arms import ARMS
from inheritance.runner import Born, Family, Key
from inheritance.scale import Scale

Half = Literal["choosing", "reported"]
Members = Mapping[int, Born]
"""By size, 0 for the smallest."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """The family budget at which a gap closes, in multiples of the largest member's cost.

    Attributes:
        kappa: interpolated linearly in the budgets that were tried.
        bound: ``<=`` where the smallest tried was enough already, ``>`` where the largest was not.
    """

    kappa: float
    bound: Literal["=", "<=", ">"]

    def within(self, limit: float) -> bool:
        """Return whether the gap closes by ``limit``, to the two digits that steps allow."""
        return self.bound != ">" and round(self.kappa, 2) <= limit

    def __str__(self) -> str:
        """Return it as reports show it."""
        return f"{self.kappa:.2f}" if self.bound == "=" else f"{self.bound} {self.kappa:.2f}"


@dataclass(frozen=True, slots=True)
class Rung:
    """An arm at one budget.

    Attributes:
        kappa: what it really cost, whole steps and teachers included.
        gaps: held-out loss minus that of the same member from scratch, same seed, by size.
        saved: share of the FLOPs of all scratch members; None for an arm without all members.
        seconds: training time, over that of the scratch members one after another.
        parallel: the same, over that of the slowest scratch member: scratch runs side by side.
        seeds: that stand behind it.
    """

    nominal: float
    kappa: float
    gaps: Mapping[int, Figure]
    saved: float | None
    seconds: float
    parallel: float
    seeds: tuple[int, ...]

    @property
    def worst(self) -> int:
        """The size with the largest gap."""
        return max(self.gaps, key=lambda i: self.gaps[i].mean or 0.0)


@dataclass(frozen=True)
class Results:
    """Every family by arm and budget, then by seed."""

    scale: Scale
    families: Mapping[tuple[str, float], Mapping[int, Members]]

    @classmethod
    def of(cls, scale: Scale, found: Mapping[Key, Family]) -> Results:
        """Sort runs by arm, budget and seed."""
        sorted_: dict[tuple[str, float], dict[int, Members]] = {}
        for key, family in found.items():
            members = {born.size: born for born in family}
            sorted_.setdefault((key.arm, key.kappa), {})[key.seed] = members
        return cls(scale, sorted_)

    @property
    def scratch(self) -> Mapping[int, Members]:
        """The members from scratch, by seed."""
        return self.families.get(("scratch", 1.0), {})

    def sigma(self, half: Half) -> float:
        """Return the seeds' standard deviation of a scratch member, pooled over the members.

        0 below two seeds: no tolerance can be measured there.
        """
        if len(self.scratch) < 2:
            return 0.0
        sizes = range(len(self.scale.shapes))
        spread = [
            statistics.variance([getattr(m[i], half) for m in self.scratch.values()]) for i in sizes
        ]
        return math.sqrt(statistics.fmean(spread))

    def gaps(self, arm: str, kappa: float, half: Half) -> dict[int, dict[int, float]]:
        """Return gaps to scratch by size, then by seed."""
        found: dict[int, dict[int, float]] = {}
        for seed, members in self.families.get((arm, kappa), {}).items():
            if seed not in self.scratch:
                continue
            compared = members if ARMS[arm].members else {max(members)}
            for size in compared:
                born = members[size]
                gap = getattr(born, half) - getattr(self._twin(seed, size, arm), half)
                found.setdefault(size, {})[seed] = gap
        return dict(sorted(found.items()))

    def _twin(self, seed: int, size: int, arm: str) -> Born:
        """Return the scratch member to compare with: the largest, for the control of no growth."""
        last = len(self.scale.shapes) - 1
        return self.scratch[seed][last if arm == "no-growth" else size]

    def ladder(self, arm: str) -> list[float]:
        """Return the budgets an arm was run on, ascending."""
        return sorted(kappa for name, kappa in self.families if name == arm)

    def rung(self, arm: str, kappa: float, half: Half = "reported") -> Rung | None:
        """Return an arm at one budget; None where it shares no seed with scratch."""
        gaps = self.gaps(arm, kappa, half)
        if not gaps:
            return None
        seeds = tuple(sorted(next(iter(gaps.values()))))
        last = len(self.scale.shapes) - 1
        runs = [self.families[arm, kappa][seed] for seed in seeds]
        alone = [self.scratch[seed] for seed in seeds]
        spent = math.fsum(_sum(m, "flops") for m in runs)
        paid = math.fsum(_sum(m, "flops") for m in alone)
        time = math.fsum(_sum(m, "seconds") for m in runs)
        return Rung(
            nominal=kappa,
            kappa=spent / math.fsum(m[last].flops for m in alone),
            gaps={size: figure(by_seed) for size, by_seed in gaps.items()},
            saved=1 - spent / paid if ARMS[arm].members else None,
            seconds=time / math.fsum(_sum(m, "seconds") for m in alone),
            parallel=time / math.fsum(max(b.seconds for b in m.values()) for m in alone),
            seeds=seeds,
        )

    def matches(self, arm: str, kappa: float, half: Half) -> bool:
        """Return whether no member is worse than from scratch by more than the seeds' sigma."""
        gaps = self.gaps(arm, kappa, half)
        tolerance = self.sigma(half)
        return bool(gaps) and all(
            statistics.fmean(by_seed.values()) <= tolerance for by_seed in gaps.values()
        )

    def chosen(self, arm: str) -> float | None:
        """Return the least budget on which the arm matches, judged on the half that chooses."""
        return next((k for k in self.ladder(arm) if self.matches(arm, k, "choosing")), None)

    def crossing(self, arm: str, sizes: Iterable[int] | None = None) -> Crossing | None:
        """Return where the last of the gaps closes to sigma, on the half that is reported.

        Args:
            arm: run on two budgets at least, or on one that decides it.
            sizes: the members that count; all of the arm's if left out.
        """
        rungs = [r for k in self.ladder(arm) if (r := self.rung(arm, k))]
        if not rungs:
            return None
        counted = list(sizes) if sizes is not None else list(rungs[0].gaps)
        points = {
            i: [(r.kappa, r.gaps[i].mean or 0.0) for r in rungs if i in r.gaps] for i in counted
        }
        found = [_cross(p, self.sigma("reported")) for p in points.values() if p]
        open_ = [c for c in found if c.bound == ">"]
        return max(open_ or found, key=lambda c: c.kappa, default=None)

    def with_probes(self, arm: str) -> float | None:
        """Return the share saved if the budgets below the chosen one were paid for as well."""
        chosen = self.chosen(arm)
        rungs = [self.rung(arm, k) for k in self.ladder(arm) if chosen is not None and k <= chosen]
        saved = [r.saved for r in rungs if r is not None]
        if not saved or None in saved:
            return None
        return 1 - math.fsum(1 - s for s in saved if s is not None)


def _cross(points: list[tuple[float, float]], tolerance: float) -> Crossing:
    """Walk down from the largest budget for as long as the gap stays closed."""
    if points[-1][1] > tolerance:
        return Crossing(points[-1][0], ">")
    for (low, wide), (high, narrow) in zip(points[-2::-1], points[:0:-1], strict=True):
        if wide > tolerance:
            share = (wide - tolerance) / (wide - narrow)
            return Crossing(low + share * (high - low), "=")
    return Crossing(points[0][0], "<=")


def _sum(members: Members, field: Literal["flops", "seconds"]) -> float:
    return math.fsum(getattr(born, field) for born in members.values())

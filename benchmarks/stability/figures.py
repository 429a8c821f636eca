"""Means, paired differences and their intervals. A dead run is counted, never averaged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ars_kit.spread import T975

Scores = Mapping[int, float | None]
"""By seed; None where the run is dead."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over seeds.

    Attributes:
        mean: over the living; None where there are none.
        half: half the width of its 95 % interval (Student's t); None below two living.
        n: seeds that ran.
        dead: of those, how many are dead. Of a difference: how many have either side dead.
    """

    mean: float | None
    half: float | None
    n: int
    dead: int

    @property
    def clear(self) -> bool:
        """Whether the interval is there and leaves zero out."""
        return self.mean is not None and self.half is not None and abs(self.mean) > self.half


def figure(scores: Scores) -> Figure:
    """Return the mean of the living with its interval."""
    living = [v for v in scores.values() if v is not None]
    dead = len(scores) - len(living)
    if not living:
        return Figure(None, None, len(scores), dead)
    mean = math.fsum(living) / len(living)
    if len(living) == 1:
        return Figure(mean, None, len(scores), dead)
    freedom = len(living) - 1
    t = T975[freedom - 1] if freedom <= len(T975) else 1.96
    half = t * statistics.stdev(living) / math.sqrt(len(living))
    return Figure(mean, half, len(scores), dead)


def paired(a: Scores, b: Scores) -> Figure:
    """Return the mean of ``a - b`` over the seeds that both ran, with its interval."""
    return figure({s: _difference(a[s], b[s]) for s in sorted(a.keys() & b.keys())})


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


@dataclass(frozen=True, slots=True)
class Table:
    """Scores by (provocation, method), then by seed."""

    scores: Mapping[tuple[str, str], Scores]

    def of(self, provocation: str, method: str) -> Scores:
        """Return what was run; empty where nothing was."""
        return self.scores.get((provocation, method), {})

    def shared(self, *places: tuple[str, str]) -> Table:
        """Return the table cut down to the seeds that all of these places have."""
        seeds = set.intersection(*(set(self.of(*place)) for place in places))
        return Table(
            {
                place: {seed: score for seed, score in scores.items() if seed in seeds}
                for place, scores in self.scores.items()
            }
        )

    def score(self, provocation: str, method: str) -> Figure:
        """Return a method's mean score."""
        return figure(self.of(provocation, method))

    def against(self, provocation: str, method: str, other: str) -> Figure:
        """Return the paired difference to another method; negative is better."""
        return paired(self.of(provocation, method), self.of(provocation, other))

    def deaths(self, provocation: str, method: str, other: str) -> str:
        """Return who of two is dead on how many of their shared seeds, in words; may be empty."""
        pair = self.shared((provocation, method), (provocation, other))
        found = {m: pair.score(provocation, m) for m in (method, other)}
        said = [f"dead {found[method].dead}/{found[method].n}"] if found[method].dead else []
        if found[other].dead:
            said.append(f"{other} dead {found[other].dead}/{found[other].n}")
        return ", ".join(said)

    def damage(self, provocation: str, method: str) -> Figure:
        """Return provoked minus clean, paired, of one method."""
        return paired(self.of(provocation, method), self.of("clean", method))

    def better(self, provocation: str, method: str, other: str) -> bool | None:
        """Return whether a method beats another: fewer dead, or else a lower mean difference.

        None where the two share no seed.
        """
        mine, theirs = self.of(provocation, method), self.of(provocation, other)
        shared = mine.keys() & theirs.keys()
        if not shared:
            return None
        dead = [sum(side[s] is None for s in shared) for side in (mine, theirs)]
        if dead[0] != dead[1]:
            return dead[0] < dead[1]
        mean = self.against(provocation, method, other).mean
        return mean is not None and mean < 0

    def best(self, provocation: str, methods: list[str]) -> str | None:
        """Return the method of lowest mean among those without a dead run."""
        found = {m: self.score(provocation, m) for m in methods}
        alive: Callable[[str], bool] = lambda m: not found[m].dead and found[m].mean is not None  # noqa: E731
        return min(filter(alive, found), key=lambda m: found[m].mean or 0.0, default=None)

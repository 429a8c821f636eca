"""The plan's six metrics and the trend it expected of each, with what was measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ars_kit.records import MemberRecord, RunRecord
from ars_kit.rules import unalike

Verdict = Literal["holds", "does not hold", "not measured here"]
SAME = 0.10
"""Figures that differ by no more than this share of the smallest count as equal."""
RULE = (
    "A trend holds where the last member is better than the first and more than half of the steps "
    "from member to member go that way; figures are equal where the largest is at most 10 % above "
    "the smallest. The time is compared among the heirs, where they train for equally many steps."
)


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation and what became of it.

    Attributes:
        found: what was measured, in words.
    """

    metric: str
    expected: str
    found: str
    verdict: Verdict


def checks(run: RunRecord) -> list[Check]:
    """Return the plan's checklist for a run, finished or not."""
    members = run.finished
    names = {m.name for m in run.members}
    trained = [m for m in members if m.metrics.get("steps")]
    heirs = [m for m in trained if m.metrics["parent_model"] in names]
    equally = len({m.metrics["steps"] for m in heirs}) == 1  # some may have tokens of their own
    times = _of(heirs, "training_time") if equally else []
    # Losses on texts of their own say nothing about each other, nor do those judged otherwise.
    one_text = trained if len({m.metrics.get("data_hash") for m in trained}) == 1 else []
    alike = unalike(((m.name, m.metrics) for m in members), "bits_per_byte") is None
    spread = [(m.name, _unsteadiness(m)) for m in trained]
    if not any(value for _, value in spread):  # nothing was ever damped
        spread = [(name, None) for name, _ in spread]
    converged = _of(one_text, "convergence_iterations")
    return [
        _trend("training loss", "falls", _of(one_text, "final_loss"), (3, "")),
        _equal("time", "stays equal", times, (1, " s")),
        _trend("convergence", "gets faster", converged, (0, " iterations")),
        _trend("damping", "gets steadier", spread, (3, "")),
        _equal("VRAM", "stays equal", _of(trained, "vram_usage_peak"), (2, " GB")),
        _trend(
            "quality", "rises", _of(members if alike else [], "bits_per_byte"), (3, " bits/byte")
        ),
    ]


Figures = Sequence[tuple[str, float | None]]
Form = tuple[int, str]
"""Decimals that are enough as a rule, and the unit."""


def _of(members: Sequence[MemberRecord], key: str) -> Figures:
    found: list[tuple[str, Any]] = [(m.name, m.metrics.get(key)) for m in members]
    return found


def _unsteadiness(member: MemberRecord) -> float | None:
    """Return the standard deviation of a member's damping over the steps it took."""
    taken = [r["gradient"] * r["step_size"] for r in member.history if not r["skipped"]]
    return statistics.pstdev(taken) if taken else None


def _trend(metric: str, expected: str, figures: Figures, form: Form) -> Check:
    """Judge a figure that is to go down from member to member."""
    return _judge(metric, expected, figures, form, _falls)


def _equal(metric: str, expected: str, figures: Figures, form: Form) -> Check:
    return _judge(metric, expected, figures, form, _alike)


def _judge(
    metric: str,
    expected: str,
    figures: Figures,
    form: Form,
    rule: Callable[[Sequence[float]], tuple[bool, str]],
) -> Check:
    there = [(name, value) for name, value in figures if value is not None]
    if len(there) < 2 or len(there) < len(figures):
        return Check(metric, expected, "-", "not measured here")
    (first, start), (last, end) = there[0], there[-1]
    holds, how = rule([value for _, value in there])
    decimals, unit = form
    shown = _decimals(decimals, lambda n: (f"{start:.{n}f}" == f"{end:.{n}f}") == (start == end))
    found = f"{first} {start:.{shown}f}{unit}, {last} {end:.{shown}f}{unit}; {how}"
    return Check(metric, expected, found, "holds" if holds else "does not hold")


def _decimals(least: int, tells: Callable[[int], bool]) -> int:
    """Return the decimals from which on a figure says what its verdict says."""
    return next((n for n in range(least, least + 6) if tells(n)), least)


def _falls(values: Sequence[float]) -> tuple[bool, str]:
    steps = list(pairwise(values))
    down = sum(after < before for before, after in steps)
    return values[-1] < values[0] and down > len(
        steps
    ) / 2, f"better in {down} of {len(steps)} steps"


def _alike(values: Sequence[float]) -> tuple[bool, str]:
    low, high = min(values), max(values)
    ratio, holds = high / low if low else float("inf"), high <= low * (1 + SAME)
    shown = _decimals(2, lambda n: (round(ratio, n) <= 1 + SAME) == holds)
    return holds, f"largest is {ratio:.{shown}f} times the smallest"

"""A run in three sentences: the best, what inheritance was worth here, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from ars_kit.comparison import Comparison, Reached
from ars_kit.records import RunRecord
from ars_kit.rules import unalike
from ars_kit.sections import interval, parts_of
from ars_kit.spread import Spread

DECISIVE = ("no-growth", "one-long-run", "scratch", "no-ars")
"""Controls, the one first that decides most: growth must beat the smallest on equal FLOPs."""


def summary(run: RunRecord, comparison: Comparison) -> list[str]:
    """Return three sentences, each about what was measured alone."""
    return [_best(run), *_claim(comparison)]


def _best(run: RunRecord) -> str:
    judged = [m for m in run.finished if m.metrics.get("bits_per_byte") is not None]
    if not judged:
        done, all_ = len(run.finished), len(run.members)
        return f"{done} of {all_} members are finished, and none has been judged on held-out text."
    rest = "" if run.is_complete else f" so far, {len(run.finished)} of {len(run.members)} finished"
    if told := unalike(((m.name, m.metrics) for m in judged), "bits_per_byte"):
        return f"Of {len(judged)} members none can be called best on held-out text{rest}: {told}."
    best = min(judged, key=lambda m: m.metrics["bits_per_byte"])
    bounds = interval(best.metrics, "bits_per_byte")
    within = (
        ""
        if bounds is None
        else f" (95 % interval over {parts_of(best.metrics)} {bounds[0]:.4f} to {bounds[1]:.4f})"
    )
    return (
        f"Of {len(judged)} members {best.name} is best on held-out text{rest}: "
        f"{best.metrics['bits_per_byte']:.4f} bits per byte{within}."
    )


def _claim(comparison: Comparison) -> tuple[str, str]:
    rows = [r for r in comparison.reached if r.control is not None]
    kinds = {r.group for r in rows}
    name = next((n for n in DECISIVE if n in kinds), next(iter(kinds), None))
    if name is None:
        why = next((r.why for r in comparison.reached if r.why), "no control is there")
        nothing = f"Nothing is said of what inheritance or damping saved: {why}."
        return nothing, "Hence there is no interval either."
    chosen = [r for r in rows if r.group == name]
    last = [r for r in chosen if r.member == chosen[-1].member]
    return _worth(name, last), _interval(last)


def _worth(name: str, rows: Sequence[Reached]) -> str:
    control = f"{rows[0].member} of control {name}"
    shares = [r.saved() for r in rows]
    spread = None if None in shares else Spread.of(shares)
    if spread is None:
        missed = shares.count(None)
        often = "" if len(rows) == 1 else f" with {missed} of {len(rows)} seeds"
        return f"The family did not reach the held-out loss of {control}{often}."
    share = round(100 * spread.mean)
    sign = "fewer" if share >= 0 else "more"
    return (
        f"It reached the held-out loss of {control} with {abs(share)}% {sign} FLOPs than "
        "the control spent, those of all ancestors counted."
    )


def _interval(rows: Sequence[Reached]) -> str:
    spread = Spread.of([r.saved() for r in rows])
    if len(rows) == 1:
        return (
            f"That was measured with one seed ({rows[0].seed}), so there is no interval, and it "
            "may be chance."
        )
    if spread is None or spread.low is None or spread.high is None or spread.n < len(rows):
        return f"Of {len(rows)} seeds not enough reached it for an interval."
    return (
        f"Over {spread.n} seeds the 95 % interval of that saving is {round(100 * spread.low)}% to "
        f"{round(100 * spread.high)}%."
    )

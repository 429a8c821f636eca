"""How a member learned, from its training losses. Every definition stands in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence

CONVERGED = 0.05
"""A member has converged where its smoothed loss is within this share of its whole improvement."""

SMOOTHING = 0.9
"""Weight of the past in the smoothed training loss (a debiased exponential average)."""

FINAL_SHARE = 0.05
"""The final loss is the mean over this last share of the accepted steps, and over ten at least."""


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the debiased exponential average of ``losses`` (Adam's bias correction, 1412.6980)."""
    average, out = 0.0, []
    for n, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        out.append(average / (1 - SMOOTHING**n))
    return out


def final_loss(losses: Sequence[float]) -> float | None:
    """Return the mean of the last 5 % of the losses, and of ten at least; None without any."""
    if not losses:
        return None
    tail = losses[-max(10, round(FINAL_SHARE * len(losses))) :]
    return sum(tail) / len(tail)


def convergence_step(losses: Sequence[float]) -> int | None:
    """Return the first step, counted from 1, whose smoothed loss is within 5 % of the improvement.

    With s the smoothed loss: the first t with s_t <= s_end + 0.05 (s_1 - s_end). None where there
    are no losses or nothing improved, since then nothing converged.
    """
    curve = smoothed(losses)
    if not curve or curve[-1] >= curve[0]:
        return None
    bound = curve[-1] + CONVERGED * (curve[0] - curve[-1])
    return next(t for t, loss in enumerate(curve, start=1) if loss <= bound)

"""Learning rate over one member's steps, as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["wsd", "cosine", "constant"]


def lr_factor(
    step: int,
    *,
    steps: int,
    schedule: Schedule,
    warmup: int,
    decay_fraction: float,
    start: float = 0.0,
) -> float:
    """Return what the peak learning rate is multiplied by at ``step``, counted from 0.

    The warm-up is linear from ``start`` and reaches 1 at step ``warmup``; it is cut short where the
    member has fewer steps. ``wsd`` (warm-up, stable, decay: Hu et al., 2404.06395) falls linearly
    to 0 over the last ``decay_fraction`` of the steps; ``cosine`` (Loshchilov & Hutter, 1608.03983)
    falls to 0 from the end of the warm-up.
    """
    warmup = climbing(steps, warmup)
    if step < warmup:
        return start + (1 - start) * (step + 1) / (warmup + 1)
    left = (steps - step) / steps
    if schedule == "wsd":
        return min(1.0, left / decay_fraction) if decay_fraction else 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return 1.0


def climbing(steps: int, warmup: int) -> int:
    """Return in how many of its ``steps`` a member's rate climbs, where ``warmup`` is wanted."""
    return min(warmup, steps // 2)


def stable_steps(steps: int, decay_fraction: float) -> int:
    """Return how many of its ``steps`` a member under ``wsd`` takes before the rate falls."""
    return min(steps, math.floor(steps * (1 - decay_fraction)) + 1)

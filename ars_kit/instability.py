"""Long instability: a loss that stays far above the best it has been, told from the log alone.

A single bad batch is a gate's affair. Where the loss rises and stays, no damping of the steps to
come brings it back, and the remedy that is known to work is to go back to a state from before and
to leave out the batches that were read since (Chowdhery et al., PaLM, 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 32
"""Losses that a reading is the median of."""
EVERY = 8
"""Steps between readings."""
MAD_TO_SIGMA = 1.4826
"""Of normal deviates, sigma over the median absolute deviation."""


@dataclass(frozen=True, slots=True)
class Instability:
    """What was found.

    Attributes:
        since: the first step that may be part of it; a state from before is sound.
        noticed: the step whose loss decided.
        median: of the losses at last, in nats per token; infinite where most are not finite.
        best: the lowest median before.
        sigma: of the losses around the best, estimated robustly.
    """

    since: int
    noticed: int
    median: float
    best: float
    sigma: float

    def __str__(self) -> str:
        """Return it as a clause: what, since when, how far."""
        return (
            f"the median loss stands at {self.median:.3f} up to step {self.noticed}, more than it "
            f"should above its best, {self.best:.3f} (sigma {self.sigma:.3f}), since step "
            f"{self.since} or later"
        )


class Watch:
    """Tells long instability from the rows that an optimizer has recorded, one by one.

    Every 8 steps the median of the last 32 losses is read, skipped steps included, a loss that is
    not finite as infinite. A reading is high where it lies more than ``limit`` sigmas above the
    lowest one so far, sigma = max(1.4826 MAD, 0.01 |median|, 0.02) of the window of that lowest
    one. Readings that are high without a break for ``steps`` steps are an instability. So what is
    found is a function of the losses and their steps, not of when somebody looks.

    Args:
        limit: sigmas above the best that are too many.
        steps: how long that must last.
    """

    def __init__(self, *, limit: float = 6.0, steps: int = 64) -> None:
        if not limit > 0 or steps < 0:
            raise ValueError("limit must be greater than 0, and steps must not be negative")
        self.limit, self.steps = limit, steps
        self.read = -1
        self.high_since: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._best = math.inf
        self._sigma = 0.0

    def look(self, rows: Iterable[Mapping[str, Any]]) -> Instability | None:
        """Take in rows in order; return the first instability, with the rows behind it unread.

        Args:
            rows: as :meth:`ars_kit.damping.DampedOptimizer.drain` returns them.
        """
        for row in rows:
            found = self._take(int(row["step"]), row["loss"])
            if found is not None:
                return found
        return None

    @property
    def calm(self) -> bool:
        """Whether the last reading was not high."""
        return self.high_since is None

    def _take(self, step: int, loss: float | None) -> Instability | None:
        finite = loss is not None and math.isfinite(loss)
        self._losses.append(float(loss) if finite else math.inf)  # type: ignore[arg-type]
        if (step + 1) % EVERY or len(self._losses) < WINDOW:
            return None
        self.read = step
        middle = median(self._losses)
        if middle < self._best:
            spread = MAD_TO_SIGMA * median(abs(v - middle) for v in self._losses)
            self._best, self._sigma = middle, max(spread, 0.01 * abs(middle), 0.02)
        if not middle > self._best + self.limit * self._sigma:
            self.high_since = None
            return None
        if self.high_since is None:
            self.high_since = step
        if step - self.high_since < self.steps:
            return None
        since, self.high_since = self.high_since - WINDOW + 1, None
        return Instability(since, step, middle, self._best, self._sigma)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers that restore this watch exactly."""
        return {
            "losses": list(self._losses),
            "best": self._best,
            "sigma": self._sigma,
            "read": self.read,
            "high_since": self.high_since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._best, self._sigma = state["best"], state["sigma"]
        self.read, self.high_since = state["read"], state["high_since"]

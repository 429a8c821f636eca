"""A base optimizer without a gate in a run: what is recorded of its steps all the same."""

from __future__ import annotations

from torch import Tensor

from ars_kit.damping import DampedOptimizer


class Undamped(DampedOptimizer):
    """Steps as the base does, and records each step's loss for whoever drains it.

    A run's history, its final loss and its watch for instability are made of these rows; in a loop
    of one's own :class:`DampedOptimizer` without gates is the base and nothing else.
    """

    def _take_loss(self) -> Tensor | None:
        seen = super()._take_loss()
        if seen is not None:
            self._telemetry.note_undamped(self._memory.steps, seen)
        return seen

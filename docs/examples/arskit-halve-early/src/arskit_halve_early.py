"""The damping gate halve-early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ars_kit.spec import DampingGate, Offer, StepSignal, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class HalveEarly:
    """Halve the step size of the first steps.

    Args:
        steps: how many.
    """

    acts_on = "step"

    def __init__(self, *, steps: int = 10) -> None:
        self.steps = steps

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return this step's factor, made on its device without waiting for it."""
        return signal.loss.new_full((), 0.5 if signal.step < self.steps else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the gate remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


@hookimpl
def arskit_gates() -> list[Offer[DampingGate]]:
    """Offer the gate."""
    return [Offer("halve-early", "halve the first steps", HalveEarly)]

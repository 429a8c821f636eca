"""What a damping gate is told of a step, and what it answers.

Plugin authors import all of this from :mod:`ars_kit.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepSignal:
    """What a gate sees of one optimizer step. Every tensor lies on the training device.

    Attributes:
        step: optimizer steps asked for before this one, skipped ones included.
        loss: 0-d float32; mean loss of the effective batch over all ranks, in nats per token.
        lr: learning rate of the first parameter group before damping.
        skip: 0-d bool; an earlier gate already asked to skip this step. A gate that remembers
            losses must not learn from such a step.
        damping: 0-d float32; product of the 0-d gradient factors of the gates before this one.
        step_damping: 0-d float32; product of the step factors of the gates before this one.
        last_damping: 0-d float32; gradient factor times step factor of the step before, or 1.
        norms: call for the gradient norm of each tensor, shape (n_tensors,), float32, unscaled.
            Computed once a step however many gates ask; costs one read of the gradients.
        alignment: call for the cosine between this step's gradient and the base's first moment, 0-d
            float32, in [-1, 1]. Negative: the steps so far went past the lowest point in their
            direction. NaN where the base keeps no first moment. Computed once a step however many
            gates ask; costs one read of the gradients and two of the moments.
        gradients: whether norms and alignment can be called. False where parameters are stepped
            within the backward pass (``--memory tiny``), so that never all gradients are there: a
            gate that calls them all the same is refused.
    """

    step: int
    loss: Tensor
    lr: float | Tensor
    skip: Tensor
    damping: Tensor
    step_damping: Tensor
    last_damping: Tensor
    norms: Callable[[], Tensor]
    alignment: Callable[[], Tensor]
    gradients: bool = True


class Damping(NamedTuple):
    """What a gate asks of this step; ``None`` leaves that part alone. Factors multiply.

    Attributes:
        gradient: multiplies the gradient *before it enters the optimizer's moments*: for
            transients. Shape (), or (n_tensors,) for one factor a tensor.
        step: multiplies the learning rate: for lasting instability (an adaptive optimizer
            divides a lasting gradient factor out again). Shape ().
        skip: 0-d bool; leave weights and moments untouched.
    """

    gradient: Tensor | None = None
    step: Tensor | None = None
    skip: Tensor | None = None


class DampingGate(Protocol):
    """Looks at each step and says how hard to damp it.

    A call returns a 0-d float32 tensor in [0, 1] (1: undamped) or a :class:`Damping`. It must not
    synchronise with the host (no ``.item()``, ``float()``, ``if tensor:``) and must keep O(1)
    memory. A plain tensor multiplies the gradient unless the class says ``acts_on = "step"``. One
    whose class says ``finite_only = True`` lets no gradient pass that is not finite: where
    ``StepSignal.gradients`` is False the optimizer looks at each parameter's for it.

    A gate may say why: ``explain() -> Mapping[str, Tensor]``, called after each step's answer,
    returns 0-d tensors under names that stay the same; they stand beside the gate's factor in
    ``history.jsonl`` as ``GATE_NAME``. ``ars_kit.testing.check_gate`` holds a gate to all of this.
    """

    def __call__(self, signal: StepSignal) -> Tensor | Damping:
        """Return this step's factor."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers that restore this gate exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        ...


GateStack = Mapping[str, DampingGate]
"""Named gates in the order they are asked; what an optimizer wrapper such as ``ars`` is made of."""

"""An optimizer that steps within the backward pass: each parameter once its gradient is whole.

The gradient is freed at once, so that never all of them stand in memory (Lv et al., LOMO,
2306.09782; torch's tutorial "How to save memory by fusing the optimizer step into the backward
pass"). What needs all gradients, such as clipping by their norm, is impossible then. Gates that
judge the loss are not: their factors are known before the backward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.damping import DampedOptimizer
from ars_kit.errors import ConfigError, PluginError
from ars_kit.factors import Factors, ask, gradients_of, is_quantised, norms_of
from ars_kit.fold import multiply, rates
from ars_kit.spec import DampingGate, StepSignal

DROPPED = "dropped"
"""In a step's row: parameters that were left as they were, since their gradient was not finite."""

TRIED = 48
"""Steps of a trial; the last have a loss that stands out, for gates that look closer then."""


class AbsentGradientsError(PluginError):
    """A gate asked for what all gradients together would say."""

    def __init__(self) -> None:
        super().__init__(
            "asks for the norms or the alignment of all gradients, which never stand together "
            "where parameters are stepped within the backward pass"
        )


@dataclass(slots=True)
class _Pass:
    """One backward pass.

    Attributes:
        loss: of the step; None where nobody told it.
        total: the gates' factors; None where there are no gates.
        skip: of the factors, read where that costs nothing; likewise ``step``.
        vector: factors of the gradients by tensor, (n_tensors,); None where all have one.
        gradient: that one.
        arrived: parameters whose gradient came.
        dropped: those of them that were not stepped for a gradient that is not finite.
    """

    loss: Tensor | None = None
    total: Factors | None = None
    skip: bool | Tensor = False
    gradient: float | Tensor = 1.0
    step: float | Tensor | None = None
    vector: Tensor | None = None
    arrived: int = 0
    dropped: int | Tensor = 0


class InBackward(DampedOptimizer):
    """Wraps ``base`` as :class:`DampedOptimizer` does, and steps within the backward pass.

    ::

        optimizer.observe(loss)
        with optimizer.in_backward():
            loss.backward()
        optimizer.step()

    Of several micro-batches the last backward pass alone is taken so; gradients stand until then.
    Where a gate is ``finite_only``, a parameter whose gradient is not finite keeps its weights and
    moments, and the others are stepped.

    On the CPU factors are read, which costs nothing there. On an accelerator nothing waits, but at
    a parameter's very first step: weights and moments of one parameter at a time are copied, and
    put back by a ``where`` on the device if it is not to be stepped.

    Args:
        base: the optimizer; a step of its over one parameter must depend on no other parameter.
        gates: as of :class:`DampedOptimizer`; none may ask for norms or alignment.
        owners: likewise.
        on_device: read nothing; by default where the parameters are on an accelerator.
    """

    def __init__(
        self,
        base: Optimizer,
        gates: Mapping[str, DampingGate],
        *,
        owners: Mapping[str | None, str] | None = None,
        on_device: bool | None = None,
    ) -> None:
        super().__init__(base, gates, owners=owners)
        self._on_device = on_device
        self._finite_only = any(getattr(gate, "finite_only", False) for gate in gates.values())
        self._passed: _Pass | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True, so that a GradScaler comes to :meth:`step` and is refused there in words."""
        return True

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Step each parameter whose gradient becomes whole in here, and free the gradient.

        The step's loss must have been observed before. :attr:`intact` is False from the first
        parameter's step until :meth:`step`.

        Raises:
            PluginError: a gate failed, before anything was stepped; or the base did.
        """
        began = self._begin()
        places = ((group, p) for group in self.param_groups for p in group["params"])
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, began, group, place))
            for place, (group, p) in enumerate(places)
        ]
        try:
            yield
        finally:
            for handle in handles:  # or parameters would hold the optimizer, which holds them
                handle.remove()
        self._passed = began

    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """End the step that was taken within the backward pass: count and record it.

        Raises:
            ConfigError: there was no backward pass in :meth:`in_backward`, or its loss was scaled.
        """
        if hasattr(self, "found_inf"):
            raise ConfigError(
                "a GradScaler has to see all gradients before a step, which are gone where "
                "parameters are stepped within the backward pass; train in bf16 or fp32"
            )
        passed, self._passed = self._passed, None
        if passed is None or closure is not None or loss is not None:
            raise ConfigError(
                "parameters are stepped within the backward pass: observe the loss, then call "
                "backward() in in_backward(), and step() without arguments after it"
            )
        memory, total = self._memory, passed.total
        if total is not None and passed.loss is not None:
            dropped = torch.as_tensor(passed.dropped, device=passed.loss.device)
            total.explained[DROPPED] = dropped.float()
            if passed.arrived:  # where nothing was stepped, the step was skipped
                total.skip = total.skip | (dropped == passed.arrived)
            memory.answers.clear()
            memory.last = total.gradient * total.step
            self._telemetry.note(memory.steps, passed.loss, total)
        elif passed.loss is not None:
            self._telemetry.note_undamped(memory.steps, passed.loss)
        memory.steps += 1
        memory.intact = True

    def _begin(self) -> _Pass:
        """Ask the gates about the step to come."""
        loss = self._take_loss()
        if loss is None or not self.gates:
            return _Pass(loss)
        count = sum(len(group["params"]) for group in self.param_groups)
        total = Factors(torch.ones_like(loss), count)
        with torch.no_grad():
            self.ask_all(loss, total, absent, absent, gradients=False)
        self._telemetry.expect(self._memory.steps, (*total.explained, DROPPED))
        if self._stays_on_device():
            step = total.step if total.steps_damped else None
            began = _Pass(loss, total, total.skip, total.gradient, step)
        else:
            skip, by, rate = total.read(None)
            began = _Pass(loss, total, skip, by, None if rate == 1.0 else rate)
        if total.vector is not None:
            began.vector = total.vector * total.gradient
        return began

    def _stays_on_device(self) -> bool:
        return self._device().type != "cpu" if self._on_device is None else self._on_device

    def _arrived(self, began: _Pass, group: dict[str, Any], place: int, p: Tensor) -> None:
        """Step one parameter and free its gradient."""
        began.arrived += 1
        with torch.no_grad():
            (grad,) = gradients_of([{"params": [p]}])
            keep: Tensor | None = None
            if began.total is not None and self._finite_only:
                keep = norms_of([grad], grad.device).isfinite().all()
            if self._stays_on_device():
                self._step_there(began, group, place, p, grad, keep)
            elif keep is not None and not keep:
                began.dropped += 1
            elif not began.skip:
                self._step_one(began, group, place, p, grad)
        p.grad = None

    def _step_one(
        self, began: _Pass, group: dict[str, Any], place: int, p: Tensor, grad: Tensor
    ) -> None:
        with self._stepping(), rates(self.base, began.step):
            if began.vector is not None:
                multiply([grad], began.vector[place : place + 1])
            elif isinstance(began.gradient, Tensor) or began.gradient != 1.0:
                grad.mul_(began.gradient)
            step_alone(self.base, group, p)
        self._memory.intact = False  # until the others are stepped too

    def _step_there(
        self,
        began: _Pass,
        group: dict[str, Any],
        place: int,
        p: Tensor,
        grad: Tensor,
        finite: Tensor | None,
    ) -> None:
        """Step without asking the device whether to; undo it there if not."""
        keep = finite
        if finite is not None:
            began.dropped = began.dropped + (~finite).long()
        if isinstance(began.skip, Tensor):
            keep = ~began.skip if finite is None else finite & ~began.skip
        if keep is None:
            self._step_one(began, group, place, p, grad)
            return
        if not self.base.state.get(p):  # a moment that is not there yet cannot be put back
            if keep:
                self._step_one(began, group, place, p, grad)
            return
        before = held(p, self.base.state[p])
        self._step_one(began, group, place, p, grad)
        for now, then in zip(_parts(p, self.base.state[p]), before, strict=True):
            torch.where(keep, now, then, out=now)


def absent() -> Tensor:
    """Stand for norms and alignment of gradients that never stand together.

    Raises:
        AbsentGradientsError: always.
    """
    raise AbsentGradientsError


def looks_at_gradients(gate: DampingGate) -> bool:
    """Whether a gate asks for norms or alignment, in a trial of 48 steps.

    Raises:
        Exception: whatever else the gate raises.
    """
    one, no = torch.ones(()), torch.zeros((), dtype=torch.bool)
    for step in range(TRIED):
        loss = torch.tensor(4.0 - 0.001 * step if step < TRIED - 8 else 40.0 + step)
        signal = StepSignal(step, loss, 1e-3, no, one, one, one, absent, absent, gradients=False)
        try:
            ask(gate, signal)
        except AbsentGradientsError:
            return True
    return False


def step_alone(base: Optimizer, group: dict[str, Any], p: Tensor) -> None:
    """Let an optimizer step one parameter of a group, as if it had no other."""
    groups, params = base.param_groups, group["params"]
    base.param_groups, group["params"] = [group], [p]
    try:
        base.step()
    finally:
        base.param_groups, group["params"] = groups, params


def held(p: Tensor, state: dict[str, Any]) -> list[Tensor]:
    """Return copies of a parameter and of its state, which must not be empty.

    Counts of steps that lie on the host are brought to the parameter's device: they could not be
    put back there without waiting.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and not value.ndim and value.device != p.device:
            state[key] = value.to(p.device)
    return [part.clone() for part in _parts(p, state)]


def _parts(p: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """Return the plain tensors that a parameter and its state are made of."""
    found = [p.detach()]
    for value in state.values():
        if isinstance(value, Tensor) and is_quantised(value):
            names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
            found += [getattr(value, name) for name in names]
        elif isinstance(value, Tensor):
            found.append(value)
    return found

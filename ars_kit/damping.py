"""An optimizer with damping gates around it: any torch optimizer instance, any gates.

Each step the gates see the loss (and, if they ask, the gradient norms) and answer with factors. A
gradient factor acts before the moments, a step factor on the learning rate, a skip on nothing at
all. Everything stays on the device: where the base is a fused Adam, AdamW or SGD on an
accelerator, factors and skip ride along in its own kernel (``grad_scale``, ``found_inf``, a tensor
learning rate). On the CPU reading them costs nothing. For any other base on an accelerator they
are read once a step, the one synchronisation there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ars_kit.errors import ConfigError, PluginError
from ars_kit.factors import Answer, Factors, Once, alignment_of, ask, gradients_of, norms_of
from ars_kit.fold import apply, can_fold, lent
from ars_kit.spec import DampingGate, StepSignal
from ars_kit.step_loss import StepLoss
from ars_kit.telemetry import Telemetry
from ars_kit.wrapper import Wrapper


@dataclass(slots=True)
class Memory:
    """What changes from step to step.

    One object, since wrappers such as Lightning's hand attribute reads on to the optimizer they
    wrap, but keep what is assigned to themselves.

    Attributes:
        loss: of the step to come.
        steps: asked for so far.
        last: gradient factor times step factor of the step before.
        used: identifies the gradients that the last step was made of.
        answers: of the gates that were asked already about a step that broke off.
        intact: weights and moments are those after a whole step; False where the base broke off.
    """

    loss: StepLoss
    steps: int = 0
    last: Tensor | None = None
    used: tuple[int, int] | None = None
    answers: dict[str, Answer] = field(default_factory=dict)
    intact: bool = True


class DampedOptimizer(Wrapper):
    """Wraps ``base`` so that ``gates`` may damp each of its steps.

    The loss arrives by ``step(closure)``, ``step(loss=...)`` or, for each micro-batch,
    :meth:`observe`. A step for which none arrived is the base's own, bit for bit.

    Args:
        base: the optimizer; its ``param_groups`` and ``state`` stay its own.
        gates: by name, in the order they are asked; their factors multiply.
        reduce: means a loss over all ranks, as in :class:`StepLoss`.
        fold: let a fused base apply the factors itself; by default wherever it can and the
            parameters are on an accelerator.
        owners: the plugin that each gate comes from, and under None that of the base, for
            complaints. A base without one raises its own errors.

    Raises:
        ConfigError: the base evaluates the loss itself (LBFGS), or cannot fold and should.
    """

    def __init__(
        self,
        base: Optimizer,
        gates: Mapping[str, DampingGate],
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        fold: bool | None = None,
        owners: Mapping[str | None, str] | None = None,
    ) -> None:
        super().__init__(base)
        self.gates: dict[str, DampingGate] = dict(gates)
        self._fold = fold
        self._owners = dict(owners or {})
        self._memory = Memory(StepLoss(reduce))
        self._telemetry = Telemetry(self.gates)
        kind = type(base).__name__
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{kind} evaluates the loss itself, many times a step: no step to damp"
            )
        if fold and not can_fold(base):
            raise ConfigError(
                f"only a fused Adam, AdamW or SGD folds the factors in, not this {kind}"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        memory, found = self._memory, self._gradients()
        if found and found != memory.used:
            # No step was made of them: a GradScaler left it out. Their loss goes with them.
            memory.loss.forget()
        self.base.zero_grad(set_to_none)
        memory.used = self._gradients()

    def _gradients(self) -> tuple[int, int] | None:
        """Identify the gradients there are now: the first one, and how often it was written to."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    return id(p.grad), p.grad._version  # noqa: SLF001 -- no other way to know
        return None

    def observe(self, loss: Tensor | float) -> None:
        """Add one micro-batch's share of this step's loss; shares are summed.

        Args:
            loss: one number; already divided by the number of micro-batches, as for ``backward``.

        Raises:
            ConfigError: it is more than one number.
        """
        self._memory.loss.add(loss, self._device())

    def send(self) -> None:
        """Begin to mean the loss over all ranks, once all of this step's is observed.

        Called before the backward pass, the reduction runs beside it and the step finds it done.
        Does nothing where there is nothing to reduce, or no way to do it beside.
        """
        self._memory.loss.send()

    def forget(self) -> None:
        """Forget the gradients and the loss of a step that is to be begun anew."""
        self._memory.loss.forget()
        self.zero_grad()

    # Gates keep a history in Python: compiled, each step would be a program of its own. This is
    # torch.compiler.disable without importing the compiler.
    @_disable_dynamo
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Ask the gates, then let the base step, damped.

        Args:
            closure: evaluates the loss and its gradients. What it returns is this step's loss,
                unless it has told a loss itself by :meth:`observe`.
            loss: this step's loss, or its last micro-batch's share.

        Raises:
            PluginError: a gate raised or returned something else than a factor. Weights, moments
                and gates are then as they were; the next call takes the same step.
        """
        answer = None
        if closure is not None:
            with torch.enable_grad():
                answer = closure()
            if answer is not None and self._memory.loss.told is None:
                self.observe(answer)
        if loss is not None:
            self.observe(loss)
        memory = self._memory
        seen = self._take_loss()
        if seen is not None and self.gates:
            with torch.no_grad():
                self._damped_step(seen)
        elif hasattr(self, "found_inf"):
            with lent(self.base, self.grad_scale, self.found_inf), self._stepping():
                self.base.step()
        else:
            with self._stepping():
                self.base.step()
        memory.steps += 1
        memory.used = self._gradients()
        return answer

    def _take_loss(self) -> Tensor | None:
        return self._memory.loss.take()

    @property
    def intact(self) -> bool:
        """Whether weights and moments are those after a whole step, not after half of one."""
        return self._memory.intact

    @intact.setter
    def intact(self, intact: bool) -> None:
        self._memory.intact = intact

    def called(self, name: str | None) -> str:
        """Return how a complaint calls a gate, or under None the base."""
        what = "the base optimizer" if name is None else f"damping gate {name!r}"
        return f"{what} of plugin {self._owners[name]}" if name in self._owners else what

    def _damped_step(self, loss: Tensor) -> None:
        memory, grads = self._memory, gradients_of(self.param_groups)
        scale = getattr(self, "grad_scale", None)
        total = Factors(torch.ones_like(loss), len(grads))
        if hasattr(self, "found_inf"):
            total.skip = self.found_inf.to(loss.device) > 0
        scaled = Once(lambda: norms_of(grads, loss.device))
        norms = scaled if scale is None else Once(lambda: scaled() / scale)
        alignment = Once(lambda: alignment_of(self.base, scaled()))
        self.ask_all(loss, total, norms, alignment)
        self._telemetry.expect(memory.steps, tuple(total.explained))
        if grads:
            with self._stepping():
                apply(self.base, grads, total, scale=scale, fold=self._fold)
        memory.answers.clear()
        memory.last = total.gradient * total.step
        self._telemetry.note(memory.steps, loss, total)

    def ask_all(
        self,
        loss: Tensor,
        total: Factors,
        norms: Callable[[], Tensor],
        alignment: Callable[[], Tensor],
        *,
        gradients: bool = True,
    ) -> None:
        """Ask the gates about a step, and multiply their answers into ``total``.

        The other arguments are those of :class:`StepSignal`.
        """
        memory, lr = self._memory, self.param_groups[0]["lr"]
        last = torch.ones_like(loss) if memory.last is None else memory.last
        for name, gate in self.gates.items():
            signal = StepSignal(
                memory.steps,
                loss,
                lr,
                total.skip,
                total.gradient,
                total.step,
                last,
                norms,
                alignment,
                gradients,
            )
            self._ask(name, gate, signal, total)

    def _ask(self, name: str, gate: DampingGate, signal: StepSignal, total: Factors) -> None:
        """Multiply a gate's answer in.

        Where a step broke off, the gates that had answered keep their answers: they have learned
        from it already.
        """
        answers = self._memory.answers
        try:
            answer = answers.get(name) or ask(gate, signal)
            total.add(name, answer, bounded=getattr(gate, "bounded", True))
        except torch.OutOfMemoryError:  # the device's affair
            raise
        except PluginError as error:
            raise PluginError(f"{self.called(name)} {error}") from error
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.called(name)} failed at step {signal.step}: {error!r}"
            ) from error
        answers[name] = answer

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Note whether the base came through its step, and name the plugin that it is of if not."""
        self._memory.intact = False
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            if None not in self._owners:
                raise
            raise PluginError(
                f"{self.called(None)} failed at step {self._memory.steps}: {error!r}"
            ) from error
        self._memory.intact = True

    def _device(self) -> torch.device:
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    def drain(self) -> list[dict[str, Any]]:
        """Return and forget what was recorded of each step since the last call; synchronises once.

        Each row has ``step``, ``loss``, ``gradient`` and ``step_size`` (factors), ``skipped``,
        each gate's factor by the gate's name, and what gates explain by ``GATE_NAME``: a row with
        ``surprise`` 0.31 and ``surprise_z`` 7.2 says how hard that gate damped and why.

        Raises:
            PluginError: a gate has returned a factor outside [0, 1] or not finite.
        """
        for name, (count, first) in self._telemetry.broken().items():
            at = "" if first is None else f" at step {first}"
            raise PluginError(
                f"{self.called(name)} returned a factor outside [0, 1] or not finite{at}, "
                f"{count} times before step {self._memory.steps}"
            )
        return self._telemetry.drain()

    def summary(self) -> dict[str, Any]:
        """Return steps, skipped steps, mean damping and each gate's mean factor; synchronises."""
        return self._telemetry.summary()

    def damping_state(self) -> dict[str, Any]:
        """Return what is not the base's; the same on every rank."""
        return {
            "steps": self._memory.steps,
            "last": self._memory.last,
            "totals": self._telemetry.totals,
            "gates": {name: self._state_of(name, gate) for name, gate in self.gates.items()},
            "answers": {name: answer.state() for name, answer in self._memory.answers.items()},
        }

    def _state_of(self, name: str, gate: DampingGate) -> dict[str, Any]:
        try:
            return gate.state_dict()
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.called(name)} could not name its state: {error!r}") from error

    def load_damping_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`damping_state` returned; its tensors go to the parameters' device.

        A gate that was not there before begins anew, and with it the sums over all steps.
        """
        state = _onto(state, self._device())
        memory, telemetry = self._memory, self._telemetry
        memory.steps, memory.last = state["steps"], state["last"]
        memory.loss.forget()
        telemetry.totals = state["totals"] if list(state["gates"]) == list(self.gates) else None
        answers = state.get("answers", {})
        memory.answers = {name: Answer.from_state(answer) for name, answer in answers.items()}
        for name, gate in self.gates.items():
            if name not in state["gates"]:
                continue
            try:
                gate.load_state_dict(state["gates"][name])
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"{self.called(name)} could not take its state back: {error!r}"
                ) from error


def _onto(tree: Any, device: torch.device) -> Any:
    """Return a state with its tensors on ``device``; bytes, a generator's state, stay."""
    if isinstance(tree, Tensor):
        return tree if tree.dtype == torch.uint8 else tree.to(device)
    if isinstance(tree, Mapping):
        return {key: _onto(value, device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_onto(value, device) for value in tree)
    return tree

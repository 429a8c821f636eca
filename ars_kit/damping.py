"""An optimizer with damping gates around it: any torch optimizer instance, any gates.

Each step the gates see the loss (and, if they ask, the gradient norms) and answer with factors. A
gradient factor acts before the moments, a step factor on the learning rate, a skip on nothing at
all. Everything stays on the device: where the base is a fused Adam, AdamW or SGD on an
accelerator, factors and skip ride along in its own kernel (``grad_scale``, ``found_inf``, a tensor
learning rate). On the CPU reading them costs nothing. For any other base on an accelerator they
are read once a step, the one synchronisation there is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.errors import PluginError
from ars_kit.factors import Answer, Factors, Once, Rates, alignment_of, ask, local, norms_of
from ars_kit.spec import DampingGate, StepSignal

KEPT_ROWS = 4096
"""Telemetry rows kept on the device when nobody drains them."""


class DampedOptimizer(Optimizer):
    """Wraps ``base`` so that ``gates`` may damp each of its steps.

    The loss arrives by ``step(closure)``, ``step(loss=...)`` or, for each micro-batch,
    :meth:`observe`. A step for which none arrived is the base's own, bit for bit.

    Args:
        base: the optimizer; its ``param_groups`` and ``state`` stay its own.
        gates: by name, in the order they are asked; their factors multiply.
        reduce: means a 0-d loss over all ranks, so that all damp alike.
        fold: let a fused base apply the factors itself; by default wherever it can and the
            parameters are on an accelerator.
        owners: the plugin that each gate comes from, and under None that of the base, for
            complaints. A base without one raises its own errors.

    Attributes:
        intact: weights and moments are those after a whole step; False where the base broke off.
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
        # Optimizer.__init__ would copy the groups; a copy goes stale when the base loads a state.
        # What it sets up besides are the hook tables that schedulers and Lightning rely on.
        self.base = base
        self.gates: dict[str, DampingGate] = dict(gates)
        for table in (
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
            "_optimizer_state_dict_pre_hooks",
            "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_load_state_dict_post_hooks",
        ):
            setattr(self, table, OrderedDict())
        self._patch_step_function()
        self._reduce = reduce
        self._fold = fold
        self._owners = dict(owners or {})
        self.intact = True
        self._answers: dict[str, Answer] = {}  # of the step that is being taken
        self._loss: Tensor | None = None
        self._steps = 0
        self._last: Tensor | None = None
        self._rows: deque[Tensor] = deque(maxlen=KEPT_ROWS)
        self._row_steps: deque[int] = deque(maxlen=KEPT_ROWS)
        self._labels: tuple[str, ...] = ()
        self._totals: Tensor | None = None

    # The base owns these three; whoever reads or replaces them here reads or replaces its own.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def observe(self, loss: Tensor) -> None:
        """Add one micro-batch's share of this step's loss; shares are summed.

        Args:
            loss: 0-d; already divided by the number of micro-batches, as it is for ``backward``.
        """
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | None = None) -> Any:
        """Ask the gates, then let the base step, damped.

        Raises:
            PluginError: a gate raised or returned something else than a factor. Weights, moments
                and gates are then as they were; the next call takes the same step.
        """
        answer = None
        if closure is not None:
            with torch.enable_grad():
                answer = closure()
            self.observe(torch.as_tensor(answer))
        if loss is not None:
            self.observe(loss)
        seen, self._loss = self._loss, None
        if seen is None or not self.gates:
            self._step_base()
        else:
            with torch.no_grad():
                self._damped_step(seen if self._reduce is None else self._reduce(seen))
        self._steps += 1
        return answer

    def called(self, name: str | None) -> str:
        """Return how a complaint calls a gate, or under None the base."""
        what = "the base optimizer" if name is None else f"damping gate {name!r}"
        return f"{what} of plugin {self._owners[name]}" if name in self._owners else what

    def _damped_step(self, loss: Tensor) -> None:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        one = torch.ones_like(loss)
        total = Factors(one, len(grads))
        last = one if self._last is None else self._last
        lr = self.param_groups[0]["lr"]
        norms = Once(lambda: norms_of(grads))
        alignment = Once(lambda: alignment_of(self.base, norms()))
        for name, gate in self.gates.items():
            signal = StepSignal(
                self._steps,
                loss,
                lr,
                total.skip,
                total.gradient,
                total.step,
                last,
                norms,
                alignment,
            )
            self._ask(name, gate, signal, total)
        self._require_names(total)
        if grads:
            self._apply([local(g) for g in grads], total)
        self._answers.clear()
        self._last = total.gradient * total.step
        self._record(loss, total)

    def _ask(self, name: str, gate: DampingGate, signal: StepSignal, total: Factors) -> None:
        """Multiply a gate's answer in.

        Where a step broke off, the gates that had answered keep their answers: they have learned
        from it already.
        """
        try:
            answer = self._answers.get(name) or ask(gate, signal)
            total.add(name, answer, bounded=getattr(gate, "bounded", True))
        except PluginError as error:
            raise PluginError(f"{self.called(name)} {error}") from error
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.called(name)} failed at step {self._steps}: {error!r}"
            ) from error
        self._answers[name] = answer

    def _step_base(self) -> None:
        self.intact = False
        try:
            self.base.step()
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            if None not in self._owners:
                raise
            raise PluginError(
                f"{self.called(None)} failed at step {self._steps}: {error!r}"
            ) from error
        self.intact = True

    def _apply(self, grads: list[Tensor], total: Factors) -> None:
        on_host = grads[0].device.type == "cpu" or not self._can_fold()
        if self._fold is not None:
            on_host = not self._fold
        if on_host:
            skip, gradient, step = total.read()
            if skip:
                return
            if total.vector is not None:
                torch._foreach_mul_(grads, list((total.vector * gradient).unbind()))
            elif gradient != 1.0:
                torch._foreach_mul_(grads, gradient)
            with Rates(self.param_groups, None if step == 1.0 else step):
                self._step_base()
            return
        if total.vector is not None:
            torch._foreach_mul_(grads, list(total.vector.unbind()))
        base: Any = self.base
        base.grad_scale, base.found_inf = 1.0 / total.gradient, total.skip.float()
        try:
            with Rates(self.param_groups, total.step if total.steps_damped else None):
                self._step_base()
        finally:
            del base.grad_scale, base.found_inf

    def _can_fold(self) -> bool:
        known = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
        return isinstance(self.base, known) and all(g.get("fused") for g in self.param_groups)

    def _require_names(self, total: Factors) -> None:
        names = tuple(total.explained)
        if self._labels != names and self._rows:
            raise PluginError(
                f"damping gates explained {sorted(names)} at step {self._steps} but "
                f"{sorted(self._labels)} before; the names must stay the same"
            )
        self._labels = names

    def _record(self, loss: Tensor, total: Factors) -> None:
        explained = total.explained
        skip = total.skip.float()
        head = [loss, total.gradient, total.step, skip, *total.factors]
        row = torch.stack([*head, *explained.values(), *total.broken])
        self._rows.append(row)
        self._row_steps.append(self._steps)
        # A skipped step damps nothing; it is counted on its own.
        n = len(self.gates)
        damping = torch.where(total.skip, 0.0, total.gradient * total.step)
        per_gate = torch.where(total.skip, 0.0, row[4 : 4 + n])
        counts = torch.stack([torch.ones_like(loss), skip, damping])
        new = torch.cat([counts, per_gate, row[row.numel() - n :]])
        self._totals = new if self._totals is None else self._totals + new

    def drain(self) -> list[dict[str, Any]]:
        """Return and forget what was recorded of each step since the last call; synchronises once.

        Each row has ``step``, ``loss``, ``gradient`` and ``step_size`` (factors), ``skipped``,
        each gate's factor by the gate's name, and what gates explain by ``GATE_NAME``: a row with
        ``surprise`` 0.31 and ``surprise_z`` 7.2 says how hard that gate damped and why.

        Raises:
            PluginError: a gate has returned a factor outside [0, 1] or not finite.
        """
        self._check_promises()
        if not self._rows:
            return []
        values = torch.stack(list(self._rows)).tolist()
        steps = list(self._row_steps)
        self._rows.clear()
        self._row_steps.clear()
        names = ("loss", "gradient", "step_size", "skipped", *self.gates, *self._labels)
        rows = []
        for step, row in zip(steps, values, strict=True):
            named: dict[str, Any] = {"step": step, **dict(zip(names, row, strict=False))}
            named["skipped"] = bool(named["skipped"])
            rows.append(named)
        return rows

    def summary(self) -> dict[str, Any]:
        """Return steps, skipped steps, mean damping and each gate's mean factor; synchronises."""
        names = list(self.gates)
        if self._totals is None:
            return {"steps": 0, "skipped": 0, "damping": None, "gates": dict.fromkeys(names)}
        steps, skipped, damping, *rest = self._totals.tolist()
        taken = steps - skipped
        return {
            "steps": int(steps),
            "skipped": int(skipped),
            "damping": damping / taken if taken else None,
            "gates": {n: v / taken if taken else None for n, v in zip(names, rest, strict=False)},
        }

    def _check_promises(self) -> None:
        if self._totals is None:
            return
        n = len(self.gates)
        broken = self._totals[3 + n :].tolist()
        for i, name in enumerate(self.gates):
            if broken[i]:
                seen = zip(self._row_steps, self._rows, strict=True)
                first = next((f" at step {step}" for step, row in seen if row[i - n]), "")
                raise PluginError(
                    f"{self.called(name)} returned a factor outside [0, 1] or not finite{first}, "
                    f"{int(broken[i])} times before step {self._steps}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with one more key, ``damping``; tensors and plain numbers."""
        return {
            **self.base.state_dict(),
            "damping": {
                "steps": self._steps,
                "last": self._last,
                "totals": self._totals,
                "gates": {name: self._state_of(name, gate) for name, gate in self.gates.items()},
                "answers": {name: answer.state() for name, answer in self._answers.items()},
            },
        }

    def _state_of(self, name: str, gate: DampingGate) -> dict[str, Any]:
        try:
            return gate.state_dict()
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.called(name)} could not name its state: {error!r}") from error

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; a bare base's state is accepted too."""
        rest = dict(state_dict)
        damping = rest.pop("damping", None)
        self.base.load_state_dict(rest)
        if damping is None:
            return
        self._steps, self._last = damping["steps"], damping["last"]
        self._totals = damping["totals"]
        answers = damping.get("answers", {})
        self._answers = {name: Answer.from_state(answer) for name, answer in answers.items()}
        for name, gate in self.gates.items():
            if name not in damping["gates"]:
                continue
            try:
                gate.load_state_dict(damping["gates"][name])
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"{self.called(name)} could not take its state back: {error!r}"
                ) from error


def named_state(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return an optimizer's tensors by parameter name; its groups carry ``names``."""
    return {
        name: {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if p in optimizer.state
    }


def load_named_state(optimizer: Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put tensors back by parameter name; parameters without an entry keep what they have."""
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                # Fused SGD wants every momentum buffer or none.
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            if name in state:
                optimizer.state[p] = {
                    k: v.clone() if k == "step" else v.to(p.device, copy=True)
                    for k, v in state[name].items()
                }

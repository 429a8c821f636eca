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
from ars_kit.factors import Factors, Once, Rates, alignment_of, local, norms_of
from ars_kit.spec import Damping, DampingGate, StepSignal

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
    """

    def __init__(
        self,
        base: Optimizer,
        gates: Mapping[str, DampingGate],
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        fold: bool | None = None,
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
            PluginError: a gate raised or returned something else than a factor.
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
            self.base.step()
        else:
            with torch.no_grad():
                self._damped_step(seen if self._reduce is None else self._reduce(seen))
        self._steps += 1
        return answer

    def _damped_step(self, loss: Tensor) -> None:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        one = torch.ones_like(loss)
        total = Factors(one)
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
            total.add(name, gate, self._ask(name, gate, signal))
            try:
                total.explain(name, gate)
            except Exception as error:
                raise PluginError(
                    f"damping gate {name!r} could not explain step {self._steps}: {error!r}"
                ) from error
        if grads:
            self._apply([local(g) for g in grads], total)
        self._last = total.gradient * total.step
        self._record(loss, total)

    def _ask(self, name: str, gate: DampingGate, signal: StepSignal) -> Damping:
        try:
            answer = gate(signal)
        except Exception as error:
            raise PluginError(
                f"damping gate {name!r} failed at step {self._steps}: {error!r}"
            ) from error
        if isinstance(answer, Tensor):
            on_step = getattr(gate, "acts_on", "gradient") == "step"
            answer = Damping(step=answer) if on_step else Damping(gradient=answer)
        if not isinstance(answer, Damping):
            raise PluginError(
                f"damping gate {name!r} returned {type(answer).__name__} at step {self._steps}; "
                "it must return a 0-d tensor or a Damping"
            )
        return answer

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
                self.base.step()
            return
        if total.vector is not None:
            torch._foreach_mul_(grads, list(total.vector.unbind()))
        base: Any = self.base
        base.grad_scale, base.found_inf = 1.0 / total.gradient, total.skip.float()
        try:
            with Rates(self.param_groups, total.step if total.steps_damped else None):
                base.step()
        finally:
            del base.grad_scale, base.found_inf

    def _can_fold(self) -> bool:
        known = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
        return isinstance(self.base, known) and all(g.get("fused") for g in self.param_groups)

    def _record(self, loss: Tensor, total: Factors) -> None:
        explained = total.explained
        if self._labels != tuple(explained):
            if self._rows:
                raise PluginError(
                    f"damping gates explained {sorted(explained)} at step {self._steps} but "
                    f"{sorted(self._labels)} before; the names must stay the same"
                )
            self._labels = tuple(explained)
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
        broken = self._totals[3 + len(self.gates) :].tolist()
        for name, count in zip(self.gates, broken, strict=True):
            if count:
                raise PluginError(
                    f"damping gate {name!r} returned a factor outside [0, 1] or not finite "
                    f"in {int(count)} of the steps so far (last looked at step {self._steps})"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with one more key, ``damping``; tensors and plain numbers."""
        return {
            **self.base.state_dict(),
            "damping": {
                "steps": self._steps,
                "last": self._last,
                "totals": self._totals,
                "gates": {name: gate.state_dict() for name, gate in self.gates.items()},
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; a bare base's state is accepted too."""
        rest = dict(state_dict)
        damping = rest.pop("damping", None)
        self.base.load_state_dict(rest)
        if damping is None:
            return
        self._steps, self._last = damping["steps"], damping["last"]
        self._totals = damping["totals"]
        for name, gate in self.gates.items():
            if name in damping["gates"]:
                gate.load_state_dict(damping["gates"][name])


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

"""The factors of one optimizer step: multiplied up over the gates, checked, applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.errors import PluginError
from ars_kit.spec import Damping, DampingGate, StepSignal

MOMENTS = ("exp_avg", "momentum_buffer")
"""What torch's optimizers call the running mean of the gradients."""

PLAIN = (Tensor, torch.nn.Parameter)
"""Kinds of tensors that are whole on one device."""


class Once:
    """Calls a function the first time and remembers the answer."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        """Return the answer."""
        if self._value is None:
            self._value = self._compute()
        return self._value


class Answer(NamedTuple):
    """What one gate said of one step."""

    damping: Damping
    explained: Mapping[str, Tensor]

    def state(self) -> dict[str, Any]:
        """Return it in a form that a checkpoint holds."""
        return {**self.damping._asdict(), "explained": dict(self.explained)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Answer:
        """Take back what :meth:`state` returned."""
        return cls(Damping(*(state[f] for f in Damping._fields)), state["explained"])


def ask(gate: DampingGate, signal: StepSignal) -> Answer:
    """Ask a gate about a step, and why.

    Raises:
        PluginError: it returned something else than a factor, or could not explain itself; the
            message goes on from the gate's name.
    """
    answer: Any = gate(signal)
    if isinstance(answer, Tensor):
        acts_on = getattr(gate, "acts_on", "gradient")
        if acts_on not in ("gradient", "step"):
            raise PluginError(f"says acts_on = {acts_on!r}; it must be 'gradient' or 'step'")
        answer = Damping(step=answer) if acts_on == "step" else Damping(gradient=answer)
    wrong: list[object] = [answer]
    if isinstance(answer, Damping):
        wrong = list(answer)
        wrong = [part for part in wrong if not isinstance(part, Tensor | None)]
    if wrong:
        raise PluginError(
            f"returned {type(wrong[0]).__name__} at step {signal.step}; it must return a 0-d "
            "tensor or a Damping"
        )
    explain = getattr(gate, "explain", None)
    try:
        explained: dict[str, Any] = {} if explain is None else dict(explain())
    except Exception as error:
        raise PluginError(f"could not explain step {signal.step}: {error!r}") from error
    for name, value in explained.items():
        if not isinstance(value, Tensor) or value.ndim:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PluginError(
                f"explained {name!r} by {what} at step {signal.step}; it must be a 0-d tensor"
            )
    return Answer(answer, explained)


class Factors:
    """The factors of one step, multiplied up over the gates.

    Args:
        one: 0-d float32 on the training device.
        tensors: gradients there are.

    Attributes:
        gradient: product of the 0-d gradient factors.
        step: product of the step factors.
        skip: whether any gate asked to skip; 0-d bool.
        vector: product of the factors by tensor, (n_tensors,), or None.
        factors: each gate's own factor, 0-d: the mean where it has one a tensor, 0 where it skips.
        broken: 1 for each gate whose factor was outside [0, 1], or of a factor by tensor not
            finite or negative, else 0; 0-d.
        explained: what gates say of themselves, 0-d, by ``GATE_NAME``.
    """

    def __init__(self, one: Tensor, tensors: int) -> None:
        self.gradient, self.step = one, one
        self.tensors = tensors
        self.skip = torch.zeros_like(one, dtype=torch.bool)
        self.vector: Tensor | None = None
        self.steps_damped = False
        self.factors: list[Tensor] = []
        self.broken: list[Tensor] = []
        self.explained: dict[str, Tensor] = {}

    def add(self, name: str, answer: Answer, *, bounded: bool) -> None:
        """Multiply one gate's answer in.

        Args:
            name: of the gate.
            answer: of the gate.
            bounded: whether it promised factors of at most 1.

        Raises:
            PluginError: a factor has the wrong shape; the message goes on from the gate's name.
        """
        damping = answer.damping
        self._require_shapes(damping)
        one = torch.ones_like(self.gradient)
        factor, outside = one, torch.zeros_like(one, dtype=torch.bool)
        if damping.skip is not None:
            self.skip = self.skip | damping.skip
            factor = torch.where(damping.skip, 0.0, factor)
        for value, part in ((damping.gradient, "gradient"), (damping.step, "step")):
            if value is None:
                continue
            value = value.to(one)  # noqa: PLW2901
            if value.ndim:
                self.vector = value if self.vector is None else self.vector * value
                outside = outside | ~((value >= 0) & value.isfinite()).all()
                factor = factor * value.mean()
                continue
            if bounded:
                outside = outside | ~((value >= 0) & (value <= 1))
            else:
                outside = outside | ~((value >= 0) & value.isfinite())
            factor = factor * value
            if part == "gradient":
                self.gradient = self.gradient * value
            else:
                self.step = self.step * value
                self.steps_damped = True
        self.factors.append(factor)
        # Of a step that is skipped anyway nothing is asked: its loss may be NaN.
        self.broken.append((outside & ~self.skip).float())
        self.explained |= {f"{name}_{k}": v.to(one) for k, v in answer.explained.items()}

    def _require_shapes(self, damping: Damping) -> None:
        for part, value in zip(Damping._fields, damping, strict=True):
            wanted = [(), (self.tensors,)] if part == "gradient" else [()]
            if value is not None and tuple(value.shape) not in wanted:
                raise PluginError(
                    f"returned a {part} of shape {tuple(value.shape)}; it must be 0-d"
                    + (f" or one a tensor, ({self.tensors},)" if part == "gradient" else "")
                )

    def read(self, scale: Tensor | None) -> tuple[bool, float, float]:
        """Bring skip and the two factors to the host, at once.

        Args:
            scale: what the gradients were multiplied by; the gradient factor undoes it.
        """
        gradient = self.gradient if scale is None else self.gradient / scale
        skip, by, step = torch.stack([self.skip.float(), gradient, self.step]).tolist()
        return bool(skip), by, step


def gradients_of(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """Return the gradients there are, in the groups' order; of a sparse one its values."""
    found = []
    for group in groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()
                found.append(p.grad.values())
            else:
                found.append(p.grad)
    return found


def norms_of(grads: list[Tensor], device: torch.device) -> Tensor:
    """Return each gradient's norm, (n_tensors,), float32; of a sharded one over all its shards.

    In float32 whatever the gradients are: 300 has no finite square in float16.
    """
    found = [torch.zeros((), device=device)] * len(grads)
    for indices in _alike(grads):
        # As torch.nn.utils.clip_grad_norm_ does.
        norms = torch._foreach_norm([grads[i] for i in indices], 2, torch.float32)  # noqa: SLF001
        together = _together(list(norms)).to(device)
        if len(indices) == len(grads):
            return together
        for i, norm in zip(indices, together.unbind(), strict=True):
            found[i] = norm
    return torch.stack(found) if found else torch.zeros(0, device=device)


def alignment_of(base: Optimizer, norms: Tensor) -> Tensor:
    """Return the cosine between the gradient and the first moment, 0-d; NaN where there is none.

    Args:
        base: the optimizer, before its step.
        norms: of the gradients, as :func:`norms_of` returns them.
    """
    params = [p for g in base.param_groups for p in g["params"] if p.grad is not None]
    found = [(p.grad, _moment(base.state.get(p, {}))) for p in params if not p.grad.is_sparse]
    pairs = [(g, m) for g, m in found if m is not None and m.shape == g.shape]
    if not pairs:
        return norms.new_full((), torch.nan)
    if any(is_quantised(m) for _, m in pairs):
        return _alignment_of_each(pairs, norms)
    # Tensor by tensor: a product of all of them at once would need the gradients' memory again.
    parts = [
        _together([_dot(*pairs[i]) for i in indices]).sum().to(norms.device)
        for indices in _alike([g for g, _ in pairs])
    ]
    moments = torch.linalg.vector_norm(norms_of([m for _, m in pairs], norms.device))
    cosine: Tensor = torch.stack(parts).sum() / (torch.linalg.vector_norm(norms) * moments)
    return cosine


def _alignment_of_each(pairs: list[tuple[Tensor, Tensor]], norms: Tensor) -> Tensor:
    """Return the same cosine with one moment at a time in full."""
    products, squares = [], []
    for gradient, moment in pairs:
        m = dequantised(moment).float()
        products.append(_dot(gradient.float(), m).to(norms.device))
        squares.append(m.square().sum().to(norms.device))
    lengths = torch.linalg.vector_norm(norms) * torch.stack(squares).sum().sqrt()
    cosine: Tensor = torch.stack(products).sum() / lengths
    return cosine


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's optimizer states of few bits."""
    return type(tensor).__module__.startswith("torchao.optim.")


def dequantised(tensor: Tensor) -> Tensor:
    """Return a state of few bits as float32, any other tensor as it is."""
    return tensor.dequantize() if is_quantised(tensor) else tensor


def _moment(state: Mapping[str, Any]) -> Tensor | None:
    return next((state[k] for k in MOMENTS if isinstance(state.get(k), Tensor)), None)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if hasattr(a, "to_local"):
        return torch.sum(a * b)
    return torch.dot(a.flatten(), b.to(a.dtype).flatten())


def _alike(tensors: list[Tensor]) -> list[list[int]]:
    """Return the places of tensors of one device and one mesh: they share kernels, reductions."""
    first = tensors[0].device if tensors else None
    if all(type(t) in PLAIN and t.device == first for t in tensors):  # by far the most common
        return [list(range(len(tensors)))] if tensors else []
    alike: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        key = tensor.device, getattr(tensor, "device_mesh", None)
        alike.setdefault(key, []).append(i)
    return list(alike.values())


def _together(values: list[Tensor]) -> Tensor:
    """Stack 0-d tensors, those of sharded ones summed over their shards first."""
    stacked = torch.stack(values)
    if hasattr(stacked, "full_tensor"):
        stacked = stacked.full_tensor()  # one reduction for all of them
    return stacked.float()

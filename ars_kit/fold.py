"""Hands a step's factors to the base: folded into its kernel, or read and multiplied in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.factors import Factors

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose fused kernel takes ``grad_scale``, ``found_inf`` and a tensor learning rate."""


def apply(
    base: Optimizer,
    grads: list[Tensor],
    total: Factors,
    *,
    scale: Tensor | None = None,
    fold: bool | None = None,
) -> None:
    """Let ``base`` step, damped: one multiplication of the gradients at most, none if it folds.

    Args:
        base: the optimizer.
        grads: of its parameters, in order; there is at least one.
        total: the step's factors.
        scale: what a GradScaler multiplied the loss by and the step has to undo, or None.
        fold: hand the factors to a fused base's kernel instead of reading them; by default where
            it can and the gradients are on an accelerator.
    """
    if fold is None:
        fold = can_fold(base) and grads[0].device.type != "cpu"
    if fold and _has_velocities(base):
        if total.vector is not None:
            multiply(grads, total.vector)
        whole = torch.ones_like(total.gradient) if scale is None else scale
        with (
            rates(base, total.step if total.steps_damped else None),
            lent(base, whole / total.gradient, total.skip.float()),
        ):
            base.step()
        return
    skip, gradient, step = total.read(scale)
    if skip:
        return
    if total.vector is not None:
        multiply(grads, total.vector * gradient)
    elif gradient != 1.0:
        multiply(grads, gradient)
    with rates(base, None if step == 1.0 else step):
        base.step()


def can_fold(base: Optimizer) -> bool:
    """Whether the base's kernel takes the factors."""
    # A subclass may do something else with its gradients.
    return type(base) in FUSED and all(g.get("fused") for g in base.param_groups)


@contextmanager
def lent(base: Any, grad_scale: Tensor | None, found_inf: Tensor) -> Iterator[None]:
    """Lend a fused base what its kernel divides gradients by, and 1 where it shall do nothing."""
    base.grad_scale, base.found_inf = grad_scale, found_inf
    try:
        yield
    finally:
        del base.grad_scale, base.found_inf


def _has_velocities(base: Optimizer) -> bool:
    """Whether the base is past what its kernel cannot skip; makes it so where it can.

    Fused SGD begins its velocity in memory as it finds it, and a skipped first step leaves it so.
    Zeros make the same first step, unless that one goes undampened.
    """
    if not isinstance(base, torch.optim.SGD):
        return True
    for group in base.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and base.state[p].get("momentum_buffer") is None:
                if group["dampening"]:
                    return False
                base.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return True


@contextmanager
def rates(base: Optimizer, factor: float | Tensor | None) -> Iterator[None]:
    """Multiply every group's learning rate for the length of one step."""
    groups: Iterable[dict[str, Any]] = base.param_groups if factor is not None else ()
    kept = [(group, group["lr"]) for group in groups]
    for group, lr in kept:
        group["lr"] = lr * factor
    try:
        yield
    finally:
        for group, lr in kept:
            group["lr"] = lr


def multiply(grads: list[Tensor], factors: Tensor | float) -> None:
    """Multiply each gradient in place, by a number or by its own factor of shape (n_tensors,)."""
    mine = [local(g) for g in grads]
    if isinstance(factors, Tensor):
        each = list(factors.unbind())
        if any(g.device != factors.device for g in mine):
            each = [f.to(g.device) for f, g in zip(each, mine, strict=True)]
        torch._foreach_mul_(mine, each)
    else:
        torch._foreach_mul_(mine, factors)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's own memory of a tensor."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard

"""The built-in base optimizers: torch's own, as offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ars_kit.spec import Offer, hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]


def adamw(
    params: Groups,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW, fused (Loshchilov & Hutter, 1711.05101).

    Args:
        params: torch parameter groups.
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
    """
    import torch  # noqa: PLC0415 -- slow to import

    return torch.optim.AdamW(_rated(params), lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def adamw_8bit(
    params: Groups, *, lr: float, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> Optimizer:
    """AdamW with 8-bit moments, which rounds bf16 weights stochastically (torchao).

    Tensors of fewer than 4,096 numbers, or of no multiple of 256, keep theirs in full.

    Args:
        params: torch parameter groups.
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
    """
    from ars_kit_plugins.lowbit import EightBit  # noqa: PLC0415 -- an extra, and slow to import

    return EightBit(params, lr, (beta1, beta2), eps, bf16_stochastic_round=True)


def adamw_4bit(
    params: Groups, *, lr: float, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> Optimizer:
    """AdamW with 4-bit moments, which rounds bf16 weights stochastically (torchao).

    Tensors of fewer than 4,096 numbers, or of no multiple of 128, keep theirs in full.

    Args:
        params: torch parameter groups.
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the denominator.
    """
    from ars_kit_plugins.lowbit import FourBit  # noqa: PLC0415 -- an extra, and slow to import

    return FourBit(params, lr, (beta1, beta2), eps, bf16_stochastic_round=True)


def sgd(params: Groups, *, lr: float, momentum: float = 0.9, nesterov: bool = False) -> Optimizer:
    """Stochastic gradient descent with momentum, fused; over sharded weights it is not.

    Args:
        params: torch parameter groups.
        lr: peak learning rate.
        momentum: decay of the velocity.
        nesterov: look ahead along the velocity.
    """
    import torch  # noqa: PLC0415 -- slow to import

    # torch has no fused SGD over DTensors; False picks the loop, None its foreach form.
    fused = None if any(hasattr(p, "device_mesh") for g in params for p in g["params"]) else True
    groups = _rated(params)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)


def adafactor(params: Groups, *, lr: float, beta2_decay: float = -0.8) -> Optimizer:
    """Adafactor: factored second moments, little memory (Shazeer & Stern, 1804.04235).

    Args:
        params: torch parameter groups.
        lr: peak learning rate.
        beta2_decay: exponent of the second moment's decay over steps.
    """
    import torch  # noqa: PLC0415 -- slow to import

    return torch.optim.Adafactor(params, lr=lr, beta2_decay=beta2_decay)


def muon(params: Groups, *, lr: float, momentum: float = 0.95) -> Optimizer:
    """Muon on hidden matrices, AdamW on the rest (Jordan et al. 2024; Liu et al., 2502.16982).

    Args:
        params: torch parameter groups.
        lr: peak learning rate.
        momentum: of Muon.
    """
    from ars_kit_plugins.muon import MuonWithAdamW  # noqa: PLC0415 -- torch is slow to import

    return MuonWithAdamW(params, lr=lr, momentum=momentum)


def _rated(params: Groups) -> Groups:
    """On an accelerator, keep each rate in a tensor there: changing it waits for nothing."""
    import torch  # noqa: PLC0415 -- slow to import

    for group in params:
        device = group["params"][0].device
        if device.type != "cpu":
            group["lr"] = torch.full((), group["lr"], device=device)
    return params


@hookimpl
def arskit_optimizers() -> list[Offer[Optimizer]]:
    """Offer the built-in base optimizers."""
    return [
        Offer("adamw", "AdamW, fused", adamw),
        Offer("adamw-8bit", "AdamW with 8-bit moments (extra: lowbit)", adamw_8bit),
        Offer("adamw-4bit", "AdamW with 4-bit moments (extra: lowbit)", adamw_4bit),
        Offer("sgd", "SGD with momentum, fused", sgd),
        Offer("adafactor", "Adafactor: factored second moments", adafactor),
        Offer("muon", "Muon on hidden matrices, AdamW on the rest", muon),
    ]

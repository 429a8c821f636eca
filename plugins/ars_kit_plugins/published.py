"""ARS as it was first planned and as it was published: baselines that the design is measured by.

The formulas stand as they were, short of what could not run. Neither has a guard: a NaN gradient
reaches the weights, as it did (``--gate guard`` adds one). Both damp the gradient; where that
lasts, an adaptive optimizer divides it out again.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ars_kit.spec import StepSignal
from ars_kit_plugins.gating import TensorState

RECENT = 10


def _push(window: Tensor | None, value: Tensor, length: int) -> Tensor:
    if window is None:
        window = torch.full((length,), torch.nan, device=value.device)
    return torch.cat([window[1:], value[None]])


class PlanEntropyGuard(TensorState):
    """Halve the gradient while |corr(last 10 losses, 0..9)| exceeds ``threshold``.

    It measures trend, not periodicity: a healthy descent is halved too. Mended: before there are
    ten losses, and where they are constant or not finite, the correlation is undefined and the
    factor 1 (the plan raised ValueError from two losses to nine).
    """

    remembers: ClassVar[tuple[str, ...]] = ("window",)

    def __init__(self, *, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.window: Tensor | None = None

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return 1/2 or 1."""
        self.window = _push(self.window, signal.loss, RECENT)
        time = torch.arange(RECENT, device=signal.loss.device) - (RECENT - 1) / 2
        rest = self.window - self.window.mean()
        norm = rest.square().sum().sqrt() * time.square().sum().sqrt()
        self.correlation = (rest * time).sum() / norm
        return torch.where(self.correlation.abs() > self.threshold, 0.5, 1.0)

    def explain(self) -> dict[str, Tensor]:
        """Return the correlation with time."""
        return {"correlation": self.correlation}


class PlanSurpriseGate(TensorState):
    """Φ = 1 - damping |loss - mean| / mean, over the mean of the last ten losses.

    Mended: clamped to [0, 1], as a factor must be. The plan's had no floor: at damping 0.15 a
    loss of ten times the mean gave -0.35, a step uphill. A surprise that is not a number
    still passes as 1.
    """

    remembers: ClassVar[tuple[str, ...]] = ("window",)

    def __init__(self, *, damping: float = 0.1) -> None:
        if damping < 0:
            raise ValueError(f"damping must not be negative, not {damping}")
        self.damping = damping
        self.window: Tensor | None = None

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return Φ for the gradient."""
        loss = signal.loss
        before = torch.full_like(loss, torch.nan) if self.window is None else self.window.nanmean()
        self.surprise = (loss - before).abs() / before.abs()
        self.window = _push(self.window, loss, RECENT)
        return (1 - self.damping * self.surprise).nan_to_num(nan=1.0).clamp(0.0, 1.0)

    def explain(self) -> dict[str, Tensor]:
        """Return the relative surprise."""
        return {"relative": self.surprise}


class PaperGate(TensorState):
    """The published Ψ and Φ (f4t1i, "Adaptive Resonance Suppression", 2026, sections 2.1 to 2.3).

    S = |loss - mean of the last ten|; r = lag-1 autocorrelation of the last ``window`` S; Ψ =
    max(0.1, 1 - |r|) where |r| > ``rho``, else 1; Φ = max(phi_min, 1 - tanh(alpha S / Ψ)), on the
    gradient. The defaults are those that the paper calls optimized.

    Mended: a surprise that is not a number gives Φ = 1. Left out: the published jitter, Gaussian
    noise added to every gradient while Ψ < 1/2; a gate multiplies gradients, it cannot add to them.
    """

    remembers: ClassVar[tuple[str, ...]] = ("losses", "surprises")

    def __init__(
        self, *, alpha: float = 1.0, phi_min: float = 0.3, rho: float = 0.7, window: int = 50
    ) -> None:
        if not 0 <= phi_min <= 1 or window < 2:
            raise ValueError("phi_min must lie in [0, 1] and window be at least 2")
        self.alpha, self.phi_min, self.rho, self.length = alpha, phi_min, rho, window
        self.losses: Tensor | None = None
        self.surprises: Tensor | None = None

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return Φ for the gradient."""
        loss = signal.loss
        if self.losses is None:
            self.losses = torch.full((RECENT,), torch.nan, device=loss.device)
        # Published: no surprise before there are two losses to compare with.
        known = (~self.losses.isnan()).sum() >= 2
        surprise = torch.where(known, (loss - self.losses.nanmean()).abs(), 0.0)
        self.losses = _push(self.losses, loss, RECENT)
        self.surprises = _push(self.surprises, surprise, self.length)
        rest = self.surprises - self.surprises.mean()
        energy = rest.square().sum()
        r = torch.where(energy < 1e-8, 0.0, (rest[1:] * rest[:-1]).sum() / energy)
        self.psi = torch.where(r.abs() > self.rho, (1 - r.abs()).clamp(min=0.1), 1.0)
        phi = (1 - torch.tanh(self.alpha * surprise / self.psi)).clamp(min=self.phi_min)
        return phi.nan_to_num(nan=1.0)

    def explain(self) -> dict[str, Tensor]:
        """Return Ψ."""
        return {"psi": self.psi}

"""Leaving out the steps that stand out: what damps a bad batch to nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ars_kit.spec import Damping, StepSignal
from ars_kit_plugins.gating import TensorState
from ars_kit_plugins.periodicity import MAD_TO_SIGMA

WINDOW = 128
NEEDED = 32


class SkipStep(TensorState):
    """Skip a step whose loss stands more than ``limit`` robust sigmas above the recent ones.

    The idea is that of OLMo-core's SkipStep (mean and deviation of the last 128 losses), mended in
    two places. There, losses that were skipped widen the deviation: with a share p of bad batches
    they score sqrt((1 - p) / p), so that at 6 sigmas more than one in 37 hide each other. Here the
    centre is the median, sigma comes from the median absolute deviation, and what was skipped is
    not remembered. There, one value that is not a number disables the test for 128 steps; here it
    is left to the guard and not remembered.

    Over the last 128 losses that were not skipped (from 32 on) sigma = max(1.4826 MAD,
    0.01 |median|, 0.02) and z = (loss - median) / sigma. Where z > limit the step is skipped, but
    at most ``most`` in a row: then the level is taken for a new one, and steps are let through,
    and learned from, until z falls below the limit.

    With ``norm`` the logarithm of the global gradient norm is held to the same limit, its sigma at
    least 0.1, and a step is skipped for either.
    """

    remembers: ClassVar[tuple[str, ...]] = ("losses", "norms", "run")

    def __init__(self, *, limit: float = 6.0, most: int = 8, norm: bool = False) -> None:
        if not limit > 0 or most < 0:
            raise ValueError("limit must be greater than 0, and most must not be negative")
        self.limit, self.most, self.norm = limit, most, norm
        self.losses: Tensor | None = None
        self.norms: Tensor | None = None
        self.run: Tensor | None = None
        self.z: Tensor = torch.zeros(())
        self.norm_z: Tensor = torch.zeros(())

    def __call__(self, signal: StepSignal) -> Damping:
        """Return whether to skip."""
        loss = signal.loss
        if self.losses is None or self.run is None:
            self.losses = loss.new_full((WINDOW,), torch.nan)
            self.norms = loss.new_full((WINDOW,), torch.nan) if self.norm else None
            self.run = torch.zeros_like(loss)
        self.z = _score(self.losses, loss, floor=0.02, share=0.01)
        stands_out = self.z > self.limit
        size = loss
        if self.norms is not None:
            size = torch.linalg.vector_norm(signal.norms()).log()
            self.norm_z = _score(self.norms, size, floor=0.1)
            stands_out = stands_out | (self.norm_z > self.limit)
        new_run = torch.where(stands_out, self.run + 1, torch.zeros_like(self.run))
        self.run = torch.where(signal.skip, self.run, new_run)
        skip = stands_out & (self.run <= self.most) & ~signal.skip
        usable = loss.isfinite() & size.isfinite() & ~skip & ~signal.skip
        self.losses = _pushed(self.losses, loss, usable)
        if self.norms is not None:
            self.norms = _pushed(self.norms, size, usable)
        return Damping(skip=skip)

    def explain(self) -> dict[str, Tensor]:
        """Return z of this step's loss, and of its norm where that is looked at."""
        return {"z": self.z, "norm_z": self.norm_z} if self.norm else {"z": self.z}


def _score(window: Tensor, value: Tensor, *, floor: float, share: float = 0.0) -> Tensor:
    """Return the robust standard score of a value; 0 if it is not finite or too few are known."""
    middle = window.nanmedian()
    mad = (window - middle).abs().nanmedian()
    sigma = torch.maximum(MAD_TO_SIGMA * mad, share * middle.abs()).clamp(min=floor)
    known = (window.isfinite().sum() >= NEEDED) & value.isfinite()
    return torch.where(known, (value - middle) / sigma, 0.0)


def _pushed(window: Tensor, value: Tensor, usable: Tensor) -> Tensor:
    return torch.where(usable, torch.cat([window[1:], value[None]]), window)

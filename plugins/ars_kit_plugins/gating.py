"""The arithmetic of the built-in gates: tensor operations only, nothing read by the host.

Robust statistics follow Hampel (1974); 1.4826 makes the median absolute deviation (MAD) estimate
a normal standard deviation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ars_kit.spec import Damping, StepSignal
from ars_kit_plugins.periodicity import MAD_TO_SIGMA, WINDOW, PeriodTest


class TensorState:
    """A gate whose memory is tensors named in ``remembers``; None until the first step."""

    remembers: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the remembered tensors."""
        found = {name: getattr(self, name, None) for name in self.remembers}
        return {k: None if v is None else v.clone() for k, v in found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name in self.remembers:
            value = state[name]
            setattr(self, name, None if value is None else value.clone())


class Guard(TensorState):
    """Skip a step whose loss or gradient is not finite: weights and moments stay untouched.

    Where parameters are stepped within the backward pass, each is skipped for its own gradient.
    """

    finite_only = True

    def __call__(self, signal: StepSignal) -> Damping:
        """Return the skip flag."""
        finite = signal.loss.isfinite()
        if signal.gradients:
            finite = finite & signal.norms().isfinite().all()
        return Damping(skip=~finite)


class ClipGate(TensorState):
    """Shrink a step whose global gradient norm exceeds ``limit`` (Pascanu et al., 1211.5063)."""

    def __init__(self, *, limit: float = 1.0) -> None:
        if not limit > 0:
            raise ValueError(f"limit must be greater than 0, not {limit}")
        self.limit = limit

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return min(1, limit / norm)."""
        self.norm: Tensor = torch.linalg.vector_norm(signal.norms())
        # A norm that is not a number is the guard's affair.
        factor: Tensor = (self.limit / (self.norm + 1e-6)).clamp(max=1.0).nan_to_num(nan=1.0)
        return factor

    def explain(self) -> dict[str, Tensor]:
        """Return the global norm of the undamped gradient."""
        return {"norm": self.norm}


class SurpriseGate(TensorState):
    """Φ: damp a step whose loss stands out of the recent ones.

    Over the last 32 accepted losses (from 16 on) sigma = max(1.4826 MAD, 0.01 |median|, 0.02) and
    z = (loss - median) / sigma. Where z > limit, Φ = (limit / z)^(20 damping), which at the
    default 0.1 is the square. Φ multiplies the gradient before the moments, where a transient is
    undone best; from the second surprise in a row on it multiplies the step size too, since
    adaptive optimizers divide a lasting gradient factor out again. After ``patience`` surprises
    in a row the shift is taken for real and let through until z falls below the limit.
    """

    remembers: ClassVar[tuple[str, ...]] = ("window", "run")
    WINDOW = 32
    NEEDED = 16

    def __init__(self, *, damping: float = 0.1, limit: float = 4.0, patience: int = 8) -> None:
        if damping < 0 or limit <= 0 or patience < 0:
            raise ValueError("damping and patience must not be negative, and limit must be > 0")
        self.power = 20.0 * damping
        self.limit = limit
        self.patience = patience
        self.window: Tensor | None = None
        self.run: Tensor | None = None
        self.z: Tensor = torch.zeros(())

    def __call__(self, signal: StepSignal) -> Damping:
        """Return Φ for the gradient and, from the second surprise in a row on, the step."""
        loss = signal.loss
        if self.window is None or self.run is None:
            self.window = torch.full((self.WINDOW,), torch.nan, device=loss.device)
            self.run = torch.zeros((), device=loss.device)
        middle = self.window.nanmedian()
        mad = (self.window - middle).abs().nanmedian()
        sigma = torch.maximum(MAD_TO_SIGMA * mad, 0.01 * middle.abs()).clamp(min=0.02)
        enough = self.window.isfinite().sum() >= self.NEEDED
        usable = enough & ~signal.skip & loss.isfinite()
        z = torch.where(usable, (loss - middle) / sigma, torch.zeros_like(loss))
        surprised = z > self.limit
        self.run = torch.where(
            signal.skip, self.run, torch.where(surprised, self.run + 1, torch.zeros_like(self.run))
        )
        acting = surprised & (self.run <= self.patience)
        phi = torch.where(acting, (self.limit / z.clamp(min=self.limit)) ** self.power, 1.0)
        self.window = _remember(self.window, loss, signal.skip)
        self.z = z
        return Damping(gradient=phi, step=torch.where(self.run > 1, phi, 1.0))

    def explain(self) -> dict[str, Tensor]:
        """Return the robust standard score z of this step's loss."""
        return {"z": self.z}


class NormMemory(TensorState):
    """Rescale each tensor's gradient g to the norm gamma it has had of late: g gamma / |g|.

    gamma <- decay gamma + (1 - decay) n, where n is |g| held between gamma / shrink and
    growth gamma; learned only from finite norms of steps that are neither skipped nor damped below
    1/2. A cousin of AdaGC (2502.11034), which only ever shrinks, and of Stable-SPAM (2502.17055). A
    gradient that was exactly zero so far (the inner weights of a block born as the identity) begins
    its memory with its first value.

    Without ``shrink`` n may be as small as it likes. An adaptive optimizer is blind to a gradient's
    scale and not to its course: while gamma falls, as norms do early in training, the second
    moment, which looks back further than the first, makes steps smaller. ``shrink`` 1.05 keeps the
    course nearly level: better for a model that trains from fresh weights, not for heirs.
    """

    remembers: ClassVar[tuple[str, ...]] = ("gamma",)

    def __init__(
        self, *, decay: float = 0.98, growth: float = 1.05, shrink: float | None = None
    ) -> None:
        if not 0 <= decay < 1 or not growth >= 1 or not (shrink is None or shrink >= 1):
            raise ValueError("decay must lie in [0, 1), and growth and shrink be at least 1")
        self.decay, self.growth, self.shrink = decay, growth, shrink
        self.gamma: Tensor | None = None

    def __call__(self, signal: StepSignal) -> Damping:
        """Return one factor a tensor."""
        norms = signal.norms()
        gamma = self.gamma
        if gamma is None or gamma.shape != norms.shape:
            gamma = torch.zeros_like(norms)
        learn = ~signal.skip & (signal.damping > 0.5) & norms.isfinite()
        gamma = torch.where((gamma == 0) & learn, norms, gamma)
        usable = (norms > 0) & (gamma > 0) & ~signal.skip
        factor = torch.where(usable, gamma / norms, 1.0)
        target = torch.minimum(norms, self.growth * gamma)
        if self.shrink is not None:
            target = torch.maximum(target, gamma / self.shrink)
        self.gamma = torch.where(learn, self.decay * gamma + (1 - self.decay) * target, gamma)
        return Damping(gradient=factor)


class Judgement(NamedTuple):
    """What the Entropy Guard thinks of windows of losses; every field of their batch's shape.

    Attributes:
        progress: the losses fell by half their spread.
        rises: well above the best so far and on the way up.
        middle: median of the later half.
        evidence: for a period; above 1 it is significant.
        period: the likeliest, in steps.
        correlation: of each loss with the one before.
    """

    progress: Tensor
    rises: Tensor
    middle: Tensor
    evidence: Tensor
    period: Tensor
    correlation: Tensor


class EntropyGuard(TensorState):
    """Ψ: shrink the step size while training oscillates, or the loss rises, without progress.

    Judged every 8 steps over the last 64 accepted losses. It oscillates where either

    * the loss has a period of 2 to 16 steps, significant at alpha
      (:mod:`ars_kit_plugins.periodicity`), or
    * the steps overshoot: of the last 16 gradients looked at (one step in four, at irregular
      distances so that periodic data are not met always in one phase) each one points against the
      optimizer's first moment. Were the signs even, that would happen once in 2^16. A negative
      product of gradient and step is Pflug's sign of having arrived (1990) and, as a hypergradient,
      the sign of too large a step (Baydin et al., 1703.04782). It is also what training at a sound
      rate comes to where the noise of its batches keeps the loss from falling; so each loss must
      take after the one before it, as where the weights move it, and not where new batches do,

    and there is no progress: the mean of the later half of the losses is not half a sigma (of the
    detrended losses) below that of the earlier half. So data read in an unshuffled cycle, whose
    loss is periodic by itself, is left alone while it is learned, and so is training at the edge of
    stability (Cohen et al., 2103.00065), which overshoots and learns. The loss rises where, three
    times in a row, the median of the later half stands 3 sigma above the best so far, a sigma and
    three standard errors above the earlier half, and its last quarter above the one before: a step
    to another level does not.

    On: Ψ <- max(floor, 0.7 Ψ). Off: Ψ <- min(1, 1.02^8 Ψ), but not while three quarters of the
    gradients looked at still point against the steps and the losses are no white noise: those of
    an oscillation that is held down take after each other, or turn at every step.

    ``threshold`` maps to alpha = 2e-3 * 10^((0.5 - threshold) / 0.25). Without ``overshoot``, or
    where parameters are stepped within the backward pass, the losses alone are judged.
    """

    remembers: ClassVar[tuple[str, ...]] = (
        "window", "turns", "psi", "best", "rises", "evidence", "period", "overshoot"
    )  # fmt: skip
    acts_on = "step"
    EVERY = 8
    RISES = 3
    WHITE = 2 / math.sqrt(WINDOW)
    """Two standard errors of the correlation that white noise has."""
    TURNS = 16
    psi: Tensor
    turns: Tensor
    best: Tensor
    rises: Tensor
    evidence: Tensor
    period: Tensor
    overshoot: Tensor

    def __init__(
        self, *, threshold: float = 0.5, floor: float = 0.1, overshoot: bool = True
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], not {floor}")
        self.test = PeriodTest(min(1.0, 2e-3 * 10 ** ((0.5 - threshold) / 0.25)))
        self.floor = floor
        self.looks = overshoot
        self.window: Tensor | None = None

    def __call__(self, signal: StepSignal) -> Tensor:
        """Return Ψ for the step size."""
        loss = signal.loss
        if self.window is None:
            self.window = torch.full((WINDOW,), torch.nan, device=loss.device)
            self.turns = torch.full((self.TURNS,), torch.nan, device=loss.device)
            self.psi = torch.ones((), device=loss.device)
            self.best = torch.full((), torch.inf, device=loss.device)
            self.rises = torch.zeros((), device=loss.device)
            self.evidence = self.period = torch.full((), torch.nan, device=loss.device)
            self.overshoot = torch.zeros((), device=loss.device)
        self.window = _remember(self.window, loss, signal.skip)
        if self.looks and signal.gradients and _looked_at(signal.step):
            self.turns = _remember(self.turns, signal.alignment(), signal.skip)
        if signal.step % self.EVERY == self.EVERY - 1:
            self._judge(self.window)
        return self.psi

    def _judge(self, window: Tensor) -> None:
        full = window.isfinite().all()
        found = self.detect(window, self.best)
        self.overshoot = (self.turns < 0).float().mean()
        self.rises = torch.where(full & found.rises, self.rises + 1, torch.zeros_like(self.rises))
        overshoots = (self.overshoot >= 1) & (found.correlation >= self.WHITE)
        oscillates = (found.evidence > 1) | overshoots
        alarm = (oscillates & ~found.progress) | (self.rises >= self.RISES)
        held = (self.overshoot >= 0.75) & (found.correlation.abs() >= self.WHITE)
        eased = torch.where(held, self.psi, (self.psi * 1.02**8).clamp(max=1.0))
        damped = torch.where(alarm, (0.7 * self.psi).clamp(min=self.floor), eased)
        self.psi = torch.where(full, damped, self.psi)
        self.best = torch.where(full, torch.minimum(self.best, found.middle), self.best)
        self.evidence, self.period = found.evidence, found.period

    def explain(self) -> dict[str, Tensor]:
        """Return why: for each thing that is looked for, how much there is of it.

        ``evidence`` for a period (above 1: significant) and the ``period``; ``overshoot``, the
        share of the gradients looked at that point against the steps; ``rises`` in a row.
        """
        return {
            "evidence": self.evidence,
            "period": self.period,
            "overshoot": self.overshoot,
            "rises": self.rises,
        }

    def detect(self, losses: Tensor, best: Tensor) -> Judgement:
        """Judge windows of losses, shape (..., 64), given the best median so far, shape (...)."""
        found = self.test(losses)
        quarters = found.tame.unflatten(-1, (4, WINDOW // 4)).mean(-1)
        fallen = (quarters[..., :2] - quarters[..., 2:]).mean(-1)
        middle = losses[..., WINDOW // 2 :].median(-1).values
        gain = middle - losses[..., : WINDOW // 2].median(-1).values
        return Judgement(
            progress=fallen >= 0.5 * found.sigma,
            rises=(middle > best + 3 * found.sigma)
            & (gain > torch.maximum(found.sigma, 3 * found.error))
            & (quarters[..., 3] - quarters[..., 2] > 0.25 * found.sigma),
            middle=middle,
            evidence=found.evidence,
            period=found.period,
            correlation=found.correlation,
        )


class ChronosJitter(TensorState):
    """χ: while the step size is damped, multiply it by exp(s e - s^2 / 2), e normal.

    The noise is a pure function of (seed, step). It never helped in any measurement; it is kept
    for completeness, and off by default.
    """

    bounded = False

    def __init__(self, *, scale: float = 0.0, seed: int = 0) -> None:
        if scale < 0:
            raise ValueError(f"scale must not be negative, not {scale}")
        self.scale, self.seed = scale, seed

    def __call__(self, signal: StepSignal) -> Damping:
        """Return the noise factor for the step size."""
        source = random.Random(self.seed * 1_000_003 + signal.step)  # noqa: S311 -- no secret
        draw = source.gauss(0.0, 1.0)  # a number of the host: no device waits
        factor = math.exp(self.scale * draw - self.scale**2 / 2)
        return Damping(step=torch.where(signal.step_damping < 1, factor, 1.0))


def _remember(window: Tensor, value: Tensor, skip: Tensor) -> Tensor:
    """Shift ``value`` into the window unless the step is skipped or the value not finite."""
    shifted = torch.cat([window[1:], value[None]])
    return torch.where(skip | ~value.isfinite(), window, shifted)


def _looked_at(step: int) -> bool:
    """Whether a step is one of the quarter whose gradient is compared with the moment.

    Multiples of the golden ratio modulo 1 (Weyl's sequence) are evenly spread and in step with no
    period.
    """
    return step * 0x9E3779B1 % 2**32 < 2**30

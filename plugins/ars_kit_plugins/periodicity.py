"""A test for periods in a short window of losses: a generalised likelihood ratio against red noise.

The null hypothesis is a quadratic trend plus first-order autoregressive noise, the alternative adds
a periodic component. For each candidate component both are fitted and the residual energies
compared; fitting the noise anew under the alternative is what keeps a strong period from passing
for red noise, and red noise for a period. Candidates are

- sinusoids of every period from 2 to 16 on twice the Fourier grid, so that a period between two
  Fourier frequencies is not missed, and
- any pattern whatever that repeats every 3 to 8 steps (epoch folding, Leahy et al. 1983).

Under the null the ratio of energies follows a Beta distribution whose parameters are the residual
and the candidate's degrees of freedom (the F test of nested linear models). Bonferroni's inequality
bounds the level over all candidates, half of it for either kind (weighted as by Roeder & Wasserman
2009): patterns are few, and the sinusoids, many and much alike, would leave them little.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 64
MAD_TO_SIGMA = 1.4826
"""Makes the median absolute deviation estimate a normal standard deviation (Hampel 1974)."""
FIRST_BIN = 4
FOLDS = range(3, 9)
FREEDOM = WINDOW - 1 - 3 - 1
"""Degrees of freedom of the residuals under the null: one each is lost to the first lag and the
noise's coefficient, three to the trend."""
RED = 0.0, 0.99
"""Coefficients of red noise."""
ROUNDING = 1e-4
"""Oscillation below this share of the loss counts as constant: it is worth no damping, and the
arithmetic is single precision."""


class Finding(NamedTuple):
    """What the test says of windows of losses, shape (..., 64).

    Attributes:
        evidence: log ratio over log critical ratio of the strongest candidate; above 1 its period
            is significant. Shape (...).
        period: of that candidate, in steps; shape (...).
        tame: the losses with outliers pulled to 3 sigma from their trend; shape (..., 64).
        sigma: robust standard deviation of the losses about their trend; shape (...).
        correlation: of each loss with the one before it, about their trend; shape (...).
        error: standard error of the difference between the means of the window's halves, were
            there no period and no trend but the same red noise; shape (...).
    """

    evidence: Tensor
    period: Tensor
    tame: Tensor
    sigma: Tensor
    correlation: Tensor
    error: Tensor


class PeriodTest:
    """Tests windows of ``WINDOW`` losses for a period of 2 to 16 steps at level ``alpha``."""

    def __init__(self, alpha: float) -> None:
        basis, freedom, periods = _candidates()
        waves = len(freedom) - len(FOLDS)
        levels = [alpha / 2 / waves] * waves + [alpha / 2 / len(FOLDS)] * len(FOLDS)
        critical = torch.tensor(list(map(_critical, levels, freedom)))
        self._tables = {torch.device("cpu"): (_trend(), basis, critical.log(), periods)}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return trend, candidates, their log critical ratios and periods, on ``device``."""
        if device not in self._tables:
            here = self._tables[torch.device("cpu")]
            self._tables[device] = (
                here[0].to(device), here[1].to(device), here[2].to(device), here[3].to(device)
            )  # fmt: skip
        return self._tables[device]

    def __call__(self, losses: Tensor) -> Finding:
        """Test windows of losses, shape (..., 64)."""
        trend, basis, critical, periods = self.tables(losses.device)
        fitted = losses @ trend
        rest = losses - fitted
        sigma = MAD_TO_SIGMA * rest.abs().median(-1, keepdim=True).values
        tame = rest.clamp(-3 * sigma, 3 * sigma)
        rest = tame - tame @ trend
        weights = torch.einsum("...w,kwd->...kd", rest, basis)
        without = rest[..., None, :] - torch.einsum("...kd,kwd->...kw", weights, basis)
        floor = WINDOW * (ROUNDING * fitted[..., WINDOW // 2]).square() + 1e-30
        null, correlation = _innovations(rest)
        redness = correlation.clamp(*RED)
        ratio = (_innovations(without)[0] + floor[..., None]) / (null + floor)[..., None]
        evidence, strongest = (ratio.log() / critical).max(-1)
        # Removing a trend takes redness away with it; by simulation about so much at n = 64.
        phi = (redness + (2 + 8 * redness) / WINDOW).clamp(max=0.97)
        error = (null / FREEDOM * 4 / WINDOW).sqrt() / (1 - phi)
        return Finding(
            evidence, periods.take(strongest), fitted + tame, sigma[..., 0], correlation, error
        )


def _innovations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Fit red AR(1) noise to x, shape (..., n); return the energy left over and x's correlation."""
    past, now = x[..., :-1], x[..., 1:]
    lagged, energy = (now * past).sum(-1), past.square().sum(-1)
    # Only redness is noise: a negative coefficient is what a period of two looks like.
    correlation = lagged / energy.clamp(min=1e-30)
    phi = correlation.clamp(*RED)
    left = now.square().sum(-1) - 2 * phi * lagged + phi.square() * energy
    return left.clamp(min=0.0), correlation


@lru_cache(maxsize=1)
def _trend() -> Tensor:
    """Return the projection onto quadratics, (64, 64); symmetric, so it applies from any side."""
    basis = _quadratics()
    return (basis @ basis.T).float()


def _quadratics() -> Tensor:
    """Return an orthonormal basis of the quadratics, (64, 3), in double precision."""
    t = torch.linspace(-1, 1, WINDOW, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(torch.stack([torch.ones_like(t), t, t * t], 1))[0]
    return basis


@lru_cache(maxsize=1)
def _candidates() -> tuple[Tensor, list[int], Tensor]:
    """Return orthonormal bases (63, 64, 7), filled up with zeros, their ranks and their periods."""
    t = torch.arange(WINDOW, dtype=torch.float64)
    waves = [2 * WINDOW / half_bin for half_bin in range(2 * FIRST_BIN, WINDOW + 1)]
    spun = [torch.exp(2j * math.pi / p * t) for p in waves]
    found = [torch.stack([c.real, c.imag], 1) for c in spun]
    found += [torch.eye(p, dtype=torch.float64)[t.long() % p] for p in FOLDS]
    trend, bases = _quadratics(), []
    for columns in found:
        u, s, _ = torch.linalg.svd(columns - trend @ (trend.T @ columns), full_matrices=False)
        bases.append(u[:, s > 1e-2 * s[0]])
    ranks = [b.shape[1] for b in bases]
    stacked = torch.zeros(len(bases), WINDOW, max(ranks), dtype=torch.float64)
    for k, b in enumerate(bases):
        stacked[k, :, : ranks[k]] = b
    return stacked.float(), ranks, torch.tensor([*waves, *map(float, FOLDS)])


@lru_cache(maxsize=64)
def _critical(level: float, freedom: int) -> float:
    """Return the ``level`` quantile of Beta((FREEDOM - freedom) / 2, freedom / 2)."""
    a, b = (FREEDOM - freedom) / 2, freedom / 2
    x = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    density = (scale + (a - 1) * x.log() + (b - 1) * (1 - x).log()).exp()
    return float(x[torch.searchsorted(density.cumsum(0) / 20000, level).clamp(max=19999)])

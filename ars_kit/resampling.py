"""How far a mean over documents is from chance: the bootstrap, seeded.

Documents are drawn with replacement (Efron & Tibshirani 1993, ch. 13, percentile interval); two
models are compared on the same draws (Koehn 2004, "Statistical significance tests for machine
translation evaluation").
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

DRAWS = 2000
MOST = 1000
"""Documents that are drawn one by one; of more, every thousandth go together as one."""
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


def bits_per_byte(nats: Floats, sizes: Floats) -> float:
    """Return the bits that a byte of all documents costs; NaN where there is no byte.

    Args:
        nats: negative log-likelihood of each document, shape (n_documents,).
        sizes: its bytes, likewise.
    """
    return float(nats.sum() / sizes.sum() / math.log(2)) if sizes.sum() else math.nan


def interval(
    nats: Floats, sizes: Floats, *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float] | None:
    """Return the bootstrap interval of :func:`bits_per_byte`.

    None for fewer than two documents, or where no draw of them has a figure.
    """
    if not sizes.sum():
        return None
    return difference_interval(nats, sizes, None, None, confidence=confidence, seed=seed)


def difference_interval(
    nats: Floats,
    sizes: Floats,
    other_nats: Floats | None,
    other_sizes: Floats | None,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the paired bootstrap interval of one model's bits per byte minus another's.

    Args:
        nats: of the one model, by document, shape (n_documents,).
        sizes: bytes, likewise.
        other_nats: of the other model on the same documents; None: it counts as zero.
        other_sizes: bytes, likewise; a document's differ where a tokenizer cut it elsewhere.
        confidence: that the interval should cover the difference.
        seed: of the draws.
    """
    if len(nats) < 2:
        return None
    value = _draws(nats, sizes, seed)
    if other_nats is not None and other_sizes is not None:
        value -= _draws(other_nats, other_sizes, seed)
    if np.isnan(value).all():  # what a model that is broken makes of every draw
        return None
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(value / math.log(2), [tail, 1 - tail])
    return float(low), float(high)


def _draws(nats: Floats, sizes: Floats, seed: int) -> Floats:
    """Return nats per byte of each draw; NaN for one without a byte."""
    group = np.arange(len(nats)) % MOST
    cost, size = (np.bincount(group, weights=values) for values in (nats, sizes))
    n = len(cost)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    drawn = counts @ size
    found: Floats = np.full(DRAWS, np.nan)
    np.divide(counts @ cost, drawn, out=found, where=drawn > 0)
    return found

"""How far a mean over documents is from chance: the bootstrap, seeded.

Documents are drawn with replacement (Efron & Tibshirani 1993, ch. 13, percentile interval); two
models are compared on the same draws (Koehn 2004, "Statistical significance tests for machine
translation evaluation").
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

DRAWS = 10_000
LEAST_DRAWS = 1000
WORK = 20_000_000
"""Documents drawn in all at most: of very many, fewer draws say as much."""
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


def bits_per_byte(nats: Floats, sizes: Floats) -> float:
    """Return the bits that a byte of all documents costs.

    Args:
        nats: negative log-likelihood of each document, shape (n_documents,).
        sizes: its bytes, likewise.
    """
    return float(nats.sum() / sizes.sum() / math.log(2))


def interval(
    nats: Floats, sizes: Floats, *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float] | None:
    """Return the bootstrap interval of :func:`bits_per_byte`; None for fewer than two documents."""
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
    found = []
    for counts in _draws(len(nats), seed):
        value = (counts @ nats) / (counts @ sizes)
        if other_nats is not None and other_sizes is not None:
            value -= (counts @ other_nats) / (counts @ other_sizes)
        found.append(value / math.log(2))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)


def _draws(n: int, seed: int) -> Iterator[Floats]:
    """Yield how often each document was drawn, shape (some, n)."""
    rng = np.random.default_rng(seed)
    left = max(LEAST_DRAWS, min(DRAWS, WORK // n))
    at_once = max(1, WORK // 20 // n)
    while left > 0:
        size = min(left, at_once)
        yield rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        left -= size

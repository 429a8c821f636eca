"""FLOPs of code that the host did not write: counted as torch sees them, whatever they are for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import flop_counter

Shape = tuple[int, ...]


@dataclass(slots=True)
class Account:
    """What was counted, once the counting is over."""

    flops: float = 0.0


@contextmanager
def counting() -> Iterator[Account]:
    """Count matrix products, convolutions, attention and SVDs inside, forward and backward.

    Costs some microseconds an operator on the host; nothing waits for the device.
    """
    account = Account()
    mapping = {getattr(torch.ops.aten, name): formula for name, formula in _MORE.items()}
    with flop_counter.FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield account
    account.flops = float(counter.get_total_flops())


def _forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query, key, value))


def _backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(grad, query, key, value))


def _svd(matrix: Shape, *_: Any, **__: Any) -> int:
    *batch, m, n = matrix
    large, small = max(m, n), min(m, n)
    return math.prod(batch) * (6 * large * small**2 + 20 * small**3)


_MORE = {
    "_scaled_dot_product_flash_attention_for_cpu": _forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _backward,
    "_linalg_svd": _svd,
}
"""What torch has no formula for: the CPU's own attention kernel, and the singular value
decomposition (R-SVD with both sets of vectors: Golub & Van Loan, Matrix Computations, 8.6)."""

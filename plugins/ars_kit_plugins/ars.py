"""ARS for anyone's training loop: ``ARS(torch.optim.AdamW(...))``, then ``step(loss=loss)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.damping import DampedOptimizer
from ars_kit.spec import DampingGate
from ars_kit_plugins.wrappers import ars_gates


class ARS(DampedOptimizer):
    """A torch optimizer that damps unstable steps of ``base``.

    Args:
        base: any torch optimizer instance.
        gates: asked after ARS's own; one of the same name takes its place.
        reduce: means a 0-d loss over all ranks, so that all damp alike; by default over the
            default process group, where there is one.
        fold: let a fused base apply the factors itself; by default wherever it can and the
            parameters are on an accelerator.
        settings: as :func:`ars_kit_plugins.wrappers.ars_gates` takes them.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        gates: Mapping[str, DampingGate] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        fold: bool | None = None,
        **settings: Any,
    ) -> None:
        stack = {**ars_gates(**settings), **(gates or {})}
        super().__init__(base, stack, reduce=reduce or mean_over_ranks, fold=fold)


def mean_over_ranks(loss: Tensor) -> Tensor:
    """Return the mean of a 0-d loss over the default process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return loss
    mean = loss / dist.get_world_size()
    dist.all_reduce(mean)
    return mean

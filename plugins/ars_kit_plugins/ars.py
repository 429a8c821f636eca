"""ARS for anyone's training loop: ``ARS(torch.optim.AdamW(...))``, then ``step(loss=loss)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ars_kit.damping import DampedOptimizer
from ars_kit.instability import Instability, Watch
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
        on_instability: called by :meth:`drain`, on every rank, with what ``watch`` has found in
            the rows. It may load a state from before, into this optimizer too. Should it raise,
            the rows are lost; a flag that the loop looks at is the better way to stop.
        watch: how long instability is told, where somebody wants to hear of it.
        settings: as :func:`ars_kit_plugins.wrappers.ars_gates` takes them.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        gates: Mapping[str, DampingGate] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        fold: bool | None = None,
        on_instability: Callable[[Instability], object] | None = None,
        watch: Watch | None = None,
        **settings: Any,
    ) -> None:
        stack = {**ars_gates(**settings), **(gates or {})}
        super().__init__(base, stack, reduce=reduce or mean_over_ranks, fold=fold)
        self.on_instability = on_instability
        self.watch = None if on_instability is None else watch or Watch()

    def drain(self) -> list[dict[str, Any]]:
        """Return what :meth:`ars_kit.damping.DampedOptimizer.drain` does, once it is looked at."""
        rows = super().drain()
        if self.watch is not None and self.on_instability is not None:
            found = self.watch.look(rows)
            if found is not None:
                self.on_instability(found)
        return rows

    def damping_state(self) -> dict[str, Any]:
        """Return what is not the base's; the same on every rank."""
        state = super().damping_state()
        return state if self.watch is None else {**state, "watch": self.watch.state_dict()}

    def load_damping_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`damping_state` returned."""
        super().load_damping_state(state)
        if self.watch is not None and "watch" in state:
            self.watch.load_state_dict(state["watch"])


def mean_over_ranks(loss: Tensor) -> Tensor:
    """Return the mean of a 0-d loss over the default process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return loss
    mean = loss / dist.get_world_size()
    dist.all_reduce(mean)
    return mean

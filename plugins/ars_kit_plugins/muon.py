"""One optimizer of two: torch's Muon for hidden matrices, torch's AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class MuonWithAdamW(Optimizer):
    """Muon takes two-dimensional hidden weights only; embeddings and vectors go to AdamW.

    Both share this optimizer's groups and state, so schedulers and checkpoints see one optimizer.

    Args:
        params: groups with a ``role``; ``matrix`` goes to Muon.
        lr: default learning rate.
        momentum: of Muon.
    """

    def __init__(self, params: list[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        mine = [g for g in self.param_groups if g["role"] == "matrix"]
        rest = [g for g in self.param_groups if g["role"] != "matrix"]
        self._parts: list[Optimizer] = []
        if mine:
            self._parts.append(torch.optim.Muon(mine, lr=lr, momentum=momentum))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95)))
        self._link()

    def _link(self) -> None:
        """Let the parts work on this optimizer's own groups and state."""
        matrix = [g for g in self.param_groups if g["role"] == "matrix"]
        rest = [g for g in self.param_groups if g["role"] != "matrix"]
        for part in self._parts:
            part.param_groups = matrix if isinstance(part, torch.optim.Muon) else rest
            part.state = self.state
            for group in part.param_groups:
                for key, value in part.defaults.items():
                    group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state; the parts follow."""
        super().load_state_dict(state_dict)
        self._link()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

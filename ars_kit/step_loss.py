"""The loss of the step to come, as it is told: share by share, and as the mean over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ars_kit.errors import ConfigError


@dataclass(slots=True)
class StepLoss:
    """Holds a step's loss from its first share until the step takes it.

    Attributes:
        reduce: means a 0-d loss over all ranks, so that all damp alike. One with a method
            ``begin``, which returns what waits for the mean, lets :meth:`send` overlap it.
        told: the sum of the shares so far, 0-d float32, or None.
        arriving: waits for the mean over all ranks, where it was sent ahead.
    """

    reduce: Callable[[Tensor], Tensor] | None = None
    told: Tensor | None = None
    arriving: Callable[[], Tensor] | None = None

    def add(self, share: Tensor | float, device: torch.device) -> None:
        """Add one micro-batch's share, without waiting for it.

        Raises:
            ConfigError: it is more than one number.
        """
        number = _one_number(share, device)
        self.told = number if self.told is None else self.told + number

    def send(self) -> None:
        """Begin to mean it over all ranks, where that can be done beside other work."""
        begin = getattr(self.reduce, "begin", None)
        if begin is not None and self.told is not None:
            self.arriving, self.told = begin(self.told), None

    def take(self) -> Tensor | None:
        """Return it as the mean over all ranks, or None where none was told, and forget it."""
        told, arriving = self.told, self.arriving
        self.forget()
        if arriving is not None:
            return arriving()
        return told if told is None or self.reduce is None else self.reduce(told)

    def forget(self) -> None:
        """Forget what was told."""
        self.told = self.arriving = None


def _one_number(loss: Tensor | float, device: torch.device) -> Tensor:
    """Return a loss as a 0-d float32 tensor on ``device``, without waiting for one there."""
    if not isinstance(loss, Tensor):
        return torch.full((), float(loss), device=device)
    if loss.numel() != 1:
        raise ConfigError(
            f"a loss must be one number, not a tensor of shape {tuple(loss.shape)}; take its mean"
        )
    loss = loss.detach()
    loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    return loss.reshape(()).to(device, torch.float32, non_blocking=True)

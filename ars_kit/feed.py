"""Batches on their way to the device, a step ahead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ars_kit.tokens import Batches


class Feed:
    """Hands over each step's micro-batches on the device.

    On CUDA the batch of the next step is read, pinned and sent while the device is still busy with
    this one. Anywhere else a batch is read when it is asked for: there is nothing to overlap.

    Args:
        batches: of the member.
        micro_batches: that a step is split into.
        device: where to.
    """

    def __init__(self, batches: Batches, micro_batches: int, device: torch.device) -> None:
        self.batches, self.micro_batches, self.device = batches, micro_batches, device
        self._ready: tuple[int, list[Tensor]] | None = None

    def take(self, place: int) -> list[Tensor]:
        """Return the micro-batches of a step, each (sequences, sequence_length + 1) token ids."""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] == place else self._read(place)

    def prepare(self, place: int) -> None:
        """Send the micro-batches of a step ahead, where that helps; waits for nothing."""
        if self.device.type == "cuda":
            self._ready = place, self._read(place)

    def _read(self, place: int) -> list[Tensor]:
        return [self._sent(place, micro) for micro in range(self.micro_batches)]

    def _sent(self, place: int, micro: int) -> Tensor:
        window = torch.from_numpy(self.batches.batch(place, micro, self.micro_batches))
        if self.device.type == "cuda":
            window = window.pin_memory()  # only a copy from pinned memory is asynchronous
        return window.to(self.device, non_blocking=True)

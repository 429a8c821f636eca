"""Batches on their way to the device, a step ahead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ars_kit.tokens import Batches


class Micro(NamedTuple):
    """One micro-batch on the device.

    Attributes:
        window: token ids, shape (sequences, sequence_length + 1).
        positions: of each input token in its document, shape (sequences, sequence_length), where
            documents are kept apart.
    """

    window: Tensor
    positions: Tensor | None


class Feed:
    """Hands over each step's micro-batches on the device.

    On CUDA the batch of the next step is read, pinned and sent while the device is still busy with
    this one. Anywhere else a batch is read when it is asked for: there is nothing to overlap.

    Args:
        batches: of the member.
        micro_batches: that a step is split into.
        device: where to.
        apart: whether documents are kept apart.
    """

    def __init__(
        self, batches: Batches, micro_batches: int, device: torch.device, *, apart: bool = False
    ) -> None:
        self.batches, self.micro_batches, self.device = batches, micro_batches, device
        self.apart = apart
        self._ready: tuple[int, list[Micro]] | None = None

    def take(self, place: int) -> list[Micro]:
        """Return the micro-batches of a step."""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] == place else self._read(place)

    def prepare(self, place: int) -> None:
        """Send the micro-batches of a step ahead, where that helps; waits for nothing."""
        if self.device.type == "cuda":
            self._ready = place, self._read(place)

    def _read(self, place: int) -> list[Micro]:
        parts = self.micro_batches
        return [
            Micro(
                self._sent(self.batches.batch(place, micro, parts)),
                self._sent(self.batches.positions(place, micro, parts)) if self.apart else None,
            )
            for micro in range(parts)
        ]

    def _sent(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(numbers)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # only a copy from pinned memory is asynchronous
        return tensor.to(self.device, non_blocking=True)

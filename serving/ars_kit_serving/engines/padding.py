"""Sequences of different lengths in one batch, by padding on the left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class PaddedEngine(ABC):
    """An engine whose cache is, for each layer, keys and values of (rows, heads, width, dim).

    A sequence's own tokens are the last of its row. The batch is made anew when sequences come or
    go, and grows by a column a step in between.

    Args:
        context: tokens a sequence may have.
        slots: sequences at once.
    """

    def __init__(self, context: int, slots: int) -> None:
        self.context, self.slots = context, slots
        self._alone: dict[int, list[Any]] = {}  # caches of prompts that are in no batch yet
        self._lengths: dict[int, int] = {}
        self._rows: list[int] = []  # the batch's slots, in order
        self._batch: list[Any] = []  # an array for each layer's keys and each layer's values

    @abstractmethod
    def run(
        self, tokens: Integers, mask: Integers, positions: Integers, past: list[Any] | None
    ) -> tuple[Logits, list[Any]]:
        """Run the model.

        Args:
            tokens: shape (rows, new).
            mask: 1 where a token is, 0 where padding is, shape (rows, old + new).
            positions: shape (rows, new).
            past: the cache of the old, or None.

        Returns:
            The last token's logits, shape (rows, vocabulary), and the cache of old and new.
        """

    @abstractmethod
    def zeros(self, like: Any, shape: tuple[int, ...]) -> Any:
        """Return an array of zeros of the same kind."""

    def array(self, cached: Any) -> Any:
        """Return a cached array as one that can be sliced and assigned."""
        return cached

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits:
        """Compute a prompt by itself."""
        ids = np.array([tokens], np.int64)
        logits, past = self.run(ids, np.ones_like(ids), np.arange(len(tokens))[None], None)
        self._alone[slot], self._lengths[slot] = past, len(tokens)
        row: Logits = logits[0]
        return row

    def decode(self, tokens: Mapping[int, int]) -> Logits:
        """Take all sequences a token further."""
        if self._alone or self._rows != list(tokens):
            self._regroup(list(tokens))
        lengths = np.array([self._lengths[slot] for slot in tokens], np.int64)
        width = int(self.array(self._batch[0]).shape[2]) + 1
        mask = (np.arange(width) >= (width - 1 - lengths)[:, None]).astype(np.int64)
        ids = np.array(list(tokens.values()), np.int64)[:, None]
        logits, self._batch = self.run(ids, mask, lengths[:, None], self._batch)
        for slot in tokens:
            self._lengths[slot] += 1
        return logits

    def release(self, slot: int) -> None:
        """Forget a sequence; the batch closes up when it is next computed."""
        self._alone.pop(slot, None)
        self._lengths.pop(slot, None)
        if not self._lengths:
            self._batch, self._rows = [], []

    def _regroup(self, slots: list[int]) -> None:
        """Make the batch anew from its old rows and the prompts that came in."""
        width = max(self._lengths[slot] for slot in slots)
        caches = [self._own(slot) for slot in slots]
        batch = []
        for parts in zip(*caches, strict=True):
            heads, _, size = parts[0].shape
            whole = self.zeros(parts[0], (len(slots), heads, width, size))
            for row, part in enumerate(parts):
                whole[row, :, width - part.shape[1] :] = part
            batch.append(whole)
        self._batch, self._rows = batch, slots
        self._alone.clear()

    def _own(self, slot: int) -> list[Any]:
        """Return one sequence's arrays without padding, (heads, length, dim) each."""
        length = self._lengths[slot]
        cache, row = self._alone.get(slot), 0
        if cache is None:
            cache, row = self._batch, self._rows.index(slot)
        return [self.array(c)[row, :, -length:] for c in cache]

    def close(self) -> None:
        """Drop what is cached."""
        self._alone.clear()
        self._lengths.clear()
        self._batch = []

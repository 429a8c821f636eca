"""Token streams as training batches and as held-out windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ars_kit.errors import ConfigError, DataError

TokenStream = npt.NDArray[Any]
"""A 1-d array of uint16 or uint32 token ids, memory-mapped."""
Ends = npt.NDArray[np.int64]
"""How many tokens a stream has up to the end of each document, 1-d and rising, memory-mapped."""


class Batches:
    """Training batches as a pure function of (seed, step, rank, micro-batch).

    The stream is cut into windows of ``sequence_length + 1`` tokens that overlap by one, from an
    offset that changes with the epoch; an epoch's windows come in a seeded permutation. Whatever
    the number of ranks and micro-batches, a step reads the same windows in the same order.

    Args:
        stream: training tokens.
        sequence_length: tokens a sequence predicts.
        batch_size: sequences per optimizer step over all ranks.
        seed: of the order.
        rank: this process.
        world_size: processes that share a step.
        start: sequences that the lineage has read before step 0.
        ends: of the stream's documents, where :meth:`positions` are asked for.

    Raises:
        ConfigError: a batch does not divide into equal parts for the processes.
        DataError: the stream is too short.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        ends: Ends | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ConfigError(
                f"train.batch_size {batch_size} cannot be split over {world_size} processes"
            )
        self.stream, self.ends = stream, ends
        self.length = sequence_length
        self.batch_size = batch_size
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start
        # One window fewer than fit, so that every epoch's offset leaves them all inside.
        self.windows = (len(stream) - 1) // sequence_length - 1
        if self.windows < 1:
            raise DataError(
                f"too little text: {len(stream)} training tokens do not hold two sequences "
                f"of {sequence_length}"
            )

    def batch(self, step: int, micro: int = 0, micro_batches: int = 1) -> npt.NDArray[np.int64]:
        """Return (batch_size / world_size / micro_batches, sequence_length + 1) token ids.

        Raises:
            ConfigError: a batch does not divide into that many equal parts.
        """
        rows = [self.sequence(number) for number in self._numbers(step, micro, micro_batches)]
        return np.stack(rows).astype(np.int64)

    def positions(self, step: int, micro: int = 0, micro_batches: int = 1) -> npt.NDArray[np.int64]:
        """Return each input token's position in its document, as :meth:`batch` returns the tokens.

        A document that began before its window counts from the window's begin.

        Returns:
            Shape (batch_size / world_size / micro_batches, sequence_length).
        """
        rows = []
        for number in self._numbers(step, micro, micro_batches):
            text, begin = self.locate(number)
            assert text.ends is not None  # noqa: S101 -- the caller's to know
            rows.append(positions_in(text.ends, begin, self.length))
        return np.stack(rows)

    def _numbers(self, step: int, micro: int, micro_batches: int) -> range:
        size, left_over = divmod(self.batch_size, self.world_size * micro_batches)
        if left_over:
            raise ConfigError(
                f"train.batch_size {self.batch_size} cannot be split into {micro_batches} equal "
                f"micro-batches on each of {self.world_size} processes"
            )
        first = step * self.batch_size + (self.rank * micro_batches + micro) * size
        return range(first, first + size)

    def sequence(self, number: int) -> TokenStream:
        """Return a sequence of ``sequence_length + 1`` tokens, counted from step 0."""
        text, begin = self.locate(number)
        return text.stream[begin : begin + self.length + 1]

    def locate(self, number: int) -> tuple[Batches, int]:
        """Return whose stream a sequence is read from, and where it begins there."""
        index = self.start + number
        epoch, place = divmod(index, self.windows)
        window = permuted(place, self.windows, key=(self.seed << 20) ^ epoch)
        offset = _mix(epoch, self.seed) % self.length if epoch else 0
        return self, offset + window * self.length


class Replayed(Batches):
    """Batches of which an even share is read again from texts that the lineage has left.

    Args:
        own: what would be read without them; it is read without a gap.
        old: batches of each such text from its beginning, and how many sequences of it were read.
            They take turns, and none gives a sequence that was not read before.
        share: of all sequences, in [0, 1).
    """

    def __init__(self, own: Batches, old: Sequence[tuple[Batches, int]], share: float) -> None:
        self.__dict__ |= own.__dict__
        self.own, self.old, self.share = own, old, share

    def locate(self, number: int) -> tuple[Batches, int]:
        """Return whose stream a sequence is read from; an old one's wherever the share is due."""
        before, after = int(number * self.share), int((number + 1) * self.share)
        if before == after:
            return self.own.locate(number - before)
        text, read = self.old[before % len(self.old)]
        return text.locate(before // len(self.old) % read)


def positions_in(ends: Ends, begin: int, length: int) -> npt.NDArray[np.int64]:
    """Return each token's position in its document, for ``length`` tokens of a stream.

    The end-of-text token is the last of the document that it ends. A document that began before
    ``begin`` counts from there.
    """
    first, last = np.searchsorted(ends, (begin + 1, begin + length))
    starts = np.asarray(ends[first:last]) - begin
    origin = np.zeros(length, dtype=np.int64)
    origin[starts] = starts
    return np.arange(length) - np.maximum.accumulate(origin)


def permuted(place: int, size: int, *, key: int) -> int:
    """Return where ``place`` goes in a keyed permutation of ``range(size)``, in O(1) memory.

    A four-round Feistel network over the next even power of two, walked until it lands inside
    (Black & Rogaway 2002, cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right, key * 4 + round_number) & mask)
        place = (left << half) | right
        if place < size:
            return place


def _mix(value: int, key: int) -> int:
    """Hash two integers to 64 bits (SplitMix64's finalizer)."""
    z = (value + 0x9E3779B97F4A7C15 * (key + 1)) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def heldout_windows(
    stream: TokenStream, context: int, limit: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield windows of at most ``context`` + 1 tokens that predict each token but the first once.

    Args:
        stream: held-out tokens.
        context: tokens a window predicts.
        limit: predict at most this many, from the start.
    """
    end = len(stream) if limit is None else min(len(stream), limit + 1)
    for begin in range(0, end - 1, context):
        yield np.asarray(stream[begin : min(begin + context + 1, end)], dtype=np.int64)

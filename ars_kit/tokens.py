"""Tokenizers, and token streams as batches and held-out windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ars_kit.errors import DataError

EOS = "<|endoftext|>"

TokenStream = npt.NDArray[Any]
"""A 1-d array of uint16 or uint32 token ids, memory-mapped."""


@dataclass(frozen=True, slots=True)
class TrainBPE:
    """Train a byte-level BPE on the training split; any UTF-8 text round-trips."""

    vocab_size: int = 1024


@dataclass(frozen=True, slots=True)
class Pretrained:
    """The tokenizer of a pretrained base, a directory or a hub id."""

    name: str


TokenizerSpec = TrainBPE | Pretrained


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """A tokenizer on disk, how many ids it has, and the hash of its files."""

    directory: Path
    size: int
    hash: str


def make_tokenizer(spec: TokenizerSpec, texts: Iterator[str], directory: Path) -> MadeTokenizer:
    """Train or fetch a tokenizer and save it as transformers does.

    Raises:
        DataError: a pretrained one cannot be had, or is not a fast one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415 -- slow

    if isinstance(spec, TrainBPE):
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=spec.vocab_size,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        fast: Any = PreTrainedTokenizerFast(
            tokenizer_object=trained, bos_token=EOS, eos_token=EOS, pad_token=EOS
        )
    else:
        try:
            fast = AutoTokenizer.from_pretrained(spec.name, trust_remote_code=False)
        except Exception as error:
            why = str(error).strip().splitlines()[0]
            raise DataError(f"cannot load the tokenizer of {spec.name!r}: {why}") from error
        if not getattr(fast, "is_fast", False):
            raise DataError(f"the tokenizer of {spec.name!r} has no fast form (tokenizer.json)")
    fast.save_pretrained(directory)
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return MadeTokenizer(directory, len(fast), digest.hexdigest())


def load_fast(directory: Path) -> Tokenizer:
    """Load the ``tokenizers`` object of a saved tokenizer."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


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
    ) -> None:
        if batch_size % world_size:
            raise DataError(
                f"train.batch_size {batch_size} cannot be split over {world_size} processes"
            )
        self.stream = stream
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
        """Return (batch_size / world_size / micro_batches, sequence_length + 1) token ids."""
        size = self.batch_size // (self.world_size * micro_batches)
        first = self.start + step * self.batch_size + (self.rank * micro_batches + micro) * size
        rows = [self._sequence(first + i) for i in range(size)]
        return np.stack(rows).astype(np.int64)

    def _sequence(self, index: int) -> TokenStream:
        epoch, place = divmod(index, self.windows)
        window = permuted(place, self.windows, key=(self.seed << 20) ^ epoch)
        offset = _mix(epoch, self.seed) % self.length if epoch else 0
        begin = offset + window * self.length
        return self.stream[begin : begin + self.length + 1]


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

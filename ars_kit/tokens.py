"""Tokenizers, and token streams as batches and held-out windows."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ars_kit.errors import ConfigError, DataError
from ars_kit.passages import PassageWriter

EOS = "<|endoftext|>"
BATCH_BYTES = 4 << 20
"""Text that is tokenized at once, in pieces that the tokenizer's threads share."""

TokenStream = npt.NDArray[Any]
"""A 1-d array of uint16 or uint32 token ids, memory-mapped."""
Ends = npt.NDArray[np.int64]
"""How many tokens a stream has up to the end of each document, 1-d and rising, memory-mapped."""


@dataclass(frozen=True, slots=True)
class TrainBPE:
    """Train a byte-level BPE on the training split; any UTF-8 text round-trips."""

    vocab_size: int = 1024


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A tokenizer that is there: that of a pretrained base, or of a family's other text.

    Attributes:
        name: a directory or a hub id.
        ours: trained by :class:`TrainBPE`, so that text which spells its separator is text.
    """

    name: str
    ours: bool = False


TokenizerSpec = TrainBPE | Pretrained


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """A tokenizer on disk.

    Attributes:
        directory: where transformers' AutoTokenizer finds it.
        size: one more than its largest id.
        end: id of the token that ends a document.
        hash: sha256 of its files.
        core: what encodes.
    """

    directory: Path
    size: int
    end: int
    hash: str
    core: Tokenizer


def identify(spec: TokenizerSpec) -> dict[str, Any]:
    """Return what identifies a tokenizer's ids: how it is trained, or what it holds.

    Raises:
        DataError: a pretrained one cannot be had.
    """
    if isinstance(spec, TrainBPE):
        return asdict(spec)
    fast = load_pretrained(spec.name)
    held = hashlib.sha256(fast.backend_tokenizer.to_str().encode())
    found = {"pretrained": held.hexdigest(), "end": fast.eos_token_id}
    return {**found, "ours": True} if spec.ours else found


def make_tokenizer(spec: TokenizerSpec, texts: Iterator[str], directory: Path) -> MadeTokenizer:
    """Train or fetch a tokenizer and save it as transformers does.

    Raises:
        DataError: a pretrained one cannot be had, or is not a fast one.
    """
    fast = (
        _train(spec.vocab_size, texts) if isinstance(spec, TrainBPE) else load_pretrained(spec.name)
    )
    fast.save_pretrained(directory)
    core = load_fast(directory)
    # A tokenizer of ours has one special token, the separator: text that happens to spell it is
    # text. In a pretrained one's text such markers (of a chat) mean what the base has learned.
    core.encode_special_tokens = isinstance(spec, TrainBPE) or spec.ours
    size = max(core.get_vocab(with_added_tokens=True).values()) + 1
    return MadeTokenizer(directory, size, int(fast.eos_token_id), tokenizer_hash(directory), core)


def tokenizer_hash(directory: Path) -> str:
    """Return the sha256 over the names and contents of a saved tokenizer's files."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def load_fast(directory: Path) -> Tokenizer:
    """Load the ``tokenizers`` object of a saved tokenizer; it neither truncates nor pads."""
    core = Tokenizer.from_file(str(directory / "tokenizer.json"))
    core.no_truncation()
    core.no_padding()
    return core


def load_pretrained(name: str) -> Any:
    """Load the fast transformers tokenizer of a directory or a hub id.

    Raises:
        DataError: it is not there, is a slow one, or names no end-of-text token.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 -- slow

    try:
        fast = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # hub, file and format errors share no class
        lines = str(error).strip().splitlines() or [repr(error)]
        raise DataError(f"cannot load the tokenizer of {name!r}: {lines[0]}") from error
    if not getattr(fast, "is_fast", False):
        raise DataError(f"the tokenizer of {name!r} has no fast form (tokenizer.json)")
    # Where the files are missing, transformers hands out the class's empty shell.
    if set(fast.get_vocab().values()) <= set(fast.all_special_ids):
        raise DataError(f"{name!r} holds no tokenizer; put its tokenizer.json beside the weights")
    if fast.eos_token_id is None:
        raise DataError(f"the tokenizer of {name!r} names no end-of-text token (eos_token)")
    return fast


def _train(vocab_size: int, texts: Iterator[str]) -> Any:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 -- slow

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ConfigError(
            f"a byte-level vocabulary of {vocab_size} is too small: it starts at "
            f"{len(alphabet) + 1}, every byte and the end of text"
        )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,  # it would eat the space before a full stop
    )


def write_tokens(
    pieces: Iterator[tuple[str, bool]],
    made: MadeTokenizer,
    path: Path,
    dtype: npt.DTypeLike,
    told: Callable[[int], None],
    index: PassageWriter | None = None,
    *,
    ends: array[int] | None = None,
) -> int:
    """Write the tokens of ``pieces`` to ``path`` as they come; returns how many.

    Args:
        pieces: text, and whether a document ends with it and an end-of-text token follows.
        made: the tokenizer.
        path: a flat file of ``dtype``.
        dtype: holds every id.
        told: called with the number of tokens written so far.
        index: takes down where documents begin and end.
        ends: takes down how many tokens there are up to the end of each document.
    """
    # Without offsets it is faster, and only a cut inside a document asks for them.
    encode = made.core.encode_batch if index and index.size else made.core.encode_batch_fast
    count = 0
    with path.open("wb") as file:
        for batch in _batched(pieces):
            texts = [text for text, _ in batch]
            coded = encode(texts, add_special_tokens=False)
            for encoding, (text, last) in zip(coded, batch, strict=True):
                if index:
                    index.add(text, encoding, ends=last)
                ids = np.array(encoding.ids + [made.end] * last, dtype=dtype)
                file.write(ids.tobytes())
                count += len(ids)
                if last and ends is not None:
                    ends.append(count)
            told(count)
    return count


def _batched(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    total = 0
    for piece in pieces:
        batch.append(piece)
        total += len(piece[0])
        if total > BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


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

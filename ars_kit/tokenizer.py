"""Tokenizers trained or fetched, and the token files they write."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ars_kit.errors import ConfigError, DataError
from ars_kit.hub import place_of
from ars_kit.passages import PassageWriter

EOS = "<|endoftext|>"
BATCH_BYTES = 4 << 20
"""Text that is tokenized at once, in pieces that the tokenizer's threads share."""


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

    place, revision = place_of(name)
    try:
        fast = AutoTokenizer.from_pretrained(place, trust_remote_code=False, revision=revision)
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

"""From documents to batches: deduplicated, split, tokenized once, memory-mapped ever after.

Text passes through in a stream: what stays in memory is 16 bytes of digest and 8 of length for each
document. A prepared corpus is cached under its source's fingerprint, so that a second run reads
none of the text again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from ars_kit.errors import ConfigError, DataError
from ars_kit.spec import DataSource
from ars_kit.tokens import EOS, TokenizerSpec, TokenStream, load_fast, make_tokenizer

FORMAT = 1
FEW_DOCUMENTS = 20
"""Below this many documents a split by document is a lottery, and each is cut by span."""
SPAN_GAP = 0.01
"""Share of a document between its training span and its held-out span that is used for neither."""
BATCH_BYTES = 4 << 20
TOKENIZER_BYTES = 64 << 20

Split = Literal["documents", "spans"]
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What is known of a prepared corpus; kept as ``corpus.json`` beside its token files."""

    data_hash: str
    tokenizer_hash: str
    split: Split
    documents: int
    heldout_documents: int
    duplicates: int
    train_bytes: int
    heldout_bytes: int
    train_tokens: int
    heldout_tokens: int
    dtype: str
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A prepared text on disk.

    Attributes:
        train: the training tokens, each document followed by an end-of-text token.
        heldout: likewise, from text that neither the model nor the tokenizer trains on.
        tokenizer_dir: a tokenizer that transformers' AutoTokenizer loads.
    """

    facts: CorpusFacts
    train: TokenStream
    heldout: TokenStream
    tokenizer_dir: Path

    @property
    def heldout_bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text per held-out token."""
        return self.facts.heldout_bytes / self.facts.heldout_tokens


def prepare(
    source: DataSource,
    *,
    tokenizer: TokenizerSpec,
    cache: Path,
    heldout_fraction: float = 0.1,
    need_train: int = 1,
    need_heldout: int = 1,
    progress: Progress | None = None,
) -> Corpus:
    """Return the corpus of ``source``, from the cache where it was prepared before.

    Args:
        source: where the documents come from.
        tokenizer: a BPE to train on the training split, or a pretrained one.
        cache: directory for prepared corpora.
        heldout_fraction: share of the text never trained on.
        need_train: tokens the run needs at least for one batch.
        need_heldout: tokens it needs at least for one held-out window.
        progress: told a stage's name and a running count.

    Raises:
        DataError: the source cannot be read, is empty, or holds too few tokens.
    """
    identity = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": asdict(tokenizer),
        "heldout_fraction": heldout_fraction,
    }
    blob = json.dumps(identity, sort_keys=True, default=str).encode()
    folder = cache / hashlib.sha256(blob).hexdigest()[:24]
    if not _complete(folder):
        _prepare_into(folder, source, tokenizer, heldout_fraction, identity, progress)
    corpus = _open(folder)
    for name, have, need in (
        ("training", corpus.facts.train_tokens, need_train),
        ("held-out", corpus.facts.heldout_tokens, need_heldout),
    ):
        if have < need:
            raise DataError(
                f"too little text: {have} {name} tokens where one batch needs {need}; add text, "
                "or lower --sequence-length or --batch-size"
            )
    return corpus


def _prepare_into(
    folder: Path,
    source: DataSource,
    tokenizer: TokenizerSpec,
    fraction: float,
    identity: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"cannot write the data cache {folder.parent}: {error}") from error
    spool = _Spool(temp / "text.spool")
    try:
        spool.fill(source, progress)
        spool.divide(fraction)
        made = make_tokenizer(tokenizer, _capped(spool.texts("train")), temp / "tokenizer")
        dtype = np.dtype("uint16" if made.size <= 1 << 16 else "uint32")
        counts: dict[str, tuple[int, int, int]] = {}
        for part in ("train", "heldout"):
            path = temp / f"{part}.bin"
            counts[part] = _encode(spool.texts(part), made.directory, path, dtype, progress)
        facts = CorpusFacts(
            data_hash=spool.data_hash,
            tokenizer_hash=made.hash,
            split=spool.split,
            documents=len(spool.lengths),
            heldout_documents=counts["heldout"][0],
            duplicates=spool.duplicates,
            train_bytes=counts["train"][1],
            heldout_bytes=counts["heldout"][1],
            train_tokens=counts["train"][2],
            heldout_tokens=counts["heldout"][2],
            dtype=dtype.name,
            fingerprint=identity,
        )
        spool.close()
        (temp / "text.spool").unlink()
        (temp / "corpus.json").write_text(json.dumps(asdict(facts), indent=1, default=str))
        try:
            temp.rename(folder)
        except OSError:
            # Another run prepared the same corpus meanwhile; one of the two is enough.
            if not _complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                temp.rename(folder)
    except OSError as error:
        raise DataError(f"preparing the text failed: {error}") from error
    finally:
        spool.close()
        shutil.rmtree(temp, ignore_errors=True)


class _Spool:
    """The deduplicated documents, on disk in order, and how they are divided."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("w+b")
        self.lengths = array("q")
        self.marks = array("Q")  # the first 8 bytes of each digest: decides the side
        self.duplicates = 0
        self.split: Split = "documents"
        self._bound = 0
        self._fraction = 0.0
        self.data_hash = ""

    def fill(self, source: DataSource, progress: Progress | None) -> None:
        seen: set[bytes] = set()
        whole = hashlib.sha256()
        for n, document in enumerate(source.documents()):
            raw = document.text.strip().encode("utf-8", "replace")
            if not raw:
                continue
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            if digest in seen:
                self.duplicates += 1
                continue
            seen.add(digest)
            whole.update(digest)
            self.lengths.append(len(raw))
            self.marks.append(int.from_bytes(digest[:8], "big"))
            self._file.write(raw)
            if progress and n % 256 == 0:
                progress("reading documents", n)
        if not self.lengths:
            raise DataError("the data source holds no text")
        self.data_hash = whole.hexdigest()

    def divide(self, fraction: float) -> None:
        """Hold out documents by their content's hash, or a span of each where that is unfair."""
        self._fraction = fraction
        self._bound = int(fraction * 2**64)
        total = sum(self.lengths)
        pairs = zip(self.lengths, self.marks, strict=True)
        held = sum(n for n, mark in pairs if mark < self._bound)
        fair = 0.5 * fraction <= held / total <= 2 * fraction
        self.split = "documents" if fair and len(self.lengths) >= FEW_DOCUMENTS else "spans"

    def texts(self, part: str) -> Iterator[str]:
        """Yield one side's texts in order."""
        self._file.seek(0)
        for length, mark in zip(self.lengths, self.marks, strict=True):
            raw = self._file.read(length)
            if self.split == "documents":
                if (mark < self._bound) == (part == "heldout"):
                    yield raw.decode()
                continue
            text = raw.decode()
            cut = int(len(text) * (1 - self._fraction))
            gap = max(1, int(len(text) * SPAN_GAP))
            piece = text[: max(0, cut - gap)] if part == "train" else text[cut:]
            if piece:
                yield piece

    def close(self) -> None:
        self._file.close()


def _capped(texts: Iterator[str]) -> Iterator[str]:
    """Stop after what a tokenizer needs to see: its training keeps word counts in memory."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total > TOKENIZER_BYTES:
            return


def _encode(
    texts: Iterator[str],
    directory: Path,
    path: Path,
    dtype: np.dtype[Any],
    progress: Progress | None,
) -> tuple[int, int, int]:
    """Append every text's tokens to ``path``; returns documents, bytes, tokens."""
    fast = load_fast(directory)
    end = fast.token_to_id(EOS) if fast.token_to_id(EOS) is not None else _eos_of(directory)
    documents = size = tokens = 0
    with path.open("wb") as file:
        for batch in _batched(texts):
            for text, encoding in zip(
                batch, fast.encode_batch(batch, add_special_tokens=False), strict=True
            ):
                ids = np.array([*encoding.ids, end], dtype=dtype)
                ids.tofile(file)
                documents, tokens = documents + 1, tokens + len(ids)
                size += len(text.encode())
            if progress:
                progress("tokenizing", documents)
    return documents, size, tokens


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    total = 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total > BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _eos_of(directory: Path) -> int:
    from transformers import AutoTokenizer  # noqa: PLC0415 -- slow, and only a base needs it

    end = AutoTokenizer.from_pretrained(str(directory)).eos_token_id
    if end is None:
        raise DataError("the base's tokenizer has no end-of-text token")
    return int(end)


def _complete(folder: Path) -> bool:
    """Whether ``folder`` holds a whole corpus: it appears by rename, so what is there is whole."""
    try:
        facts = CorpusFacts(**json.loads((folder / "corpus.json").read_text()))
        item = np.dtype(facts.dtype).itemsize
        return all(
            os.path.getsize(folder / f"{part}.bin") == count * item  # noqa: PTH202
            for part, count in (("train", facts.train_tokens), ("heldout", facts.heldout_tokens))
        )
    except (OSError, ValueError, TypeError):
        return False


def _open(folder: Path) -> Corpus:
    facts = CorpusFacts(**json.loads((folder / "corpus.json").read_text()))
    streams: dict[str, npt.NDArray[Any]] = {}
    for part, count in (("train", facts.train_tokens), ("heldout", facts.heldout_tokens)):
        path = folder / f"{part}.bin"
        streams[part] = (
            np.memmap(path, dtype=facts.dtype, mode="r") if count else np.zeros(0, facts.dtype)
        )
    return Corpus(facts, streams["train"], streams["heldout"], folder / "tokenizer")

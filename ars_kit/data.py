"""From documents to batches: deduplicated, split, tokenized once, memory-mapped ever after.

Text passes through in a stream, by way of a spool on disk: what stays in memory of a document is
its digest, length and side (about 120 bytes), whatever its size. A prepared corpus is cached under
its source's fingerprint, so that a second run reads none of the text again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ars_kit.durable import disk_errors
from ars_kit.errors import ConfigError, DataError
from ars_kit.passages import Passages, PassageWriter
from ars_kit.spec import DataSource, Passage
from ars_kit.spool import FEW_DOCUMENTS, PARTS, Division, Part, Progress, Split, Spool
from ars_kit.tokenizer import TokenizerSpec, identify, make_tokenizer, tokenizer_hash, write_tokens
from ars_kit.tokens import Ends, TokenStream

FORMAT = 5
TOKENIZER_BYTES = 64 << 20
"""Training text that a tokenizer learns from; more is sampled evenly down to this."""
ABANDONED = 24 * 3600.0
"""Seconds without a write after which an unfinished preparation was killed, and is cleared."""
DIGITS = 24
"""Of a hash, that a corpus is called by."""
_PREPARING = re.compile(rf"[0-9a-f]{{{DIGITS}}}-\w+")
"""What an unfinished preparation is called: a corpus, and what ``tempfile`` puts behind it."""


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
        train_ends: how many of them there are up to the end of each document.
        heldout: likewise, from text that neither the model nor the tokenizer trains on.
        tokenizer_dir: a tokenizer that transformers' AutoTokenizer loads.
        facts: what is known of it.
        passages: where the held-out documents begin and end.
        division: which documents were cut, and which went to one side whole.
    """

    facts: CorpusFacts
    train: TokenStream
    train_ends: Ends
    heldout: TokenStream
    tokenizer_dir: Path
    passages: Sequence[Passage]
    division: Division

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
    beside: Collection[Corpus] = (),
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
        beside: corpora of the same fraction, of which nothing that is held out may be trained on
            here, where both hold a document.
        progress: told a stage's name and a running count.

    Raises:
        DataError: the source cannot be read, is empty, or holds too few tokens.
    """
    identity = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": identify(tokenizer),
        "heldout_fraction": heldout_fraction,
        **({"beside": [corpus.facts.data_hash for corpus in beside]} if beside else {}),
    }
    blob = json.dumps(identity, sort_keys=True, default=str).encode()
    folder = cache / hashlib.sha256(blob).hexdigest()[:DIGITS]
    if not _complete(folder):
        _prepare_into(
            folder,
            source,
            tokenizer=tokenizer,
            fraction=heldout_fraction,
            divisions=[corpus.division for corpus in beside],
            identity=identity,
            progress=progress,
        )
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
    *,
    tokenizer: TokenizerSpec,
    fraction: float,
    divisions: Sequence[Division],
    identity: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(folder.parent)
        temp = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write the data cache {folder.parent} ({error.strerror}); name another in "
            "ARSKIT_CACHE"
        ) from error
    try:
        with disk_errors(folder):
            with closing(Spool(temp / "text.spool")) as spool:
                facts = _fill(
                    temp,
                    spool,
                    source,
                    tokenizer=tokenizer,
                    fraction=fraction,
                    divisions=divisions,
                    identity=identity,
                    tell=progress or _silent,
                )
            (temp / "text.spool").unlink()
            text = json.dumps(asdict(facts), indent=1, default=str)
            (temp / "corpus.json").write_text(text, "utf-8")
            _publish(temp, folder)
    except OSError as error:
        raise DataError(f"preparing the text in {folder.parent} failed: {error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _fill(
    temp: Path,
    spool: Spool,
    source: DataSource,
    *,
    tokenizer: TokenizerSpec,
    fraction: float,
    divisions: Sequence[Division],
    identity: Mapping[str, Any],
    tell: Progress,
) -> CorpusFacts:
    """Write the tokenizer and both token files into ``temp``."""
    spool.fill(source, tell)
    spool.divide(fraction, divisions)
    spool.division.save(temp)
    tell("training the tokenizer", len(spool.lengths))
    made = make_tokenizer(tokenizer, spool.sample(TOKENIZER_BYTES), temp / "tokenizer")
    dtype = np.dtype("uint16" if made.size <= 1 << 16 else "uint32")
    sizes = {part: [stop - start for start, stop in spool.ranges(part)] for part in PARTS}
    index, ends = PassageWriter.of(sizes["heldout"], FEW_DOCUMENTS), array("q")
    tokens = {
        part: write_tokens(
            spool.pieces(part),
            made,
            temp / f"{part}.bin",
            dtype,
            lambda count: tell("tokenizing", count),
            index if part == "heldout" else None,
            ends=ends if part == "train" else None,
        )
        for part in PARTS
    }
    np.asarray(ends, dtype=np.int64).tofile(temp / "train.ends")
    index.save(temp, spool.origins("heldout"))
    return CorpusFacts(
        data_hash=spool.data_hash,
        tokenizer_hash=made.hash,
        split=spool.split,
        documents=len(spool.lengths),
        heldout_documents=len(sizes["heldout"]),
        duplicates=spool.duplicates,
        train_bytes=sum(sizes["train"]),
        heldout_bytes=sum(sizes["heldout"]),
        train_tokens=tokens["train"],
        heldout_tokens=tokens["heldout"],
        dtype=dtype.name,
        fingerprint=identity,
    )


def _silent(stage: str, count: int) -> None:
    """Tell nobody."""


def _publish(temp: Path, folder: Path) -> None:
    """Make a finished preparation durable, then visible, all at once."""
    for path in [p for p in temp.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        temp.rename(folder)
    except OSError:
        # Another run prepared the same corpus meanwhile; one of the two is enough.
        if not _complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            temp.rename(folder)


def _clear_abandoned(cache: Path) -> None:
    """Remove what killed preparations left; a live one writes all the time."""
    for temp in cache.glob("*-*/"):
        if not _PREPARING.fullmatch(temp.name):  # whoever else keeps something here
            continue
        try:
            written = max(p.stat().st_mtime for p in [temp, *temp.iterdir()])
        except FileNotFoundError:  # another process finished it, or removed a file, this moment
            continue
        if time.time() - written > ABANDONED:
            shutil.rmtree(temp, ignore_errors=True)


def _complete(folder: Path) -> bool:
    """Whether ``folder`` holds a corpus: token files of the right size, the right tokenizer."""
    try:
        facts = CorpusFacts(**json.loads((folder / "corpus.json").read_text("utf-8")))
        item = np.dtype(facts.dtype).itemsize
        sizes = {"train": facts.train_tokens * item, "heldout": facts.heldout_tokens * item}
        return (
            all((folder / f"{p}.bin").stat().st_size == size for p, size in sizes.items())
            and _ends(folder)[-1:].sum() == facts.train_tokens
            and Passages(folder).tokens == facts.heldout_tokens
            and len(Division.load(folder).whole) == facts.documents
            and tokenizer_hash(folder / "tokenizer") == facts.tokenizer_hash
        )
    except (OSError, EOFError, ValueError, TypeError, IndexError):
        return False


def _open(folder: Path) -> Corpus:
    facts = CorpusFacts(**json.loads((folder / "corpus.json").read_text("utf-8")))

    def stream(part: Part, count: int) -> TokenStream:
        if not count:  # an empty file cannot be mapped
            return np.zeros(0, facts.dtype)
        return np.memmap(folder / f"{part}.bin", dtype=facts.dtype, mode="r")

    train = stream("train", facts.train_tokens)
    heldout = stream("heldout", facts.heldout_tokens)
    ends, passages, division = _ends(folder), Passages(folder), Division.load(folder)
    return Corpus(facts, train, ends, heldout, folder / "tokenizer", passages, division)


def _ends(folder: Path) -> Ends:
    path = folder / "train.ends"
    if not path.stat().st_size:
        return np.zeros(0, np.int64)
    return np.memmap(path, dtype=np.int64, mode="r")

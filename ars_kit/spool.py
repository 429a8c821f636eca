"""Documents on disk on their way to tokens: deduplicated, and divided for training and judging."""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from ars_kit.errors import DataError
from ars_kit.spec import DataSource

FEW_DOCUMENTS = 20
"""Below this many documents a split by document is a lottery, and each is cut by span."""
SHORT = 2048
"""Bytes below which a document is not cut by span where most of the text is in longer ones."""
SPAN_GAP = 0.01
"""Share of a document between its training span and its held-out span that is used for neither."""
DIVISION = "division.npy"
PIECE = 64 << 10
"""Bytes of a document that are decoded and tokenized at once."""

Split = Literal["documents", "spans"]
Part = Literal["train", "heldout"]
PARTS: tuple[Part, Part] = ("train", "heldout")
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Division:
    """How a text is divided: which of its documents go to one side whole, and which are cut.

    Attributes:
        marks: of the documents' content, rising, shape (n_documents,); there is one at least.
        whole: whether each goes whole, likewise.
    """

    marks: npt.NDArray[np.uint64]
    whole: npt.NDArray[np.bool_]

    @classmethod
    def load(cls, folder: Path) -> Division:
        """Read what :meth:`save` wrote."""
        kept = np.load(folder / DIVISION)
        return cls(kept["mark"], kept["whole"])

    def save(self, folder: Path) -> None:
        """Write it."""
        kept = np.empty(len(self.marks), dtype=[("mark", np.uint64), ("whole", np.bool_)])
        kept["mark"], kept["whole"] = self.marks, self.whole
        np.save(folder / DIVISION, kept)

    def over(
        self, marks: npt.NDArray[np.uint64], whole: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Return ``whole`` for documents of these marks, as it is here where they are here too."""
        at = np.searchsorted(self.marks, marks).clip(max=len(self.marks) - 1)
        return np.where(self.marks[at] == marks, self.whole[at], whole)


class Spool:
    """The deduplicated documents, on disk in order, and how they are divided.

    Args:
        path: the file to spool to; the caller removes it.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("w+b")
        self._beside = path.with_name(f"{path.name}.origins")
        self._origins: IO[str] = self._beside.open("w+", encoding="utf-8")
        self.lengths = array("q")
        self.marks = array("Q")  # the first 8 bytes of each digest: decides the side
        self.duplicates = 0
        self.split: Split = "documents"
        self.data_hash = ""
        self._fraction = 0.0
        self.division = Division(np.zeros(0, np.uint64), np.zeros(0, np.bool_))
        self._whole = b""  # of each document in order: whether it goes to one side whole
        self._seen: set[bytes] = set()

    def fill(self, source: DataSource, tell: Progress) -> None:
        """Write every document once, without those that are blank.

        Lone surrogates, which JSON can spell and UTF-8 cannot, become question marks.
        """
        whole = hashlib.sha256()
        begin = 0
        digest = hashlib.blake2b(digest_size=16)
        blank, origin = True, ""
        for n, document in enumerate(source.documents()):
            if not document.continues:
                begin = self._end(begin, digest.digest(), blank, whole, origin)
                digest = hashlib.blake2b(digest_size=16)
                blank, origin = True, document.origin
            raw = document.text.encode("utf-8", "replace")
            digest.update(raw)
            blank = blank and not document.text.strip()
            self._file.write(raw)
            if n % 256 == 0:
                tell("reading documents", n)
        self._end(begin, digest.digest(), blank, whole, origin)
        if not self.lengths:
            raise DataError("the data source holds no text")
        self._seen.clear()
        self.data_hash = whole.hexdigest()

    def _end(
        self, begin: int, digest: bytes, blank: bool, whole: hashlib._Hash, origin: str
    ) -> int:
        """Keep the document that begins at ``begin``, or take it back; returns where it ends."""
        end = self._file.tell()
        if blank or digest in self._seen:
            self.duplicates += not blank
            self._file.seek(begin)
            self._file.truncate()
            return begin
        self._seen.add(digest)
        whole.update(digest)
        self.lengths.append(end - begin)
        self.marks.append(int.from_bytes(digest[:8], "big"))
        self._origins.write(json.dumps(origin) + "\n")
        return end

    def divide(self, fraction: float, others: Sequence[Division] = ()) -> None:
        """Hold out documents by their content's hash, or a span of each where that is unfair.

        Args:
            fraction: of the text that is held out.
            others: divisions of texts by the same fraction: what the first of them that holds a
                document does with it is done here too, so that what is held out there is not
                trained on here.
        """
        self._fraction = fraction
        total = sum(self.lengths)
        pairs = zip(self.lengths, self.marks, strict=True)
        held = sum(length for length, mark in pairs if self._is_held(mark))
        fair = 0.5 * fraction <= held / total <= 2 * fraction
        self.split = "documents" if fair and len(self.lengths) >= FEW_DOCUMENTS else "spans"
        long = sum(length for length in self.lengths if length >= SHORT)
        shortest = SHORT if long >= total / 2 else 0
        marks, lengths = np.asarray(self.marks, np.uint64), np.asarray(self.lengths, np.int64)
        whole = (lengths < shortest) | (self.split == "documents")
        for other in reversed(others):
            whole = other.over(marks, whole)
        order = np.argsort(marks, kind="stable")
        self.division = Division(marks[order], whole[order])
        self._whole = whole.astype(np.uint8).tobytes()

    def _is_held(self, mark: int) -> bool:
        return mark < int(self._fraction * 2**64)

    def ranges(self, part: Part) -> Iterator[tuple[int, int]]:
        """Yield where one side's texts begin and end in the spool, in order."""
        for _, start, stop in self._ranges(part):
            yield start, stop

    def origins(self, part: Part) -> Iterator[str]:
        """Yield where each of one side's texts comes from, in order."""
        self._origins.seek(0)
        lines = enumerate(self._origins)
        for number, _, _ in self._ranges(part):
            yield json.loads(next(line for n, line in lines if n == number))

    def _ranges(self, part: Part) -> Iterator[tuple[int, int, int]]:
        """Yield each text's number among all documents, its begin and its end."""
        start = 0
        documents = zip(self.lengths, self.marks, self._whole, strict=True)
        for number, (length, mark, whole) in enumerate(documents):
            stop = start + length
            if whole:
                if self._is_held(mark) == (part == "heldout"):
                    yield number, start, stop
            else:
                cut = stop - round(length * self._fraction)
                gap = max(4, round(length * SPAN_GAP))  # a character has up to 4 bytes
                if part == "heldout":
                    span = self._whole_character(cut), stop
                else:
                    span = start, self._whole_character(max(start, cut - gap))
                if span[0] < span[1]:
                    yield number, *span
            start = stop

    def _whole_character(self, at: int) -> int:
        """Return the first place from ``at`` on where a character begins."""
        self._file.seek(at)
        following = self._file.read(3)
        return at + next((i for i, b in enumerate(following) if b & 0xC0 != 0x80), len(following))

    def pieces(self, part: Part) -> Iterator[tuple[str, bool]]:
        """Yield one side's text in order in pieces, and whether each is its document's last."""
        for start, stop in self.ranges(part):
            decoder = codecs.getincrementaldecoder("utf-8")()
            rest = ""
            for at in range(start, stop, PIECE):
                last = at + PIECE >= stop
                self._file.seek(at)  # other readers of the file may stand between two pieces
                raw = self._file.read(min(PIECE, stop - at))
                text = rest + decoder.decode(raw, final=last)
                cut = len(text) if last else _line_end(text)
                yield text[:cut], last
                rest = text[cut:]

    def sample(self, limit: int) -> Iterator[str]:
        """Yield the training text, or evenly chosen pieces of it, ``limit`` bytes in all."""
        total = sum(stop - start for start, stop in self.ranges("train"))
        passed = kept = 0
        for text, _ in self.pieces("train"):
            size = len(text.encode())
            if kept * total <= passed * limit:
                yield text
                kept += size
            passed += size

    def close(self) -> None:
        """Let go of the files."""
        self._file.close()
        self._origins.close()
        self._beside.unlink(missing_ok=True)


def _line_end(text: str) -> int:
    """Return where to cut a long text so that its tokens are those of the whole.

    That is after a newline between two characters that are not white space: byte-level
    pre-tokenizers part there anyway. Without one it is any newline, or else the end.
    """
    cut = 0
    at = len(text) - 1
    while (at := text.rfind("\n", 0, at)) > 0:
        if not (text[at - 1].isspace() or text[at + 1].isspace()):
            return at + 1
        cut = cut or at + 1
    return cut or len(text)

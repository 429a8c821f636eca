"""Where held-out documents begin and end in their token stream, and how long their text is.

Quality is compared document by document, so that chance can be told from merit. Few documents are
cut into passages, for the same reason: one long text is one sample, of which nothing can be drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt

from ars_kit.spec import Passage

if TYPE_CHECKING:
    from tokenizers import Encoding

SHORTEST = 1024
"""Bytes of the shortest passage that a document is cut into, except its last."""
MOST = 1000
"""Passages that few documents are cut into at most, or little more."""
INDEX, ORIGINS = "passages.npy", "origins.jsonl"


class PassageWriter:
    """Takes down each passage's document, tokens and bytes while the tokens are written.

    Args:
        size: bytes after which a passage ends inside a document; None: it is the whole document.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self._rows: list[tuple[int, int, int]] = []
        self._document = self._tokens = self._bytes = 0

    @classmethod
    def of(cls, sizes: Sequence[int], few: int) -> PassageWriter:
        """Return the writer for held-out documents of so many bytes each.

        Args:
            sizes: of the documents.
            few: documents below which they are cut.
        """
        return cls(max(SHORTEST, sum(sizes) // MOST) if len(sizes) < few else None)

    def add(self, text: str, encoding: Encoding, *, ends: bool) -> None:
        """Take down a piece of a document.

        Args:
            text: the piece.
            encoding: of it; with offsets where documents are cut.
            ends: whether the document ends with it, and an end-of-text token follows.
        """
        done = spent = 0
        total = len(text.encode())
        if self.size is not None:
            reached = _byte_ends(text, encoding)
            while True:
                cut = int(np.searchsorted(reached, spent + self.size - self._bytes)) + 1
                if cut >= len(reached):
                    break
                self._tokens += cut - done
                self._bytes += int(reached[cut - 1]) - spent
                done, spent = cut, int(reached[cut - 1])
                self._close()
        self._tokens += len(encoding.ids) - done + ends
        self._bytes += total - spent
        if ends:
            self._close()
            self._document += 1

    def _close(self) -> None:
        self._rows.append((self._document, self._tokens, self._bytes))
        self._tokens = self._bytes = 0

    def save(self, folder: Path, origins: Iterable[str]) -> None:
        """Write the index, and where each document comes from."""
        np.save(folder / INDEX, np.array(self._rows, dtype=np.int64).reshape(-1, 3))
        with (folder / ORIGINS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(origin) + "\n" for origin in origins)


def _byte_ends(text: str, encoding: Encoding) -> npt.NDArray[np.int64]:
    """Return how many bytes of the text each token and those before it cover, shape (n_tokens,)."""
    widths = np.fromiter((len(c.encode()) for c in text), np.int64, len(text))
    after = np.concatenate(([0], np.cumsum(widths)))
    ends = np.fromiter((end for _, end in encoding.offsets), np.int64, len(encoding.ids))
    # A token inside a character reaches, like its neighbours, to the end of it.
    return np.maximum.accumulate(after[ends])


class Passages(Sequence[Passage]):
    """The held-out passages of a prepared corpus, in order; read from disk as they are asked for.

    Args:
        folder: the corpus.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows = np.load(folder / INDEX)
        self._starts = np.concatenate(([0], np.cumsum(self._rows[:, 1])))
        self._origins: list[str] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all passages."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Passage: ...

    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...

    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        document, tokens, size = (int(v) for v in self._rows[index])
        start = int(self._starts[index if index >= 0 else len(self) + index])
        return Passage(document, self._origin(document), start, start + tokens, size)

    def _origin(self, document: int) -> str:
        if self._origins is None:
            lines = (self._folder / ORIGINS).read_text(encoding="utf-8").splitlines()
            self._origins = [json.loads(line) for line in lines]
        return self._origins[document]

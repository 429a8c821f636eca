"""Where text comes from, and the documents and passages that it is made of.

Plugin authors import all of this from :mod:`ars_kit.spec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Document:
    """One text that belongs together: split, deduplicated and evaluated as a unit.

    Attributes:
        text: any Unicode.
        origin: where it comes from, for people.
        continues: this is the next part of the text before it, which is too large to be held in
            memory at once. Parts are joined again with nothing between them.
    """

    text: str
    origin: str = ""
    continues: bool = False


class DataSource(Protocol):
    """Somewhere text comes from."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what identifies the text without reading all of it (paths, sizes, versions).

        JSON-ready. Equal fingerprints must mean equal documents: prepared data is cached under it.

        Raises:
            DataError: the source cannot be reached; said before anything starts.
        """
        ...

    def documents(self) -> Iterator[Document]:
        """Yield the documents in a fixed order, streaming.

        Raises:
            DataError: what cannot be read, named.
        """
        ...


@dataclass(frozen=True, slots=True)
class Passage:
    """A held-out document, or a part of one where there are few documents.

    Passages are what an interval is drawn from. Those of one document follow each other without a
    gap; a text read in parts still is one document.

    Attributes:
        document: counts the held-out documents from 0.
        origin: of the document, as :class:`Document` has it.
        start: where its tokens begin in the stream.
        stop: where they end; the last passage of a document ends with an end-of-text token.
        bytes: of its text in UTF-8.
    """

    document: int
    origin: str
    start: int
    stop: int
    bytes: int

"""The text of a comparison: cut into documents, so that some can be held out."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = 4_000
"""Characters of a document at least: neighbouring paragraphs stay together."""
HELD_OUT = 0.2
"""Half of it chooses, half is reported on."""


@dataclass(frozen=True, slots=True)
class Text:
    """Documents in a file of their own.

    Attributes:
        name: how reports call it.
        path: one JSON line a document.
        digest: of the documents, the beginning of their SHA-256.
        characters: how many there are.
    """

    name: str
    path: Path
    digest: str
    characters: int


def cut(sources: list[Path], work: Path) -> Text:
    """Write the texts of ``sources`` as documents of some paragraphs each.

    Args:
        sources: UTF-8 files, read in the order given.
        work: a folder to write to.
    """
    documents: list[str] = []
    for source in sources:
        piece = ""
        for paragraph in re.split(r"\n\s*\n", source.read_text("utf-8")):
            piece += paragraph + "\n\n"
            if len(piece) >= DOCUMENT:
                documents.append(piece)
                piece = ""
        if piece:
            documents.append(piece)
    lines = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{digest}.jsonl"
    path.write_text(lines, "utf-8")
    name = ", ".join(s.name for s in sources)
    return Text(name, path, digest, sum(map(len, documents)))

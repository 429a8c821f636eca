"""Text files and tables under a path, streamed."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ars_kit.errors import DataError
from ars_kit.spec import Document

PLAIN = (".txt", ".md")
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
CHUNK = 1 << 20
"""A plain file larger than this becomes several documents, cut at a line's end."""


class TextFiles:
    """Every supported file of a folder, in alphabetical order; a table's rows are documents.

    Args:
        path: a file or a folder.
        column: where the text stands in a table.
    """

    def __init__(self, path: str, column: str = "text") -> None:
        self.path = Path(path).expanduser()
        self.column = column

    def files(self) -> list[Path]:
        """Return the files that will be read.

        Raises:
            DataError: nothing is there, or nothing that can be read.
        """
        known = ", ".join([*PLAIN, *TABLES])
        if not self.path.exists():
            raise DataError(f"no such file or folder: {self.path}")
        if self.path.is_file():
            if self.path.suffix.lower() not in (*PLAIN, *TABLES):
                raise DataError(f"{self.path} is of no kind that can be read; there are {known}")
            return [self.path]
        found = [
            p
            for p in sorted(self.path.rglob("*"))
            if p.is_file() and p.suffix.lower() in (*PLAIN, *TABLES)
        ]
        if not found:
            raise DataError(f"folder {self.path} holds no file of {known}")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Return each file's path, size and time of change."""
        stats = [(str(p.resolve()), p.stat()) for p in self.files()]
        return {"files": [(p, s.st_size, s.st_mtime_ns) for p, s in stats], "column": self.column}

    def documents(self) -> Iterator[Document]:
        """Yield the files' texts and the tables' rows."""
        for path in self.files():
            if path.suffix.lower() in PLAIN:
                yield from read_plain(path)
            else:
                yield from self._read_table(path)

    def _read_table(self, path: Path) -> Iterator[Document]:
        import datasets  # noqa: PLC0415 -- slow to import

        kind = TABLES[path.suffix.lower()]
        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
            yield from table_rows(rows, self.column, str(path))
        except DataError:
            raise
        except Exception as error:  # pyarrow, pandas and datasets raise a dozen kinds
            why = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DataError(f"cannot read {path}: {why}") from error


def table_rows(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[Document]:
    """Yield one document a row.

    Raises:
        DataError: the column is not there, or holds no text.
    """
    for number, row in enumerate(rows):
        if column not in row:
            raise DataError(
                f"{where} has no column {column!r}; it has {', '.join(row)}. "
                "Choose with --data files:path=...,column=..."
            )
        value = row[column]
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
        yield Document(value, f"{where}:{number}")


def read_plain(path: Path) -> Iterator[Document]:
    """Yield a file as one document, or a large one as several of about a mebibyte.

    Raises:
        DataError: it is not UTF-8 text, with the byte where that shows.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done, rest = 0, ""
    try:
        with path.open("rb") as file:
            while raw := file.read(CHUNK):
                if b"\0" in raw:
                    at = done + raw.index(b"\0")
                    raise DataError(f"{path} is not text: a zero byte at {at}")
                try:
                    text = rest + decoder.decode(raw).replace("\r\n", "\n")
                except UnicodeDecodeError as error:
                    at = done + error.start
                    raise DataError(
                        f"{path} is not UTF-8: {error.reason} near byte {at}; convert it first"
                    ) from error
                done += len(raw)
                if len(raw) < CHUNK:
                    rest = text
                    continue
                cut = text.rfind("\n") + 1 or len(text)
                yield Document(text[:cut], f"{path}@{done}")
                rest = text[cut:]
        try:
            rest += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: it ends inside a character") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if rest:
        yield Document(rest, str(path))

"""Text files and tables under a path, streamed."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ars_kit.errors import DataError
from ars_kit.spec import Document

PLAIN = (".txt", ".md")
JSON = (".jsonl", ".json")
TABLES = (".csv", ".parquet")
KNOWN = (*PLAIN, *JSON, *TABLES)
CHUNK = 1 << 20
"""Bytes of a plain file that are held at once; a larger one is yielded in parts."""
ROWS = 256
"""Rows of a table that are held at once."""
LONGEST = 2**31 - 1
"""Characters of a field of a .csv; the ``csv`` module takes 131,072 unless told otherwise."""
RUN = ".arskit"
"""What a run's folder has in it. Its model cards and figures are no text to train on; and a run in
the midst of its text would find that text changed with every member."""


class TextFiles:
    """Every supported file of a folder, in alphabetical order; a table's rows are documents.

    Names that begin with a dot are passed over, and so are the folders of runs. Links to folders
    are not followed, as ``datasets.load_dataset`` has it. Any file but Parquet may be gzipped.

    Args:
        path: a file or a folder.
        column: where the text stands in a table.
    """

    def __init__(self, path: str, column: str = "text") -> None:
        self.path = Path(os.path.expanduser(path))  # noqa: PTH111 -- nobody's home is no file
        self.column = column

    def files(self) -> list[Path]:
        """Return the files that will be read.

        Raises:
            DataError: nothing is there, or nothing that can be read.
        """
        known = f"{', '.join(KNOWN)} (.gz too)"
        # os.path has an answer too for what no file can be called.
        if os.path.isfile(self.path):  # noqa: PTH113
            if kind_of(self.path) not in KNOWN:
                raise DataError(f"{self.path} is of no kind that can be read; there are {known}")
            return [self.path]
        if not os.path.isdir(self.path):  # noqa: PTH112
            raise DataError(f"no such file or folder: {self.path}")
        found, links = [], list[Path]()
        for folder, below, names in os.walk(self.path, onerror=_unreadable):
            links += [path for name in below if (path := Path(folder, name)).is_symlink()]
            below[:] = [
                name
                for name in below
                if not name.startswith(".") and not Path(folder, name, RUN).is_dir()
            ]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        found = sorted(p for p in found if kind_of(p) in KNOWN and p.is_file())
        if not found:
            links.sort(key=lambda path: (len(path.parts), path))
            told = f"; {links[0]} is a link, name the folder it leads to" if links else ""
            raise DataError(f"folder {self.path} holds no file of {known}{told}")
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Return each file's path, size and time of change.

        Raises:
            DataError: nothing is there that can be read.
        """
        stats = [(str(p.resolve()), p.stat()) for p in self.files()]
        return {"files": [(p, s.st_size, s.st_mtime_ns) for p, s in stats], "column": self.column}

    def documents(self) -> Iterator[Document]:
        """Yield the files' texts and the tables' rows.

        Raises:
            DataError: a file cannot be read, named with the place where that shows.
        """
        for path in self.files():
            kind = kind_of(path)
            try:
                if kind in PLAIN:
                    yield from read_plain(path)
                elif kind in JSON:
                    yield from _rows(path, self.column, read_json(path))
                elif path.stat().st_size:
                    yield from _rows(path, self.column, read_table(path, self.column))
            except (OSError, EOFError, zlib.error) as error:  # the latter two of a damaged gzip
                why = getattr(error, "strerror", None) or one_line(error)
                raise DataError(f"cannot read {path}: {why}") from error


def kind_of(path: Path) -> str:
    """Return a file's ending in lower case, that of the text inside if it is gzipped."""
    name = path.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    return "" if ending == ".parquet" and name.endswith(".gz") else ending


def table_rows(rows: Iterable[Mapping[str, Any]], column: str, where: str) -> Iterator[Document]:
    """Yield one document a row; rows without text are passed over.

    Raises:
        DataError: the first row has no such column, or one holds something other than text.
    """
    for number, row in enumerate(rows, start=1):
        if number == 1:
            require_column(row, column, where)
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(
                f"{where}, row {number}: column {column!r} holds {type(value).__name__}, not text; "
                "choose another with the setting column=NAME"
            )
        yield Document(value, f"{where}:{number}")


def _rows(path: Path, column: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    """Yield one document a row of a file, whose text has no zero byte, as that of a plain file.

    Raises:
        DataError: as :func:`table_rows`; or a row's text has one, with the row and the place.
    """
    for document in table_rows(rows, column, str(path)):
        if "\0" in document.text:
            row = document.origin.rpartition(":")[2]
            at = len(document.text.partition("\0")[0].encode())
            raise DataError(f"{path}, row {row} is not text: a zero byte at {at}")
        yield document


def require_column(columns: Iterable[str], column: str, where: str) -> None:
    """Refuse a table without the column, naming those it has."""
    names = list(columns)
    if column not in names:
        raise DataError(
            f"{where} has no column {column!r}; it has {', '.join(map(str, names)) or 'none'}. "
            "Choose one with the setting column=NAME"
        )


def read_table(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a .csv or .parquet file, reduced to one column.

    Raises:
        DataError: it is not such a file, or lacks the column.
    """
    try:
        yield from (_csv if kind_of(path) == ".csv" else _parquet)(path, column)
    except (DataError, OSError):
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}; convert it") from error
    except Exception as error:  # pyarrow and datasets raise a dozen kinds
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def _csv(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a .csv file.

    Not through ``datasets``: where a text holds a comma and is not quoted, pandas reads the wrong
    column (in the first row) or cuts the text (in a later one), and says nothing.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    ended = False

    def lines(file: Iterable[str]) -> Iterator[str]:
        nonlocal ended
        yield from file
        ended = True

    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig") as file:
        rows = csv.reader(lines(file))
        header = next(rows, [])
        require_column(header, column, str(path))
        at = header.index(column)
        for row in rows:
            if ended:  # the reader wanted more of a row than there was
                raise DataError(f"{path}, line {rows.line_num}: EOF inside string")
            if any(row[len(header) :]):
                raise DataError(
                    f"{path}, line {rows.line_num} has {len(row)} fields, where its first line has "
                    f"{len(header)}; put text that holds a comma in quotes"
                )
            yield {column: row[at] if at < len(row) else None}


def _parquet(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a .parquet file, through ``datasets``."""
    import datasets  # noqa: PLC0415 -- slow to import
    import pyarrow.parquet as pq  # noqa: PLC0415 -- slow to import

    require_column(pq.read_schema(path).names, column, str(path))
    with quiet_datasets():
        yield from datasets.load_dataset(
            "parquet",
            data_files=glob.escape(str(path)),
            split="train",
            streaming=True,
            columns=[column],
            batch_size=ROWS,
        )


def read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a JSON Lines file, or of a file that is one JSON list or object.

    Not through ``datasets``: it guesses each column's type from the first rows, so that it fails
    where another column's type changes later and turns a text such as "2020-01-01" into a date. A
    JSON list is held in memory whole; lines are not.

    Raises:
        DataError: it is not JSON, with the line.
    """
    with _opened(path) as file:
        blank, first = 0, file.readline().removeprefix(codecs.BOM_UTF8)
        while first and not first.strip():
            blank, first = blank + 1, file.readline()
        lines: Iterable[bytes] = itertools.chain([first], file)
        if kind_of(path) == ".json" and not _is_json(first):
            lines = [first + file.read()]
        for number, line in enumerate(lines, start=1 + blank):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8: {error.reason}; convert it") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {one_line(error)}") from error
            for row in value if isinstance(value, list) else [value]:
                if isinstance(row, str):
                    yield {"text": row}
                elif isinstance(row, dict):
                    yield row
                else:
                    raise DataError(f"{where} holds {type(row).__name__}, not an object with text")


def read_plain(path: Path) -> Iterator[Document]:
    """Yield a file as one document, in parts if it is large, with every line's end a newline.

    Raises:
        DataError: it is not UTF-8 text, with the byte where that shows.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done = 0
    with _opened(path) as file:
        while raw := file.read(CHUNK):
            if not done and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
            if b"\0" in raw:
                raise DataError(f"{path} is not text: a zero byte at {done + raw.index(0)}")
            held = len(decoder.getstate()[0])
            try:
                text = newlines.decode(decoder.decode(raw))
            except UnicodeDecodeError as error:
                at = done - held + error.start
                raise DataError(
                    f"{path} is not UTF-8: {error.reason} at byte {at}; convert it"
                ) from error
            yield Document(text, str(path), continues=done > 0)
            done += len(raw)
    try:
        text = newlines.decode(decoder.decode(b"", final=True), final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: it ends inside a character") from error
    if text:
        yield Document(text, str(path), continues=done > 0)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep ``datasets`` from logging what it is about to raise."""
    from datasets.utils import logging  # noqa: PLC0415 -- slow to import

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _opened(path: Path) -> BinaryIO:
    packed = path.suffix.lower() == ".gz"
    return cast("BinaryIO", gzip.open(path, "rb")) if packed else path.open("rb")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

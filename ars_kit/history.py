"""A history: rows of JSON, one a line and each with its ``step``, appended to as training goes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ars_kit.durable import disk_errors, make_directory, write_atomically
from ars_kit.errors import IntegrityError


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows; nothing makes them durable yet.

    Args:
        path: of the history, which need not be there.
        rows: JSON-ready, each with its ``step``, in order.

    Raises:
        ArsKitError: the volume is full or refuses to be written.
    """
    with disk_errors(path):
        make_directory(path.parent)
        with path.open("a", encoding="utf-8") as file:
            file.write(_lines(rows))


def cut_rows(path: Path, step: int, *, scratch: Path) -> None:
    """Drop the rows of ``step`` and later, a torn last line included; no history has none.

    Args:
        path: of the history.
        step: first that goes.
        scratch: a folder on the same volume, for what is half written.

    Raises:
        IntegrityError: a line is not what was written.
    """
    if path.exists():
        kept = [row for row in read_history(path) if row["step"] < step]
        write_atomically(path, _lines(kept), scratch=scratch)


def last_row(path: Path) -> tuple[int, dict[str, Any]]:
    """Return how many rows a history has, and the last of them; reads no other row.

    A last line torn by a kill is left out.

    Raises:
        IntegrityError: the last row is not what was written.
    """
    count, last = 0, b""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, last = count + 1, line
    if not count:
        return 0, {}
    try:
        row: dict[str, Any] = json.loads(last)
        int(row["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}, line {count} is damaged: {error}") from error
    return count, row


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return a history's rows; a last line torn by a kill is left out.

    Raises:
        IntegrityError: another line is not what was written.
    """
    rows = []
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(f"{path}, line {number} is damaged: {error}") from error
            rows.append(row)
    return rows


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)

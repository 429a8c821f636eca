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
    """Return how many rows a history has, and the last of them.

    Every line is looked at, but few are parsed: a line that differs from one that was parsed in its
    digits alone is a row as that one is. A last line torn by a kill is left out.

    Raises:
        IntegrityError: a line is not what was written.
    """
    count, last = 0, b""
    known: set[bytes] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            form = line.translate(None, _NUMBER)
            if form not in known:
                _row(path, number, line)
                if len(known) < _FORMS:
                    known.add(form)
            count, last = number, line
    return (count, _row(path, count, last)) if count else (0, {})


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return a history's rows; a last line torn by a kill is left out.

    Raises:
        IntegrityError: another line is not what was written.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            rows.append(_row(path, number, line))
    return rows


_NUMBER = b"0123456789.+-eE"
"""What numbers are made of, and what rows that say the same of two steps differ in."""
_FORMS = 1000
"""Forms of a row that are remembered: there are a few, and memory must not grow with a history."""


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return a line's row.

    Raises:
        IntegrityError: it is none.
    """
    try:
        row: dict[str, Any] = json.loads(line.decode())
        int(row["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path}, line {number} is damaged ({error}): put a copy back, or remove that line, "
            "and no more than what it says of its step is lost"
        ) from error
    return row


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)

"""How a benchmark ends whose flags ask for what cannot be: in one line, with exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ars_kit.errors import ArsKitError, ConfigError


def run(main: Callable[[], object]) -> None:
    """Run a benchmark; what the package refuses is said in one line.

    Raises:
        SystemExit: with code 2, where it refuses something.
    """
    try:
        main()
    except ArsKitError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def chosen(what: str, given: str, known: Iterable[str]) -> list[str]:
    """Return the names that a flag gives with commas between.

    Raises:
        ConfigError: one is unknown.
    """
    names, there = given.split(","), list(known)
    for name in names:
        if name not in there:
            raise ConfigError(f"no {what} {name!r}; there are {', '.join(there)}")
    return names


def numbers(text: str) -> list[int]:
    """Return the whole numbers that a flag gives with commas between, for argparse's ``type``.

    Raises:
        ArgumentTypeError: it gives something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None

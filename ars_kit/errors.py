"""Every error that ars-kit raises on purpose, each with the exit code the command line ends with.

Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class ArsKitError(Exception):
    """One clear line: what is wrong and how to mend it. Exit code 1."""

    exit_code: ClassVar[int] = 1


class ConfigError(ArsKitError):
    """A setting is unknown, malformed, or contradicts another. Exit code 3."""

    exit_code: ClassVar[int] = 3


class DataError(ArsKitError):
    """Text cannot be reached, read, or is too little to train on. Exit code 3."""

    exit_code: ClassVar[int] = 3


class PluginError(ArsKitError):
    """A plugin is missing, broken, or broke its promise. Exit code 4."""

    exit_code: ClassVar[int] = 4


class IntegrityError(ArsKitError):
    """Bytes on disk are not the bytes that were committed. Exit code 5."""

    exit_code: ClassVar[int] = 5


class DivergedError(ArsKitError):
    """Training was not finite, or unstable, for too long to go on. Exit code 6."""

    exit_code: ClassVar[int] = 6


class ParityError(ArsKitError):
    """An exported model does not compute what the trained one computes. Exit code 7."""

    exit_code: ClassVar[int] = 7


class Preempted(ArsKitError):  # noqa: N818 -- an orderly stop, not an error in anything
    """Stopped by SIGTERM, state saved; running again goes on. Exit code 75 (EX_TEMPFAIL)."""

    exit_code: ClassVar[int] = 75


class Interrupted(Preempted):
    """Stopped by SIGINT (Ctrl-C) with the state saved; running again goes on. Exit code 130."""

    exit_code: ClassVar[int] = 130

"""One run at a time: a file lock that names its owner and dies with it."""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ars_kit.errors import ConfigError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_BUSY = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})

_FAR = 1 << 30
"""Where Windows locks a byte: far behind the text, for a locked byte cannot be read there."""

_LONGEST = 200
"""Characters of the command line that a refusal quotes."""

_held: set[int] = set()


def _close_in_child() -> None:
    """Let a forked worker that outlives its killed parent not hold the parent's folder."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def exclusive(path: Path, *, what: Path, otherwise: str = "choose another --out") -> Iterator[None]:
    """Hold the lock file ``path``. The system lets go of it when the process ends, however it ends.

    The file stays; its text, the last owner, means nothing unless the lock is held.

    Args:
        path: of the lock file.
        what: is locked by it, for the message.
        otherwise: what to do instead of waiting, for the message.

    Raises:
        ConfigError: another process holds it, named; or the volume cannot lock or write it.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(what, error, otherwise) from error
    _held.add(handle)
    try:
        _take(handle, what, otherwise)
        yield
    finally:
        _let_go(handle)


def is_abandoned(path: Path) -> bool:
    """Whether a lock file was signed by somebody who does not hold it any more.

    One without a signature may be about to be locked. Nothing is written: a disk may be full.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    _held.add(handle)
    try:
        if not os.fstat(handle).st_size:
            return False
        _lock(handle)
    except OSError:
        return False
    finally:
        _let_go(handle)
    return True


def _let_go(handle: int) -> None:
    if handle in _held:  # not so in a forked child, where it is closed already
        _held.remove(handle)
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock a file, or raise the system's error at once."""
    if sys.platform == "win32":
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take(handle: int, what: Path, otherwise: str) -> None:
    """Lock and sign, or say who has."""
    try:
        _lock(handle)
    except OSError as error:
        if error.errno not in _BUSY:
            raise _unusable(what, error, otherwise) from error
        os.lseek(handle, 0, os.SEEK_SET)
        holder = os.read(handle, 4096).decode(errors="replace").strip() or "an unknown process"
        raise ConfigError(
            f"{what} is in use by another run: {holder}. Wait for it, or {otherwise}"
        ) from error
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, _signature().encode(errors="surrogateescape"))
    except OSError as error:
        raise _unusable(what, error, otherwise) from error


def _signature() -> str:
    """Return who this process is, in one line."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    command = shlex.join(sys.argv)
    if len(command) > _LONGEST:
        command = command[:_LONGEST] + "..."
    return f"process {os.getpid()} of {_user()} on {socket.gethostname()} since {since} ({command})"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "an unnamed user"


def _unusable(what: Path, error: OSError, otherwise: str) -> ConfigError:
    return ConfigError(f"cannot lock {what}: {error.strerror}; {otherwise}")

"""Files and directories that are whole after a crash at any moment: the old ones or the new.

The protocol is the usual one of databases and package managers: write beside, sync, rename, sync
the directory (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). Each committed
directory carries a manifest with the size and sha256 of every file in it, written last, so that a
later reader can tell bytes that rotted from bytes that were meant.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ars_kit.errors import ArsKitError

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest and of the lineage."""

TEMPORARY = "tmp-"
"""What the name of everything uncommitted begins with."""

TRIES = 5
"""Times that a small file is written before it is believed that it cannot be."""

SLACK = 5.0
"""Seconds by which the times of processes and of files may be apart."""

HASHERS = 4
"""Files that are hashed at once."""

Files = Callable[[Path], None]
"""Writes a directory's files into the empty directory it is given."""

_TEMPORARY = re.compile(rf"{TEMPORARY}(\d+)-[0-9a-f]{{8}}")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


def commit_directory(
    target: Path, files: Files, header: Mapping[str, Any], *, scratch: Path
) -> None:
    """Make ``target`` appear whole, with a manifest, or not at all.

    Args:
        target: must not exist.
        files: writes the content.
        header: goes into the manifest beside its ``format`` and ``files``.
        scratch: an existing directory on the same volume for what is not committed yet.

    Raises:
        ArsKitError: the volume is full or refuses to be written; nothing was changed.
    """
    with disk_errors(target), temporary(scratch) as temp:
        temp.mkdir()
        files(temp)
        body = {"format": FORMAT, **header, "files": _synced(temp)}
        (temp / MANIFEST).write_text(to_json(body), encoding="utf-8")
        sync(temp / MANIFEST)
        sync(temp)
        make_directory(target.parent)
        temp.rename(target)
        sync(target.parent)


def _synced(folder: Path) -> dict[str, dict[str, Any]]:
    """Make everything in a folder durable; returns what a manifest says of each file.

    A file is hashed beside, while the volume is busy writing it down.
    """
    paths = sorted(folder.rglob("*"))
    readable = folder.stat().st_mode & 0o666  # what the umask leaves; safetensors writes 0600
    files = [path for path in paths if not path.is_dir()]
    with ThreadPoolExecutor(HASHERS) as pool:
        hashes = pool.map(sha256, files)
        for path in paths:
            if not path.is_dir():
                path.chmod(readable)
            sync(path)
        return {
            path.relative_to(folder).as_posix(): {"sha256": found, "size": path.stat().st_size}
            for path, found in zip(files, hashes, strict=True)
        }


def write_atomically(path: Path, text: str, *, scratch: Path) -> None:
    """Replace a small file: a reader, or a crash, finds the old text or the new.

    Raises:
        ArsKitError: the volume is full or refuses to be written; the old text is whole.
    """
    for left in reversed(range(TRIES)):
        with disk_errors(path), temporary(scratch) as temp:
            temp.write_text(text, encoding="utf-8")
            try:
                sync(temp)
                temp.replace(path)
            except FileNotFoundError:  # cleared away by another machine, which took us for dead
                if not left:
                    raise
                continue
            sync(path.parent)
            return


def discard(path: Path, *, scratch: Path) -> None:
    """Remove a file or directory; a crash in between leaves it whole or gone, not half there."""
    if not os.path.lexists(path):
        return
    with disk_errors(path), temporary(scratch) as temp:
        path.rename(temp)
        sync(path.parent)


def make_directory(path: Path) -> None:
    """Make ``path`` and its ancestors so that a power cut does not lose them again."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def clear_temporaries(scratch: Path) -> None:
    """Remove what dead processes left uncommitted, but nothing of one that lives on this machine.

    Of another machine's nobody here can tell: only for who knows that no large directory is being
    committed. A small file that is cleared away is written once more.
    """
    for leftover in scratch.glob(f"{TEMPORARY}*"):
        if not _is_alive(leftover):
            _remove(leftover)


def _is_alive(leftover: Path) -> bool:
    """Whether the process that a temporary is named after is another one, and still at work."""
    import psutil  # noqa: PLC0415 -- only where something was left

    named = _TEMPORARY.fullmatch(leftover.name)
    if named is None or int(named[1]) == os.getpid():
        return False
    try:
        owner, written = psutil.Process(int(named[1])), leftover.lstat().st_mtime
        later = owner.create_time() > written + SLACK  # a number is given out again
        return not later and owner.status() != psutil.STATUS_ZOMBIE
    except (OSError, OverflowError, psutil.Error):
        return False


@contextlib.contextmanager
def temporary(scratch: Path) -> Iterator[Path]:
    """Yield an unused path in ``scratch``; what is there in the end is removed."""
    path = scratch / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a temporary. One that stays (busy on a network volume) is removed by the next run."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def check_directory(path: Path) -> list[str]:
    """Compare a committed directory with its manifest.

    Hidden files (such as a file browser's) are nobody's business here: no library loads them.

    Returns:
        What differs, one line a file: which, what was expected, what was found.
    """
    try:
        manifest = read_manifest(path)
        expected = {n: (str(e["sha256"]), int(e["size"])) for n, e in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is damaged: {error!r}"]
    if manifest.get("format") != FORMAT:
        return [f"{MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}"]
    with ThreadPoolExecutor(HASHERS) as pool:
        looked = pool.map(lambda e: _differs(path, e[0], *e[1]), expected.items())
        problems = [problem for problem in looked if problem]
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()}
    stray = sorted(
        n for n in found - expected.keys() - {MANIFEST} if not Path(n).name.startswith(".")
    )
    return problems + [f"{name} was not committed" for name in stray]


def check_file(folder: Path, name: str) -> str | None:
    """Compare one file of a committed directory with the directory's manifest.

    Args:
        folder: the directory.
        name: of the file in it, such as ``quality/documents.jsonl``.

    Returns:
        What differs, or None.
    """
    try:
        entry = read_manifest(folder)["files"][name]
        return _differs(folder, name, str(entry["sha256"]), int(entry["size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged: {error!r}"


def _differs(folder: Path, name: str, digest: str, size: int) -> str | None:
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    try:
        if (now := file.stat().st_size) != size:
            return f"{name} is not what was committed: {now} bytes, not {size}"
        if (found := sha256(file)) != digest:
            return f"{name} is not what was committed: sha256 is {found}, not {digest}"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a committed directory's manifest.

    Raises:
        OSError: there is none.
        ValueError: it is not, to the byte, a manifest.
    """
    text = (path / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or text != to_json(manifest):
        raise ValueError("it is not as it was written")
    return manifest


def to_json(body: Any) -> str:
    """Return the one text that stands for ``body``: sorted, indented, stable when read back."""
    plain = json.loads(json.dumps(body))  # a number used as a key is text from here on
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def sha256(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_hash(folder: Path) -> str:
    """Return what identifies a directory's bytes: its manifest's sha256, or that of every file.

    Args:
        folder: verified, where it has a manifest.
    """
    if (folder / MANIFEST).is_file():
        return sha256(folder / MANIFEST)
    whole = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        whole.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return whole.hexdigest()


def byte_count(count: float) -> str:
    """Return a number of bytes as a person says it: ``340 kB``, ``1.2 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    if sys.platform == "win32":  # directories cannot be synced there, files only when writable
        if path.is_dir():
            return
        flags = os.O_RDWR | os.O_BINARY
    else:
        flags = os.O_RDONLY
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what a volume can refuse into one line that says what is still whole."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in _FULL:
            raise ArsKitError(
                f"no space left to write {target} ({os.strerror(number)}); what was committed "
                "before is whole. Free some space and run again"
            ) from error
        if number in _REFUSED:
            raise ArsKitError(
                f"cannot write {target} ({error}); what was committed before is whole. "
                "Make the volume writable and run again"
            ) from error
        raise


def _error_number(error: Exception) -> int:
    """Return the system's number of an error, 0 if it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors and tokenizers write from Rust and leave the number in their message only.
    found = re.search(r"\(os error (\d+)\)", str(error))
    from_rust = type(error).__name__ in {"SafetensorError", "Exception"}
    return int(found.group(1)) if found and from_rust else 0

"""What is kept of exports between two starts of a server: themselves, and which ones failed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ars_kit import __version__
from ars_kit.durable import byte_count, discard, make_directory, write_atomically
from ars_kit.errors import ConfigError
from ars_kit.spec import Service
from ars_kit.workbench import clear_abandoned

DAYS = 30
"""An export that no server opened for so long is removed."""

FAILED = ".failed.json"

MAKERS = (
    "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "onnxscript", "torch", "transformers",
)  # fmt: skip
"""Packages that write an export, or run it."""


SHORT = re.compile(
    r"MemoryError|OutOfMemory|out of memory|std::bad_alloc|allocate memory|memory allocation of|"
    r"No space left on device|Disk quota exceeded|os error (?:12|28|122)\b",
    re.IGNORECASE,
)
"""What Python, torch, ONNX Runtime and the system say where memory or a disk is too small."""


class TransientError(ConfigError):
    """An export failed for a reason that may be gone the next time. Exit code 3."""


def is_transient(error: BaseException) -> bool:
    """Whether what made an export fail may be gone the next time: a lack of memory, or of disk."""
    seen: BaseException | None = error
    while seen is not None:
        named = f"{type(seen).__name__}: {seen}"
        if isinstance(seen, TransientError | MemoryError) or SHORT.search(named):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def path_of(service: Service, form: str) -> Path:
    """Return where a service's export of a form is kept.

    Its name holds the checkpoint's digest, and one of the versions of those who write and read it:
    what an older one wrote is not served, and what it failed at is tried again.
    """
    known = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode()).hexdigest()
    return service.cache / f"{service.digest[:32]}-{form}-{known[:16]}"


class Failures:
    """Remembers that an export failed, so that the next start need not try.

    Args:
        target: where the export would be, by :func:`path_of`.
    """

    def __init__(self, target: Path) -> None:
        self.file = target.with_name(target.name + FAILED)

    def raise_known(self) -> None:
        """Say again what was found before.

        Raises:
            ConfigError: it failed, with the versions that are installed now.
        """
        try:
            found: Any = json.loads(self.file.read_text(encoding="utf-8"))
            reason, when = str(found["reason"]), str(found["when"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # never failed, or its note cannot be read: try
        raise ConfigError(f"{reason} (found {when}; to try again, remove {self.file})")

    def remember(self, reason: str) -> None:
        """Write a failure down."""
        found = {"reason": reason, "when": time.strftime("%Y-%m-%d"), "versions": versions()}
        make_directory(self.file.parent)
        write_atomically(self.file, json.dumps(found, indent=1) + "\n", scratch=self.file.parent)


def clear_unused(service: Service, in_use: Path) -> None:
    """Remove exports, and notes of failures, that are older than a month; says what they held.

    So is what a killed process left of an export.

    Args:
        service: whose cache it is.
        in_use: an export that is opened now: its month begins anew.
    """
    try:
        os.utime(in_use)
    except OSError:
        return  # a cache that is only read: whoever writes it clears it
    clear_abandoned(service.cache)
    oldest, count, size = time.time() - DAYS * 86400, 0, 0
    for entry in sorted(service.cache.iterdir()):
        mine = entry.name.endswith(FAILED) or (entry / "manifest.json").is_file()
        with contextlib.suppress(FileNotFoundError):  # another server was quicker
            if not mine or entry.stat().st_mtime >= oldest:
                continue
            held = _bytes_in(entry) if entry.is_dir() else None
            discard(entry, scratch=service.cache)
            if held is not None:
                count += 1
                size += held
    if count:
        many = f"{count} export{'s' * (count > 1)}"
        service.say(
            f"removed {many} ({byte_count(size)}) from {service.cache}, not served for {DAYS} days"
        )


def _bytes_in(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def versions() -> dict[str, str]:
    """Return the versions of all that has a part in an export, ``none`` for what is not there."""
    found = {"ars-kit": __version__}
    for name in MAKERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found

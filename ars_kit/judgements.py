"""What evaluators found, kept in the cache: a file for each judgement, under all it depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ars_kit.durable import make_directory, sha256, write_atomically
from ars_kit.errors import ArsKitError
from ars_kit.spec import Assessment


def judgement_file(home: Path, identity: Mapping[str, Any]) -> Path:
    """Return where in ``home`` the judgement lies that depends on ``identity`` alone."""
    blob = json.dumps(identity, sort_keys=True, default=str).encode()
    return home / f"{hashlib.sha256(blob).hexdigest()[:24]}.json"


def named_files(values: Iterable[Any]) -> dict[str, str]:
    """Return the hash of each file that a setting names, such as a task's."""
    words = [w for v in values for w in (v if isinstance(v, tuple) else (v,))]
    return {w: sha256(Path(w)) for w in words if isinstance(w, str) and Path(w).is_file()}


def read_judgement(file: Path) -> Assessment | None:
    """Return a kept judgement; one that is damaged counts as none."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        found = Assessment(dict(tree["figures"]), dict(tree["files"]), dict(tree["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):  # a cache that is only read
        os.utime(file)  # of several ways to measure a figure, the one asked for last counts
    return found


def keep_judgement(file: Path, identity: Mapping[str, Any], found: Assessment) -> str | None:
    """Write a judgement into the cache; returns why that failed, which loses no figure."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tree = {**dataclasses.asdict(found), "identity": identity, "measured": now}
    text = json.dumps(tree, ensure_ascii=False, indent=1, default=str)
    try:
        make_directory(file.parent)
        write_atomically(file, text, scratch=file.parent)
    except (OSError, ArsKitError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        return f"cannot write {file.parent} ({getattr(cause, 'strerror', None) or cause})"
    return None

"""Models of the Hugging Face hub: which commit of a repository a run is made from.

A repository may change while a run goes on, or before somebody trains the same again. So a run
keeps the commit that it began with, as ``owner/name@commit``, and reads that from then on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAIN = "main"


def place_of(name: str) -> tuple[str, str]:
    """Return where a base is, and at which revision.

    Args:
        name: a directory, or a hub id with or without ``@`` and a branch, tag or commit.

    Returns:
        The directory's path or the hub id, and the revision: the main branch where none is named.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path), MAIN
    repository, _, revision = name.partition("@")
    return (repository, revision) if repository and revision else (name, MAIN)


def pinned(name: str) -> str:
    """Return a base's name with the commit that it stands for now; a directory's as it is.

    What cannot be had is returned as it is too: who reads it says why.
    """
    place, revision = place_of(name)
    if Path(place).exists() or place.startswith((".", "/", "~")):
        return name
    from transformers.utils.hub import (  # noqa: PLC0415 -- slow
        cached_file,
        extract_commit_hash,
    )

    try:
        file: Any = cached_file(place, "config.json", revision=revision)
    except Exception:  # noqa: BLE001 -- the hub raises a dozen kinds
        return name
    commit: str | None = extract_commit_hash(file, None)
    return name if commit is None else f"{place}@{commit}"

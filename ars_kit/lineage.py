"""Who descends from whom, and whether every byte of it is still what was committed.

Each member's manifest holds the sha256 of its parent's manifest, and ``lineage.json`` that of every
member. So one changed byte in any file of any ancestor disagrees with something beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ars_kit.durable import FORMAT, MANIFEST, check_directory, read_manifest, sha256, to_json
from ars_kit.errors import ConfigError, IntegrityError

LINEAGE = "lineage.json"
PRIVATE = ".arskit"
"""Where a run folder keeps what is nobody else's business."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A member's line in the lineage.

    Attributes:
        member: its name, which is its directory's.
        parent: the member it was born from, or None.
        manifest: sha256 of its manifest, in hexadecimal.
    """

    member: str
    parent: str | None
    manifest: str


def lineage_text(entries: Iterable[Entry]) -> str:
    """Return ``lineage.json`` for members in order of birth."""
    return to_json({"format": FORMAT, "members": [asdict(e) for e in entries]})


def read_lineage(out: Path) -> list[Entry]:
    """Return the lineage of a run folder in order of birth; empty where there is none yet.

    Raises:
        IntegrityError: the file is not, to the byte, what :func:`lineage_text` writes.
    """
    path = out / LINEAGE
    try:
        text = path.read_text(encoding="utf-8")
        entries = [
            Entry(
                str(e["member"]), None if e["parent"] is None else str(e["parent"]), e["manifest"]
            )
            for e in json.loads(text)["members"]
        ]
        expected = lineage_text(entries)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if text != expected:
        raise _damaged(path, f"it is not as format {FORMAT} writes it")
    if not all(is_name(e.member) for e in entries):
        raise _damaged(path, "a member's name is not a directory's")
    if len({e.member for e in entries}) < len(entries):
        raise _damaged(path, "a member stands in it twice")
    return entries


def is_name(name: str) -> bool:
    """Whether a member, and so a visible directory of the run folder, can be called ``name``."""
    return bool(name) and Path(name).name == name and not name.startswith(".")


def _damaged(path: Path, how: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged: {how}. Put a copy back, or start anew with --restart"
    )


def standing(out: Path) -> list[str]:
    """Return the directories that say they are members, whether the lineage knows them or not."""
    return sorted(p.parent.name for p in out.glob(f"*/{MANIFEST}") if _claims(p.parent))


def _claims(path: Path) -> bool:
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError):
        return False
    return manifest.get("member") == path.name and "parent_manifest" in manifest


def check_member(path: Path) -> list[str]:
    """Compare a member's directory with its manifest, and that with the lineage beside it.

    Returns:
        What differs, one line a file.

    Raises:
        IntegrityError: the lineage is damaged.
    """
    path = path.resolve()
    problems = check_directory(path)
    recorded = {e.member: e.manifest for e in read_lineage(path.parent)}
    expected = recorded.get(path.name)
    manifest = path / MANIFEST
    if expected is not None and manifest.is_file() and (found := sha256(manifest)) != expected:
        problems.insert(
            0, f"{MANIFEST} is not the one in {LINEAGE}: sha256 is {found}, not {expected}"
        )
    return problems


def verify(out: Path) -> tuple[list[str], list[str]]:
    """Recompute every hash of a run and its lineage's chain.

    Safe while the run goes on: what is committed meanwhile is left to the next time.

    Returns:
        The members looked at, and the problems found, each naming member and file.

    Raises:
        ConfigError: there is no run in ``out``.
    """
    # Looked for before the lineage is read: a member enters its lineage after it appears.
    found = standing(out)
    if not (out / LINEAGE).exists() and not found:
        if (out / PRIVATE).is_dir():
            return [], []  # a run that has no member yet
        raise ConfigError(f"no run in {out}; name its folder with --out")
    try:
        entries = read_lineage(out)
    except IntegrityError as error:
        return [], [str(error)]
    names = [e.member for e in entries]
    problems: list[str] = []
    for entry in entries:
        name = entry.member
        if not (out / name / MANIFEST).is_file():
            problems.append(f"{name}: its directory or {MANIFEST} is missing")
            continue
        problems += [f"{name}: {p}" for p in check_member(out / name)]
        problems += [f"{name}: {p}" for p in _check_parent(out, name, entry.parent)]
    problems += [f"{n}: not in {LINEAGE}" for n in found if n not in names]
    return names, problems


def _check_parent(out: Path, name: str, parent: str | None) -> list[str]:
    """Compare a member's manifest with the parent that the lineage names."""
    try:
        manifest = read_manifest(out / name)
        recorded, chain = manifest["parent"], manifest["parent_manifest"]
    except (OSError, ValueError, KeyError):
        return []  # check_member named it already
    if recorded != parent:
        return [f"{MANIFEST} names parent {recorded!r}, {LINEAGE} names {parent!r}"]
    if parent is None:
        return []
    ancestor = out / parent / MANIFEST
    if not ancestor.is_file():
        return [f"its parent {parent} is missing"]
    found = sha256(ancestor)
    if found == chain:
        return []
    what = f"sha256 of {parent}/{MANIFEST} is {found}, not {chain}"
    return [f"its parent {parent} is not the one it was born from: {what}"]

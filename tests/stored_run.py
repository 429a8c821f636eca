"""What the tests of the store share: members of two files, and a bit that flips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ars_kit.store import RunFolder


def writer(content: str) -> Callable[[Path], None]:
    def files(folder: Path) -> None:
        (folder / "a.txt").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(content * 2)

    return files


def family_of(folder: RunFolder, count: int = 3) -> None:
    parent = None
    for i in range(count):
        folder.commit_member(f"d{i}", writer(f"text {i}"), parent=parent, facts={"seed": i})
        parent = f"d{i}"


def flip(path: Path, at: int, bit: int = 1) -> bytes:
    """Flip a bit; returns what was there."""
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[at] ^= bit
    path.write_bytes(bytes(damaged))
    return original

"""The run folder: members, their lineage, the lock, and what is in training.

Everything is committed as :mod:`ars_kit.durable` describes, so a crash at any moment leaves the old
state or the new one. Each member's manifest holds the sha256 of its parent's manifest, and
``lineage.json`` that of every member, which chains all bytes of a family together.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ars_kit.durable import (
    MANIFEST,
    TEMPORARY,
    Files,
    byte_count,
    check_directory,
    clear_temporaries,
    commit_directory,
    discard,
    make_directory,
    sha256,
    write_atomically,
)
from ars_kit.errors import ArsKitError, ConfigError, IntegrityError
from ars_kit.lineage import (
    LINEAGE,
    PRIVATE,
    Entry,
    check_member,
    is_name,
    lineage_text,
    read_lineage,
    standing,
    verify,
)
from ars_kit.lock import exclusive
from ars_kit.schema import did_you_mean
from ars_kit.states import CURVE, HISTORY, States

BEST = "best.json"
CONTROLS = "controls"
TRACKERS = "trackers"
WRITTEN = ("report.md", "report.html", "control.json", TRACKERS)
"""What a run writes about itself besides."""
LOCK = "lock"

__all__ = ["BEST", "RunFolder", "check_directory", "locate", "verify"]


class RunFolder:
    """A run's output folder: members, training states in the making, the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = path / PRIVATE

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        try:
            make_directory(self.private / "state")
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.path}: {error.strerror}; choose another --out"
            ) from error
        if not os.access(self.private, os.W_OK):
            raise ConfigError(
                f"cannot write to {self.path}; make it writable, or choose another --out"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process, and tidy up after a dead one.

        The system lets go of the lock when the process ends, however it ends.

        Raises:
            ConfigError: another run holds it, named; or the folder cannot be written to.
        """
        self.create()
        with exclusive(self.private / LOCK, what=self.path):
            clear_temporaries(self.private)
            yield

    def require_free(self) -> None:
        """Refuse the folder while another run holds it; nothing is made.

        Raises:
            ConfigError: it does, named.
        """
        if (self.private / LOCK).exists():
            with exclusive(self.private / LOCK, what=self.path):
                pass

    def holds_work(self) -> bool:
        """Whether a member or a training state is here: something that a new plan would lose."""
        states = (self.private / "state").glob("*/step-*")
        return (self.path / LINEAGE).exists() or bool(standing(self.path)) or any(states)

    def preflight(self, needed: int) -> None:
        """Refuse to start what the volume has no room for.

        Args:
            needed: bytes.

        Raises:
            ArsKitError: with both numbers.
        """
        free = free_bytes(self.path)
        if free < needed:
            raise ArsKitError(
                f"{self.path} has {byte_count(free)} free; this run needs about "
                f"{byte_count(needed)}. Free some, or choose another --out"
            )

    # --- members ---

    def members(self) -> list[str]:
        """Return the committed members in order of birth.

        Raises:
            IntegrityError: the lineage is damaged.
        """
        return [e.member for e in self.lineage() if self.holds(e.member)]

    def holds(self, name: str) -> bool:
        """Whether a member of this name is here."""
        return is_name(name) and self._manifest(name).is_file()

    def has(self, name: str) -> bool:
        """Whether ``name`` is committed; if not, it may be trained.

        Raises:
            IntegrityError: it may not. Something else is in its place; or it was committed and
                others were born from it, so that training it again would make another model than
                the one they descend from.
        """
        if self.holds(name):
            return True
        if os.path.lexists(self.path / name):
            raise IntegrityError(
                f"{self.path / name} has no {MANIFEST}, so it is no member; move it away, or "
                "choose another --out"
            )
        heirs = [e.member for e in self.lineage() if e.parent == name]
        if heirs:
            raise IntegrityError(
                f"{name} was committed and {heirs[0]} was born from it, but {self.path / name} is "
                "gone; put it back, or start anew with --restart"
            )
        return False

    def commit_member(
        self, name: str, files: Files, *, parent: str | None, facts: Mapping[str, Any]
    ) -> None:
        """Commit a member: ``files`` writes into the directory it is given.

        A crash between the rename and the new lineage is healed by :meth:`heal_lineage`.

        Args:
            name: of the member and of its directory.
            files: writes the Hugging Face files and whatever else belongs to the member.
            parent: the committed member it was born from, or None.
            facts: go into the manifest as they are; JSON-ready.

        Raises:
            ConfigError: the name is taken or no name for a directory, or the parent is unknown.
            ArsKitError: the volume is full or refuses to be written; nothing was changed.
        """
        if not is_name(name):
            raise ConfigError(f"{name!r} cannot be a member's name")
        if os.path.lexists(self.path / name):
            raise ConfigError(
                f"{self.path / name} already exists; move it away, or choose another --out"
            )
        if parent is not None and not self.holds(parent):
            raise ConfigError(
                f"{name} cannot be born from {parent!r}: no such member in {self.path}"
            )
        self.create()
        chain = None if parent is None else sha256(self._manifest(parent))
        header = {**facts, "member": name, "parent": parent, "parent_manifest": chain}
        commit_directory(self.path / name, files, header, scratch=self.private)
        self._enter(name, parent)

    def heal_lineage(self, name: str, parent: str | None) -> None:
        """Enter a member that was committed just before a crash kept it out of the lineage."""
        if self.has(name) and name not in [e.member for e in self.lineage()]:
            self._enter(name, parent)

    def lineage(self) -> list[Entry]:
        """Return the entries of ``lineage.json`` in order of birth.

        Raises:
            IntegrityError: the file is not, to the byte, one that was written here.
        """
        return read_lineage(self.path)

    def _enter(self, name: str, parent: str | None) -> None:
        entries = {e.member: e for e in self.lineage()}  # a dict keeps the order of birth
        entries[name] = Entry(name, parent, sha256(self._manifest(name)))
        self.write_text(LINEAGE, lineage_text(entries.values()))

    def open_member(self, name: str) -> Path:
        """Return a member's directory once every file in it is what was committed.

        Raises:
            ConfigError: there is no such member.
            IntegrityError: a file differs, named.
        """
        self.require(name)
        problems = check_member(self.path / name)
        if problems:
            raise IntegrityError(f"{self.path / name}: {problems[0]}")
        return self.path / name

    def require(self, name: str) -> None:
        """Refuse a name that no member has.

        Raises:
            ConfigError: it is none's.
        """
        if not self.holds(name):
            names = self.members()
            raise ConfigError(
                f"no member {name!r} in {self.path}{did_you_mean(name, names)}. "
                f"There are: {', '.join(names) or 'none'}"
            )

    def _manifest(self, name: str) -> Path:
        return self.path / name / MANIFEST

    # --- what is in training ---

    def states(self, member: str) -> States:
        """Return what a member leaves here while it trains."""
        return States(self.private, member)

    def history_path(self, member: str) -> Path:
        """Return where a member's history lies while it trains, or after."""
        return self._record_path(member, HISTORY)

    def curve_path(self, member: str) -> Path:
        """Return where a member's held-out curve lies while it trains, or after, if it has one."""
        return self._record_path(member, CURVE)

    def _record_path(self, member: str, name: str) -> Path:
        kept = self.path / member / name
        return kept if kept.exists() else self.states(member).home / name

    # --- the folder itself ---

    def write_text(self, name: str, text: str) -> None:
        """Replace a small file of the run folder atomically.

        Raises:
            ArsKitError: the volume is full or refuses to be written; the old file is whole.
        """
        self.create()
        write_atomically(self.path / name, text, scratch=self.private)

    def start_anew(self) -> None:
        """Remove every member, state and record of this folder; other files stay.

        Youngest first, so that a crash in between leaves a family without its youngest. The
        controls of the run go first of all.

        Raises:
            ConfigError: another run is training a control.
        """
        controls = self.path / CONTROLS
        for control in sorted(controls.glob("*")):
            RunFolder(control).require_free()
        discard(controls, scratch=self.private)
        try:
            names = self.members()
        except IntegrityError:  # what is thrown away may well be damaged
            names = []
        names += [name for name in standing(self.path) if name not in names]
        members = [self.path / name for name in names]
        records = [self.path / n for n in (BEST, *WRITTEN, LINEAGE, "run.toml")]
        clear_temporaries(self.private)
        private = [
            p for p in self.private.iterdir() if p.name != LOCK and not p.name.startswith(TEMPORARY)
        ]
        # The plan goes last: a state that outlived it would be taken for one of the next plan.
        for path in (*reversed(members), *private, *records):
            discard(path, scratch=self.private)
        self.create()


def control_folder(out: Path, name: str) -> Path:
    """Return the run folder of a run's control."""
    return out / CONTROLS / name


def free_bytes(path: Path) -> int:
    """Return the free space of the volume that ``path`` is on, or will be."""
    standing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(standing).free


def locate(name: str, out: Path) -> Path:
    """Return the verified directory of a member, of ``best``, or any model directory.

    Args:
        name: of a member of ``out``, ``best``, or a path.
        out: the run folder.

    Raises:
        ConfigError: there is none of that name.
        IntegrityError: it is damaged.
    """
    path = find(name, out)
    problems = check_member(path) if (path / MANIFEST).is_file() else []
    if problems:
        raise IntegrityError(f"{path}: {problems[0]}")
    return path


def find(name: str, out: Path) -> Path:
    """Return the directory of a member, of ``best``, or any model directory, as it lies there.

    Args:
        name: of a member of ``out``, ``best``, or a path.
        out: the run folder.

    Raises:
        ConfigError: there is none of that name.
        IntegrityError: the record of the best is damaged.
    """
    folder = RunFolder(out)
    if name == "best":
        name = _best(out)
    elif not folder.holds(name) and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"{Path(name)} is not a model directory: it has no config.json")
        return Path(name)
    folder.require(name)
    return folder.path / name


def _best(out: Path) -> str:
    """Return the name of the member recorded as best."""
    path, again = out / BEST, f"arskit select --out {shlex.quote(str(out))}"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["member"])
    except FileNotFoundError:
        raise ConfigError(f"no best member chosen in {out} yet; type: {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error!r}. To write it again: {again}") from error

"""The only room that writes checkpoints: members, their lineage, training states, the lock.

Everything is committed as :mod:`ars_kit.durable` describes, so a crash at any moment leaves the old
state or the new one. Each member's manifest holds the sha256 of its parent's manifest, and
``lineage.json`` that of every member, which chains all bytes of a family together.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ars_kit.durable import (
    MANIFEST,
    Files,
    byte_count,
    check_directory,
    clear_temporaries,
    commit_directory,
    discard,
    disk_errors,
    make_directory,
    read_manifest,
    sha256,
    sync,
    write_atomically,
)
from ars_kit.errors import ArsKitError, ConfigError, IntegrityError
from ars_kit.history import append_rows, cut_rows
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

BEST = "best.json"
HISTORY = "history.jsonl"
CURVE = "heldout.jsonl"
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
            raise ConfigError(f"cannot write to {self.path}; choose another --out")

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
        if not self.holds(name):
            names = self.members()
            raise ConfigError(
                f"no member {name!r} in {self.path}{did_you_mean(name, names)}. "
                f"There are: {', '.join(names) or 'none'}"
            )
        problems = check_member(self.path / name)
        if problems:
            raise IntegrityError(f"{self.path / name}: {problems[0]}")
        return self.path / name

    def _manifest(self, name: str) -> Path:
        return self.path / name / MANIFEST

    # --- training states ---

    def save_state(self, member: str, tree: Any, *, step: int, keep: Collection[int] = ()) -> None:
        """Commit a training state, then remove the older ones.

        The history appended so far is made durable first: a state never outlives its history.

        Args:
            member: whose state it is.
            tree: what :func:`ars_kit.state.pack` takes.
            step: optimizer steps done.
            keep: steps whose newest states stay.

        Raises:
            TypeError: ``tree`` holds what cannot be saved without pickle, named by its path.
            ArsKitError: the volume is full or refuses to be written; the old state is whole.
        """
        from safetensors.torch import save_file  # noqa: PLC0415 -- torch is slow to import

        from ars_kit.state import pack  # noqa: PLC0415

        tensors, skeleton = pack(tree)

        def files(folder: Path) -> None:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(skeleton), encoding="utf-8")

        home = self._state_home(member)
        older = self._states(member)
        name = f"step-{step:08d}"
        # A step saved twice gets a directory of its own: a directory cannot be replaced atomically.
        same = [again for done, again in map(_state_order, older) if done == step]
        if same:
            name += f".{max(same) + 1}"
        with disk_errors(home):
            for record in (home / HISTORY, home / CURVE):
                if record.exists():
                    sync(record)
        commit_directory(home / name, files, {"member": member, "step": step}, scratch=self.private)
        newest = {done: path for path in older if (done := _state_order(path)[0]) in keep}
        newest.pop(step, None)
        for path in older:
            if path not in newest.values():
                discard(path, scratch=self.private)

    def load_state(self, member: str, *, step: int | None = None) -> tuple[int, Any] | None:
        """Return the newest training state and its step, or None.

        Args:
            member: whose.
            step: the newest of those after so many steps.

        Raises:
            IntegrityError: it is damaged; an older one is never taken instead.
        """
        from safetensors.torch import load_file  # noqa: PLC0415 -- torch is slow to import

        from ars_kit.state import unpack  # noqa: PLC0415

        states = self._states(member)
        if step is not None:
            states = [path for path in states if _state_order(path)[0] == step]
        if not states:
            return None
        newest = states[-1]
        problems = check_directory(newest)
        header: dict[str, Any] = {"member": member, "step": _state_order(newest)[0]}
        if not problems and not header.items() <= read_manifest(newest).items():
            problems = [f"{MANIFEST} is not that of {newest.name}"]
        if problems:
            raise IntegrityError(
                f"the training state of {member} is damaged: {problems[0]}. Remove "
                f"{self._state_home(member)} to train {member} again from its birth"
            )
        skeleton = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(newest / "state.safetensors")
        return header["step"], unpack(tensors, skeleton)

    def drop_state(self, member: str) -> None:
        """Remove a member's training states and working history, all at once."""
        discard(self._state_home(member), scratch=self.private)

    def saved_steps(self, member: str) -> list[int]:
        """Return the steps after which there are training states, in order."""
        return sorted({_state_order(path)[0] for path in self._states(member)})

    def return_to(self, member: str, step: int) -> None:
        """Make the state after ``step`` steps the newest: remove the later ones, newest first."""
        for path in reversed(self._states(member)):
            if _state_order(path)[0] > step:
                discard(path, scratch=self.private)

    def _state_home(self, member: str) -> Path:
        if not is_name(member):  # a path here would be somebody else's directory
            raise ValueError(f"{member!r} is no member's name")
        return self.private / "state" / member

    def _states(self, member: str) -> list[Path]:
        """Return a member's committed training states, oldest first."""
        return sorted(self._state_home(member).glob("step-*"), key=_state_order)

    def history_path(self, member: str) -> Path:
        """Return where a member's history lies while it trains, or after."""
        return self._record_path(member, HISTORY)

    def curve_path(self, member: str) -> Path:
        """Return where a member's held-out curve lies while it trains, or after, if it has one."""
        return self._record_path(member, CURVE)

    def _record_path(self, member: str, name: str) -> Path:
        kept = self.path / member / name
        return kept if kept.exists() else self._state_home(member) / name

    def append_history(
        self, member: str, rows: list[dict[str, Any]], *, name: str = HISTORY
    ) -> None:
        """Append rows to a training member's history; the next training state makes them durable.

        Args:
            member: whose history it is.
            rows: JSON-ready, each with its ``step``, in order.
            name: of the record, history or held-out curve.

        Raises:
            ArsKitError: the volume is full or refuses to be written.
        """
        append_rows(self._state_home(member) / name, rows)

    def cut_history(self, member: str, step: int, *, name: str = HISTORY) -> None:
        """Drop what a killed run wrote of ``step`` and later, a torn last line included.

        Raises:
            IntegrityError: a line is not what was written.
        """
        cut_rows(self._state_home(member) / name, step, scratch=self.private)

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
        private = [p for p in self.private.iterdir() if p.name != LOCK]
        for path in (*reversed(members), *records, *private):
            discard(path, scratch=self.private)
        self.create()


def control_folder(out: Path, name: str) -> Path:
    """Return the run folder of a run's control."""
    return out / CONTROLS / name


def free_bytes(path: Path) -> int:
    """Return the free space of the volume that ``path`` is on, or will be."""
    standing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(standing).free


def _state_order(path: Path) -> tuple[int, int]:
    """Return the step of a training state, and how many times that step was saved before."""
    step, _, again = path.name.removeprefix("step-").partition(".")
    return int(step), int(again or 0)


def locate(name: str, out: Path) -> Path:
    """Return the verified directory of a member, of ``best``, or any model directory.

    Args:
        name: of a member of ``out``, ``best``, or a path.
        out: the run folder.

    Raises:
        ConfigError: there is none of that name.
        IntegrityError: it is damaged.
    """
    folder = RunFolder(out)
    if name == "best":
        name = _best(out)
    elif not folder.holds(name) and Path(name).is_dir():
        path = Path(name)
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is not a model directory: it has no config.json")
        problems = check_member(path) if (path / MANIFEST).is_file() else []
        if problems:
            raise IntegrityError(f"{path}: {problems[0]}")
        return path
    return folder.open_member(name)


def _best(out: Path) -> str:
    """Return the name of the member recorded as best."""
    path = out / BEST
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["member"])
    except FileNotFoundError:
        raise ConfigError(
            f"no best member chosen in {out} yet; type: arskit select --out {out}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error!r}. To write it again: arskit select --out {out}"
        ) from error

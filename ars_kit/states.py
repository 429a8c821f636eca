"""What a member leaves in its run folder while it trains: its states, and the records beside them.

A state is committed whole or not at all (:mod:`ars_kit.durable`), and never outlives its history.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ars_kit.durable import (
    MANIFEST,
    TEMPORARY,
    check_directory,
    commit_directory,
    discard,
    disk_errors,
    read_manifest,
    sync,
)
from ars_kit.errors import IntegrityError
from ars_kit.history import append_rows, cut_rows
from ars_kit.lineage import is_name

HISTORY = "history.jsonl"
CURVE = "heldout.jsonl"


class States:
    """The training states of one member, and its history and held-out curve until it is committed.

    Args:
        private: the run folder's private part.
        member: whose they are.

    Raises:
        ValueError: that is no member's name.

    Attributes:
        home: the folder that they are in.
    """

    def __init__(self, private: Path, member: str) -> None:
        if not is_name(member):  # a path here would be somebody else's directory
            raise ValueError(f"{member!r} is no member's name")
        self.member, self._scratch = member, private
        self.home = private / "state" / member

    def save(
        self, tree: Any, *, step: int, keep: Collection[int] = (), parts: Path | None = None
    ) -> None:
        """Commit a training state, then remove the older ones.

        The history appended so far is made durable first: a state never outlives its history.

        Args:
            tree: what :func:`ars_kit.state.pack` takes.
            step: optimizer steps done.
            keep: steps whose newest states stay.
            parts: a folder into which several processes have written the tensors already.

        Raises:
            TypeError: ``tree`` holds what cannot be saved without pickle, named by its path.
            ArsKitError: the volume is full or refuses to be written; the old state is whole.
        """
        from safetensors.torch import save_file  # noqa: PLC0415 -- torch is slow to import

        from ars_kit.state import pack  # noqa: PLC0415

        tensors, skeleton = pack(tree)

        def files(folder: Path) -> None:
            if parts is None:
                save_file(tensors, folder / "state.safetensors")
            else:
                for part in sorted(parts.iterdir()):
                    part.rename(folder / part.name)
            (folder / "state.json").write_text(json.dumps(skeleton), encoding="utf-8")

        older = self._paths()
        name = f"step-{step:08d}"
        # A step saved twice gets a directory of its own: a directory cannot be replaced atomically.
        same = [again for done, again in map(_state_order, older) if done == step]
        if same:
            name += f".{max(same) + 1}"
        with disk_errors(self.home):
            for record in (self.home / HISTORY, self.home / CURVE):
                if record.exists():
                    sync(record)
        header = {"member": self.member, "step": step}
        commit_directory(self.home / name, files, header, scratch=self._scratch)
        self.prune(keep)

    def prune(self, keep: Collection[int] = ()) -> None:
        """Remove all states but the newest, and the newest after each of some steps.

        A save does so last. A run that goes on does it once more: the one before may have been
        killed between the two, and may have nothing left to save.

        Args:
            keep: steps whose newest states stay.
        """
        paths = self._paths()
        newest = {done: path for path in paths if (done := _state_order(path)[0]) in keep}
        for path in paths[:-1]:
            if path not in newest.values():
                discard(path, scratch=self._scratch)

    @contextmanager
    def shared(self, step: int, *, main: bool, wait: Callable[[], object]) -> Iterator[Path]:
        """Yield a folder for the parts of a state that is not committed yet, gone in the end.

        Args:
            step: optimizer steps done.
            main: whether this process makes and removes it, for all of them.
            wait: returns when every process has called it.
        """
        path = self._scratch / f"{TEMPORARY}{self.member}-{step:08d}"
        try:
            with disk_errors(self.home):
                if main:
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir()
                wait()
                yield path
        finally:
            if main:
                shutil.rmtree(path, ignore_errors=True)

    def load(
        self, *, step: int | None = None, allot: Callable[[Any], Any] | None = None
    ) -> tuple[int, Any] | None:
        """Return the newest training state and its step, or None.

        Args:
            step: the newest of those after so many steps.
            allot: returns a whole state, its tensors possibly meta ones, with this process's parts
                in their place; every process must then load. Without it each gets the whole.

        Raises:
            IntegrityError: it is damaged; an older one is never taken instead.
        """
        from safetensors.torch import load_file  # noqa: PLC0415 -- torch is slow to import

        from ars_kit import sharding  # noqa: PLC0415
        from ars_kit.state import pack, unpack  # noqa: PLC0415

        states = self._paths()
        if step is not None:
            states = [path for path in states if _state_order(path)[0] == step]
        if not states:
            return None
        newest = states[-1]
        problems = check_directory(newest)
        header: dict[str, Any] = {"member": self.member, "step": _state_order(newest)[0]}
        if not problems and not header.items() <= read_manifest(newest).items():
            problems = [f"{MANIFEST} is not that of {newest.name}"]
        if problems:
            raise IntegrityError(
                f"the training state of {self.member} is damaged: {problems[0]}. Remove "
                f"{self.home} to train {self.member} again from its birth"
            )
        skeleton = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        place = allot or _whole
        if sharding.in_parts(newest):
            tree = sharding.allotted(place(unpack(sharding.parts_like(newest), skeleton)))
            sharding.read_parts(pack(tree)[0], newest, together=allot is not None)
            return header["step"], tree
        tensors = load_file(newest / "state.safetensors")
        return header["step"], place(unpack(tensors, skeleton))

    def drop(self) -> None:
        """Remove states and working records, all at once."""
        discard(self.home, scratch=self._scratch)

    def steps(self) -> list[int]:
        """Return the steps after which there are training states, in order."""
        return sorted({_state_order(path)[0] for path in self._paths()})

    def return_to(self, step: int) -> None:
        """Make the state after ``step`` steps the newest: remove the later ones, newest first."""
        for path in reversed(self._paths()):
            if _state_order(path)[0] > step:
                discard(path, scratch=self._scratch)

    def _paths(self) -> list[Path]:
        """Return the committed states, oldest first."""
        return sorted(self.home.glob("step-*"), key=_state_order)

    def append(self, rows: list[dict[str, Any]], *, name: str = HISTORY) -> None:
        """Append rows to a record; the next training state makes them durable.

        Args:
            rows: JSON-ready, each with its ``step``, in order.
            name: of the record, history or held-out curve.

        Raises:
            ArsKitError: the volume is full or refuses to be written.
        """
        append_rows(self.home / name, rows)

    def cut(self, step: int, *, name: str = HISTORY) -> None:
        """Drop what a killed run wrote of ``step`` and later, a torn last line included.

        Raises:
            IntegrityError: a line is not what was written.
        """
        cut_rows(self.home / name, step, scratch=self._scratch)


def _whole(tree: Any) -> Any:
    return tree


def _state_order(path: Path) -> tuple[int, int]:
    """Return the step of a training state, and how many times that step was saved before."""
    step, _, again = path.name.removeprefix("step-").partition(".")
    return int(step), int(again or 0)

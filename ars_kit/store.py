"""The only room that writes checkpoints.

A commit writes into a temporary directory on the same volume, syncs every file, writes a manifest
of sizes and sha256 hashes, syncs, renames the whole into place and syncs the parent. So a crash at
any moment leaves the old state or the new one, never something between. Each manifest holds its
parent's manifest hash, which chains the lineage.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ars_kit.errors import ArsKitError, ConfigError, IntegrityError
from ars_kit.schema import did_you_mean

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
BEST = "best.json"
FORMAT = 1

Files = Callable[[Path], None]


class RunFolder:
    """A run's output folder: members, training states in the making, the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = path / ".arskit"

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        try:
            (self.private / "state").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.path}: {error.strerror}; choose another --out"
            ) from error
        if not os.access(self.private, os.W_OK):
            raise ConfigError(f"cannot write to {self.path}; choose another --out")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it when the process ends.

        Raises:
            ConfigError: another run holds it, named.
        """
        self.create()
        with (self.private / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise ConfigError(
                    f"{self.path} is in use by another run: {file.read().strip() or 'unknown'}"
                ) from error
            file.seek(0)
            file.truncate()
            since = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(
                f"process {os.getpid()} of {_user()} on {socket.gethostname()} since {since}"
            )
            file.flush()
            for leftover in self.private.glob("tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def preflight(self, needed: int) -> None:
        """Refuse to start what the volume has no room for.

        Raises:
            ArsKitError: with both numbers.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ArsKitError(
                f"{self.path} has {free / 1e9:.1f} GB free; this run needs about "
                f"{needed / 1e9:.1f} GB. Free some, or choose another --out"
            )

    # --- members ---

    def members(self) -> list[str]:
        """Return the committed members in order of birth."""
        order = [entry["member"] for entry in self.lineage()]
        return [name for name in order if (self.path / name / MANIFEST).is_file()]

    def has(self, name: str) -> bool:
        """Whether ``name`` was committed."""
        return (self.path / name / MANIFEST).is_file()

    def lineage(self) -> list[dict[str, Any]]:
        """Return the entries of ``lineage.json``: member, parent, manifest hash.

        Raises:
            IntegrityError: the file is damaged.
        """
        path = self.path / LINEAGE
        if not path.exists():
            return []
        try:
            return list(json.loads(path.read_text())["members"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is damaged: {error}") from error

    def commit_member(
        self, name: str, files: Files, *, parent: str | None, facts: Mapping[str, Any]
    ) -> None:
        """Commit a member: ``files`` writes into the directory it is given.

        A crash between the rename and the new lineage is healed by committing again.
        """
        chain = None if parent is None else sha256(self.path / parent / MANIFEST)
        header = {"member": name, "parent": parent, "parent_manifest": chain, **facts}
        self._commit(self.path / name, files, header)
        self._enter(name, parent)

    def heal_lineage(self, name: str, parent: str | None) -> None:
        """Enter a member that was committed just before a crash kept it out of the lineage."""
        if self.has(name) and name not in [e["member"] for e in self.lineage()]:
            self._enter(name, parent)

    def _enter(self, name: str, parent: str | None) -> None:
        entries = [e for e in self.lineage() if e["member"] != name]
        manifest = sha256(self.path / name / MANIFEST)
        entries.append({"member": name, "parent": parent, "manifest": manifest})
        body = {"format": FORMAT, "members": entries}
        self.write_text(LINEAGE, json.dumps(body, indent=2) + "\n")

    def open_member(self, name: str) -> Path:
        """Return a member's directory once every file in it is what was committed.

        Raises:
            ConfigError: there is no such member.
            IntegrityError: a file differs, named.
        """
        path = self.path / name
        if not (path / MANIFEST).is_file():
            names = self.members()
            raise ConfigError(
                f"no member {name!r} in {self.path}{did_you_mean(name, names)}. "
                f"There are: {', '.join(names) or 'none'}"
            )
        problems = check_directory(path)
        if problems:
            raise IntegrityError(f"{name}: {problems[0]}")
        return path

    # --- training states ---

    def save_state(self, member: str, tree: Any, *, step: int) -> None:
        """Commit a training state and remove the older ones."""
        from safetensors.torch import save_file  # noqa: PLC0415 -- torch is slow to import

        from ars_kit.state import pack  # noqa: PLC0415

        tensors, skeleton = pack(tree)

        def files(folder: Path) -> None:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(skeleton))

        home = self._state_home(member)
        home.mkdir(parents=True, exist_ok=True)
        self._commit(home / f"step-{step:08d}", files, {"member": member, "step": step})
        for older in sorted(home.glob("step-*"))[:-1]:
            shutil.rmtree(older, ignore_errors=True)

    def load_state(self, member: str) -> tuple[int, Any] | None:
        """Return the newest training state and its step, or None.

        Raises:
            IntegrityError: it is damaged.
        """
        from safetensors.torch import load_file  # noqa: PLC0415 -- torch is slow to import

        from ars_kit.state import unpack  # noqa: PLC0415

        found = sorted(self._state_home(member).glob("step-*"))
        if not found:
            return None
        problems = check_directory(found[-1])
        if problems:
            raise IntegrityError(
                f"the training state of {member} is damaged: {problems[0]}. Remove "
                f"{self._state_home(member)} to train {member} again from its birth"
            )
        skeleton = json.loads((found[-1] / "state.json").read_text())
        tensors = load_file(found[-1] / "state.safetensors")
        return int(found[-1].name.partition("-")[2]), unpack(tensors, skeleton)

    def drop_state(self, member: str) -> None:
        """Remove a member's training states and working history."""
        shutil.rmtree(self._state_home(member), ignore_errors=True)

    def _state_home(self, member: str) -> Path:
        if Path(member).name != member:  # a path here would be somebody else's directory
            raise ValueError(f"{member!r} is no member's name")
        return self.private / "state" / member

    def history_path(self, member: str) -> Path:
        """Return where a member's history lies while it trains, or after."""
        kept = self.path / member / "history.jsonl"
        return kept if kept.exists() else self._state_home(member) / "history.jsonl"

    def append_history(self, member: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a training member's history and sync it."""
        path = self._state_home(member) / "history.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _disk(path), path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def cut_history(self, member: str, step: int) -> None:
        """Drop what a killed run wrote of ``step`` and later, a torn last line included."""
        path = self._state_home(member) / "history.jsonl"
        if path.exists():
            kept = [row for row in read_history(path) if row["step"] < step]
            _write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))

    # --- small files ---

    def write_text(self, name: str, text: str) -> None:
        """Replace a small file of the run folder atomically."""
        _write_atomically(self.path / name, text)

    def start_anew(self) -> None:
        """Remove every member, state and record of this folder; other files stay."""
        for name in self.members():
            shutil.rmtree(self.path / name)
        for name in (LINEAGE, BEST, "run.toml", "report.md"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.private / "state", ignore_errors=True)
        self.create()

    def _commit(self, target: Path, files: Files, header: Mapping[str, Any]) -> None:
        with _disk(target):
            temp = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.private))
            temp.chmod(0o755)
            try:
                files(temp)
                entries = {}
                for file in sorted(p for p in temp.rglob("*") if p.is_file()):
                    sync(file)
                    entries[file.relative_to(temp).as_posix()] = {
                        "sha256": sha256(file),
                        "size": file.stat().st_size,
                    }
                body = {"format": FORMAT, **header, "files": entries}
                (temp / MANIFEST).write_text(json.dumps(body, indent=2) + "\n")
                sync(temp / MANIFEST)
                sync(temp)
                if target.exists():
                    # Only a directory without a manifest, or a state saved twice, is ever here.
                    shutil.rmtree(target)
                temp.rename(target)
                sync(target.parent)
            finally:
                shutil.rmtree(temp, ignore_errors=True)


def locate(name: str, out: Path) -> Path:
    """Return the verified directory of a member, of ``best``, or any model directory.

    Raises:
        ConfigError: there is none of that name.
        IntegrityError: it is damaged.
    """
    folder = RunFolder(out)
    if name == "best":
        best = out / BEST
        if not best.exists():
            raise ConfigError(
                f"no best member chosen in {out} yet; type: arskit select --out {out}"
            )
        name = str(json.loads(best.read_text())["member"])
    if folder.has(name):
        return folder.open_member(name)
    path = Path(name)
    if (path / "config.json").is_file():
        if (path / MANIFEST).is_file():
            problems = check_directory(path)
            if problems:
                raise IntegrityError(f"{path}: {problems[0]}")
        return path
    return folder.open_member(name)


def check_directory(path: Path) -> list[str]:
    """Compare a committed directory with its manifest; returns what differs, in words."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        entries = dict(manifest["files"])
        expected = {n: (str(e["sha256"]), int(e["size"])) for n, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is damaged: {error}"]
    problems = []
    for name, (digest, size) in expected.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {size}")
        elif sha256(file) != digest:
            problems.append(f"{name} is not what was committed (sha256 differs)")
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    stray = sorted(found - expected.keys() - {MANIFEST})
    return problems + [f"{name} was not committed" for name in stray]


def verify(out: Path) -> tuple[list[str], list[str]]:
    """Recompute every hash of a run and its lineage's chain.

    Returns:
        The members looked at, and the problems found, each naming member and file.

    Raises:
        ConfigError: there is no run in ``out``.
    """
    folder = RunFolder(out)
    if not (out / LINEAGE).exists():
        raise ConfigError(f"no run in {out}; name its folder with --out")
    problems: list[str] = []
    names: list[str] = []
    try:
        entries = folder.lineage()
    except IntegrityError as error:
        return [], [str(error)]
    for entry in entries:
        name, parent = entry.get("member"), entry.get("parent")
        names.append(str(name))
        path = out / str(name)
        if not (path / MANIFEST).is_file():
            problems.append(f"{name}: its directory or {MANIFEST} is missing")
            continue
        if sha256(path / MANIFEST) != entry.get("manifest"):
            problems.append(f"{name}: {MANIFEST} is not the one in {LINEAGE}")
        problems += [f"{name}: {problem}" for problem in check_directory(path)]
        problems += _check_parent(out, str(name), parent)
    unknown = sorted(p.parent.name for p in out.glob(f"*/{MANIFEST}"))
    problems += [f"{n}: not in {LINEAGE}" for n in unknown if n not in names]
    return names, problems


def _check_parent(out: Path, name: str, parent: str | None) -> list[str]:
    try:
        manifest = json.loads((out / name / MANIFEST).read_text())
        recorded, chain = manifest["parent"], manifest["parent_manifest"]
    except (OSError, ValueError, KeyError):
        return []  # named already
    if recorded != parent:
        return [f"{name}: {MANIFEST} names parent {recorded!r}, {LINEAGE} names {parent!r}"]
    if parent is None:
        return []
    if not (out / parent / MANIFEST).is_file() or sha256(out / parent / MANIFEST) != chain:
        return [f"{name}: its parent {parent} is not the one it was born from"]
    return []


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return a history's rows; a last line torn by a kill is left out."""
    rows = []
    with path.open() as file:
        for line in file:
            if not line.endswith("\n"):
                break
            rows.append(json.loads(line))
    return rows


def sha256(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_atomically(path: Path, text: str) -> None:
    with _disk(path):
        temp = path.with_name(f".{path.name}.tmp")
        temp.write_text(text, encoding="utf-8")
        sync(temp)
        temp.replace(path)
        sync(path.parent)


@contextlib.contextmanager
def _disk(target: Path) -> Iterator[None]:
    """Say a full disk in one line."""
    try:
        yield
    except Exception as error:
        if _full(error) is None:
            raise
        raise ArsKitError(
            f"no space left to write {target}; what was committed before is whole. "
            "Free some space and run again"
        ) from error


def _full(error: Exception) -> int | None:
    """Return the error number if ``error`` means that a volume or a quota is full."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors writes by itself, and puts the number into its message.
    found = re.search(r"os error (\d+)", str(error))
    if number is None and type(error).__name__ == "SafetensorError" and found:
        number = int(found.group(1))
    return number if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"

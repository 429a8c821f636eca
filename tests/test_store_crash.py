"""What a power cut, a full disk, or a kill leaves behind, at every call that touches the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ars_kit.errors import ArsKitError
from ars_kit.history import read_history
from ars_kit.lock import exclusive
from ars_kit.store import RunFolder, check_directory, verify

VICTIM = Path(__file__).with_name("store_victim.py")


class PowerCut(BaseException):
    """Nothing handles it, and nothing that is tried after it works."""


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link"}


@dataclass
class Disk:
    """Hears of every call that changes or syncs something, and may refuse it."""

    heard: Callable[[str, Any], None] = lambda event, args: None
    events: list[str] = field(default_factory=list)

    def hear(self, event: str, args: Any) -> None:
        self.events.append(event)
        self.heard(event, args)


_disk: list[Disk] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _disk and (event in CHANGES or (event == "open" and args[2] & WRITING)):
        _disk[-1].hear(event, args)


sys.addaudithook(_hook)  # there is no taking it back; it is idle while _disk is empty


@contextmanager
def watched(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    real = os.fsync

    def fsync(handle: int) -> None:
        disk.hear("fsync", (handle,))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    _disk.append(disk)
    try:
        yield disk
    finally:
        _disk.pop()
        monkeypatch.undo()


def cut_at(n: int) -> Disk:
    """Return a disk on which the ``n``-th change and all later ones do not happen."""
    disk = Disk()

    def heard(event: str, args: Any) -> None:
        if len(disk.events) > n:
            raise PowerCut

    disk.heard = heard
    return disk


def full_at(n: int, code: int = errno.ENOSPC) -> Disk:
    """Return a disk on which the ``n``-th call that needs room finds none."""
    disk = Disk()
    needy = 0

    def heard(event: str, args: Any) -> None:
        nonlocal needy
        if event in {"open", "os.mkdir", "fsync"}:
            needy += 1
            if needy == n + 1:
                raise OSError(code, os.strerror(code))

    disk.heard = heard
    return disk


# --- what is done, and what may be seen afterwards ---


def files(text: str) -> Callable[[Path], None]:
    def write(to: Path) -> None:
        save_file({"w": torch.arange(5.0)}, to / "model.safetensors")
        (to / "sub").mkdir()
        (to / "sub" / "text.txt").write_text(text)

    return write


def state(value: int) -> dict[str, Any]:
    return {"w": torch.full((7,), float(value)), "value": value}


def commit(folder: RunFolder, name: str, parent: str | None) -> None:
    if folder.has(name):
        folder.heal_lineage(name, parent)
    else:
        folder.commit_member(name, files(name), parent=parent, facts={"seed": 1})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("base") / "run")
    folder.create()
    commit(folder, "d1", None)
    commit(folder, "d2", "d1")
    folder.states("d3").append([{"step": i} for i in range(6)])
    folder.states("d3").save(state(4), step=4)
    folder.write_text("run.toml", "old")
    return folder.path


ACTIONS: dict[str, Callable[[RunFolder], None]] = {
    "save_state": lambda f: f.states("d3").save(state(6), step=6),
    "save_state again": lambda f: f.states("d3").save(state(5), step=4),
    "first save_state": lambda f: f.states("d4").save(state(1), step=1),
    "drop_state": lambda f: f.states("d3").drop(),
    "cut_history": lambda f: f.states("d3").cut(4),
    "commit_member": lambda f: commit(f, "d3", "d2"),
    "write_text": lambda f: f.write_text("run.toml", "new"),
}


def view(folder: RunFolder) -> dict[str, Any]:
    """Return everything a later run would find; raises if any of it is not whole."""
    standing = {p.parent.name: p.read_bytes() for p in folder.path.glob("d*/manifest.json")}
    for name in standing:
        assert check_directory(folder.path / name) == []
    assert set(folder.members()) <= set(standing)
    states = {}
    for member in ("d3", "d4"):
        if found := folder.states(member).load():
            assert torch.equal(found[1]["w"], state(found[1]["value"])["w"])
            states[member] = found[0], found[1]["value"]
    history = folder.history_path("d3")
    return {
        "members": standing,
        "states": states,
        "history": read_history(history) if history.exists() else None,
        "text": (folder.path / "run.toml").read_text(),
    }


@pytest.mark.parametrize("action", ACTIONS)
def test_a_power_cut_at_any_call_leaves_old_or_new(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    old = view(RunFolder(base))
    shutil.copytree(base, tmp_path / "new")
    ACTIONS[action](RunFolder(tmp_path / "new"))
    new = view(RunFolder(tmp_path / "new"))
    assert old != new
    seen_old = seen_new = 0
    for n in range(200):
        folder = RunFolder(tmp_path / f"{n}")
        shutil.copytree(base, folder.path)
        with suppress(PowerCut), watched(cut_at(n), monkeypatch) as disk:
            ACTIONS[action](folder)
        finished = len(disk.events) <= n
        found = view(folder)
        assert found in (old, new), f"cut at {disk.events[n:]}"
        seen_old += found == old
        seen_new += found == new
        with folder.lock():  # the next run tidies up and does it again
            assert not list(folder.private.glob("tmp-*"))
            ACTIONS[action](folder)
        assert view(folder) == new
        assert verify(folder.path)[1] == []
        if finished:
            assert n > 3, "the hook hears nothing"
            assert seen_old
            assert seen_new
            return
    pytest.fail("it never finished")


def test_a_power_cut_while_starting_anew_leaves_whole_members(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(200):
        folder = RunFolder(tmp_path / f"{n}")
        shutil.copytree(base, folder.path)
        (folder.private / "data.json").write_text("{}")
        (folder.path / "notes.txt").write_text("mine")
        (folder.path / "run.toml").write_text("")
        with suppress(PowerCut), watched(cut_at(n), monkeypatch) as disk:
            folder.start_anew()
        finished = len(disk.events) <= n
        standing = sorted(p.parent.name for p in folder.path.glob("d*/manifest.json"))
        assert standing == ["d1", "d2"][: len(standing)]
        assert all(check_directory(folder.path / name) == [] for name in standing)
        kept = folder.states("d3").load()
        assert kept is None or (folder.path / "run.toml").exists()
        with folder.lock():
            folder.start_anew()
            assert {p.name for p in folder.path.iterdir()} == {".arskit", "notes.txt"}
            assert {p.name for p in folder.private.iterdir()} == {"lock", "state"}
        if finished:
            return
    pytest.fail("it never finished")


@pytest.mark.parametrize("action", [a for a in ACTIONS if a != "drop_state"])
def test_everything_is_synced_before_it_is_renamed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """No cut that a test can make loses the page cache, so the order of the calls is looked at."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(base, folder.path)
    synced: dict[int, int] = {}  # inode -> when it was changed last, as of its last sync
    unsynced_parents: dict[int, Path] = {}
    renamed: list[Path] = []

    def heard(event: str, args: Any) -> None:
        if event == "fsync":
            found = os.fstat(args[0])
            synced[found.st_ino] = found.st_mtime_ns
            unsynced_parents.pop(found.st_ino, None)
        if event == "os.mkdir" and not Path(args[0]).name.startswith("tmp-"):
            parent = Path(args[0]).parent
            if ".arskit/tmp-" not in str(parent):
                unsynced_parents[parent.stat().st_ino] = parent
        if event == "os.rename":
            source, target = Path(args[0]), Path(args[1])
            unsynced_parents[target.parent.stat().st_ino] = target.parent
            if target.name.startswith("tmp-"):
                unsynced_parents.pop(target.parent.stat().st_ino)
                return
            renamed.append(target)
            for path in (source, *source.rglob("*")):
                status = path.stat()
                assert synced.get(status.st_ino) == status.st_mtime_ns, f"{path} is not synced"

    with watched(Disk(heard), monkeypatch):
        ACTIONS[action](folder)
    assert renamed
    assert not unsynced_parents


def test_a_state_never_outlives_its_history(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(base, folder.path)
    folder.states("d3").append([{"step": 6}])
    history = folder.history_path("d3").stat().st_ino
    order: list[str] = []

    def heard(event: str, args: Any) -> None:
        if event == "fsync" and os.fstat(args[0]).st_ino == history:
            order.append("history")
        if event == "os.rename" and Path(args[1]).name.startswith("step-"):
            order.append("state")

    with watched(Disk(heard), monkeypatch):
        folder.states("d3").save(state(7), step=7)
    assert order == ["history", "state"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_disk_full_at_any_call_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, code: int
) -> None:
    old = view(RunFolder(base))
    for n in range(100):
        folder = RunFolder(tmp_path / f"{n}")
        shutil.copytree(base, folder.path)
        said = ""
        with watched(full_at(n, code), monkeypatch):
            try:
                ACTIONS[action](folder)
            except ArsKitError as error:
                said = str(error)
        assert not list(folder.private.glob("tmp-*"))
        found = view(folder)
        if not said:
            assert found != old
            assert n > 0
            return
        assert "what was committed before is whole" in said or "choose another --out" in said
        assert "\n" not in said
        assert str(folder.path) in said
        ACTIONS[action](folder)
        assert verify(folder.path)[1] == []
    pytest.fail("it never finished")


def test_a_truly_full_disk_is_one_line(tmp_path: Path) -> None:
    """The limit on a file's size makes the system itself refuse the write, in Rust too."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from ars_kit.errors import ArsKitError
from ars_kit.store import RunFolder
folder = RunFolder(Path(sys.argv[1])); folder.create()
folder.states("d1").save({"v": torch.zeros(10)}, step=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    folder.states("d1").save({"v": torch.zeros(100_000)}, step=2)
except ArsKitError as error:
    print(error)
try:
    folder.commit_member("d1", lambda to: (to / "a").write_bytes(bytes(200_000)), parent=None,
                         facts={})
except ArsKitError as error:
    print(error)
print(folder.states("d1").load()[0], folder.members(), list(folder.private.glob("tmp-*")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.startswith("no space left to write") for line in lines[:2])
    assert lines[2] == "1 [] []"


def test_a_lock_is_not_held_by_what_a_dead_run_left_running(tmp_path: Path) -> None:
    """A run forks a worker and is killed; the worker lives on, the folder is free."""
    code = """
import os, sys, time
from pathlib import Path
from ars_kit.lock import exclusive
with exclusive(Path(sys.argv[1]), what=Path("run")):
    if (worker := os.fork()) == 0:
        print(os.getpid(), flush=True)  # the worker itself, so that it has let go of the lock
        os.close(1)
        time.sleep(60)
    time.sleep(60)
"""
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        with pytest.raises(ArsKitError, match=f"process {run.pid} of .* \\(-c"):
            exclusive(lock, what=tmp_path).__enter__()
        run.kill()
    try:
        os.kill(worker, 0)  # it lives
        with exclusive(lock, what=tmp_path):
            pass
    finally:
        os.kill(worker, 9)


def kill_loop(out: Path, kills: int, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(VICTIM), str(out), str(kills), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["killed"] >= kills
    return found


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    kill_loop(tmp_path, 15, seed=int.from_bytes(os.urandom(4)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_hundreds_of_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    assert kill_loop(tmp_path, 400, seed=int.from_bytes(os.urandom(4)))["families"] > 10

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ars_kit import store
from ars_kit.errors import ArsKitError, ConfigError, IntegrityError
from ars_kit.state import pack, unpack
from ars_kit.store import RunFolder, check_directory, locate, read_history, verify


class Crash(BaseException):
    """A power cut: nothing handles it."""


def writer(content: str) -> Any:
    def files(folder: Path) -> None:
        (folder / "a.txt").write_text(content)
        (folder / "b.txt").write_text(content * 2)

    return files


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def family_of(folder: RunFolder, count: int = 3) -> None:
    parent = None
    for i in range(count):
        folder.commit_member(f"d{i}", writer(f"text {i}"), parent=parent, facts={})
        parent = f"d{i}"


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(tree=trees)
@settings(max_examples=60, deadline=None)
def test_state_round_trips(tree: Any) -> None:
    tensors, skeleton = pack(tree)
    assert unpack(tensors, json.loads(json.dumps(skeleton))) == tree


def test_state_keeps_tensors_exactly(folder: RunFolder) -> None:
    shared = torch.randn(3)
    tree = {
        0: {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(True)},
        "x": (shared, shared, torch.tensor(7), float("inf")),
    }
    folder.save_state("d1", tree, step=3)
    step, back = folder.load_state("d1") or (0, None)
    assert step == 3
    assert back[0]["a"].dtype == torch.bfloat16
    assert torch.equal(back["x"][1], shared)
    assert back["x"][3] == float("inf")
    with pytest.raises(TypeError, match="/x holds a set"):
        pack({"x": {1}})


@pytest.mark.parametrize("name", ["fsync", "rename", "replace"])
def test_a_crash_at_any_call_leaves_old_or_new(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Cut the power at the n-th fsync or rename of a commit, for every n."""
    folder.save_state("d1", {"v": torch.tensor(1)}, step=1)
    real = getattr(os, name)
    for n in range(20):
        calls = 0
        old, new = (folder.load_state("d1") or (0,))[0], n + 2

        def cut(*args: Any, n: int = n, **kw: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > n:
                raise Crash
            return real(*args, **kw)

        monkeypatch.setattr(os, name, cut)
        # Nothing tidies up after a power cut.
        monkeypatch.setattr(store.shutil, "rmtree", lambda *a, **k: None)
        try:
            folder.save_state("d1", {"v": torch.tensor(new)}, step=new)
            finished = True
        except Crash:
            finished = False
        monkeypatch.undo()
        step, tree = folder.load_state("d1") or (0, {})
        assert step == int(tree["v"])
        assert step in {old, new}
        if finished:
            assert step == new
            return
        with folder.lock():
            assert not list(folder.private.glob("tmp-*"))
    pytest.fail("the commit never finished")


def test_a_killed_commit_of_a_member_is_healed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_enter", lambda *a: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        family_of(folder, 1)
    monkeypatch.undo()
    assert folder.has("d0")
    assert folder.members() == []
    folder.heal_lineage("d0", None)
    assert folder.members() == ["d0"]
    assert verify(folder.path) == (["d0"], [])


def test_every_flipped_byte_is_named(folder: RunFolder) -> None:
    family_of(folder)
    assert verify(folder.path) == (["d0", "d1", "d2"], [])
    for name in ("d0", "d1"):
        for file in sorted((folder.path / name).iterdir()):
            original = file.read_bytes()
            for at in range(0, len(original), max(1, len(original) // 15)):
                damaged = bytearray(original)
                damaged[at] ^= 1
                file.write_bytes(bytes(damaged))
                _, problems = verify(folder.path)
                assert any(p.startswith(f"{name}: ") and file.name in p for p in problems), at
            file.write_bytes(original)
    assert verify(folder.path)[1] == []


def test_missing_and_stray_files_are_named(folder: RunFolder) -> None:
    family_of(folder)
    (folder.path / "d1" / "a.txt").unlink()
    (folder.path / "d0" / "new.txt").write_text("x")
    assert verify(folder.path)[1] == ["d0: new.txt was not committed", "d1: a.txt is missing"]
    with pytest.raises(IntegrityError, match=r"a\.txt is missing"):
        locate("d1", folder.path)


def test_a_damaged_state_is_never_passed_over(folder: RunFolder) -> None:
    folder.save_state("d1", {"v": torch.zeros(3)}, step=1)
    file = folder.private / "state" / "d1" / "step-00000001" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="training state of d1 is damaged"):
        folder.load_state("d1")


def test_a_full_disk_keeps_the_old_state(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save_state("d1", {"v": torch.tensor(1)}, step=1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArsKitError, match="no space left"):
        folder.save_state("d1", {"v": torch.tensor(2)}, step=2)
    monkeypatch.undo()
    assert (folder.load_state("d1") or (0,))[0] == 1
    assert not list(folder.private.glob("tmp-*"))
    with pytest.raises(ArsKitError, match="GB free; this run needs"):
        folder.preflight(10**18)


def test_a_truly_full_disk_is_one_line(tmp_path: Path) -> None:
    """The file-size limit makes the system itself refuse the write."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from ars_kit.errors import ArsKitError\n"
        "from ars_kit.store import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1])); folder.create()\n"
        "folder.save_state('d1', {'v': torch.zeros(10)}, step=1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    folder.save_state('d1', {'v': torch.zeros(100_000)}, step=2)\n"
        "except ArsKitError as error:\n"
        "    print(error, folder.load_state('d1')[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("no space left"), done.stderr
    assert done.stdout.strip().endswith("1")


def test_the_second_run_is_refused_by_the_owners_name(folder: RunFolder) -> None:
    with folder.lock():
        code = (
            "import sys; from pathlib import Path; from ars_kit.store import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).lock(): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder.path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"in use by another run: process {os.getpid()}" in done.stderr
    with folder.lock():
        pass


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        RunFolder(tmp_path / "file" / "run").create()


def test_history_survives_a_torn_line(folder: RunFolder) -> None:
    folder.append_history("d1", [{"step": i} for i in range(5)])
    path = folder.history_path("d1")
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in read_history(path)] == list(range(5))
    folder.cut_history("d1", 3)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_an_unknown_member_gets_a_suggestion(folder: RunFolder) -> None:
    family_of(folder)
    with pytest.raises(ConfigError, match=r"no member 'd7'.* There are: d0, d1, d2"):
        locate("d7", folder.path)
    with pytest.raises(ConfigError, match="arskit select"):
        locate("best", folder.path)
    assert check_directory(folder.path / "d0") == []

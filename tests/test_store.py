from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ars_kit.durable import clear_temporaries, disk_errors
from ars_kit.errors import ArsKitError, ConfigError, IntegrityError
from ars_kit.history import read_history
from ars_kit.state import pack, unpack
from ars_kit.store import RunFolder, check_directory, locate, verify


def writer(content: str) -> Callable[[Path], None]:
    def files(folder: Path) -> None:
        (folder / "a.txt").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(content * 2)

    return files


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


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


# --- trees ---

trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(-9, 9), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(tree=trees)
@settings(max_examples=80, deadline=None)
def test_trees_round_trip(tree: Any) -> None:
    tensors, skeleton = pack(tree)
    back = unpack(tensors, json.loads(json.dumps(skeleton, allow_nan=False)))
    assert repr(back) == repr(tree)  # types, order of keys, and the sign of zero too


def test_a_state_keeps_tensors_exactly(folder: RunFolder) -> None:
    shared = torch.randn(4, 3)
    dtypes = (
        torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.int64, torch.int8, torch.uint8, torch.bool,
    )  # fmt: skip
    tree = {
        0: [torch.tensor([0, 1, 1]).to(dtype) for dtype in dtypes],
        "shared": (shared, shared, shared.T, shared[1:, :2], shared[2]),
        "odd": [torch.tensor(7), torch.empty(0, 3), torch.empty(0), torch.ones(1).expand(5)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "floats": [float("inf"), -float("inf"), float("nan"), -0.0, 5e-324],
    }
    folder.states("d1").save(tree, step=3)
    step, back = folder.states("d1").load() or (0, None)
    assert step == 3
    assert [t.dtype for t in back[0]] == list(dtypes)
    for name in ("shared", "odd"):
        assert type(back[name]) is type(tree[name])
        assert all(
            a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(tree[name], back[name], strict=True)
        )
    assert repr(back["floats"]) == repr(tree["floats"])
    back["shared"][0].zero_()
    assert not torch.equal(back["shared"][0], back["shared"][1])


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        {1: torch.zeros(1), "1": torch.ones(1)},
        {"a": torch.zeros(1), "a'": torch.ones(1), "/a": torch.full((1,), 2.0)},
        {"__metadata__": torch.zeros(1), "": torch.ones(1)},
        torch.ones(3),
        {},
    ],
)
def test_tensors_with_one_path_are_not_mixed_up(folder: RunFolder, tree: Any) -> None:
    folder.states("d1").save(tree, step=1)
    back = (folder.states("d1").load() or (0, None))[1]
    assert repr(back) == repr(tree)


class Pair(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": [{1}]}, "/x/0 holds a set"),
        ({"x": Pair(1)}, "/x holds a Pair"),
        ({"x": {(1, 2): 3}}, "/x has a tuple as a key"),
        ({True: 1}, "state has a bool as a key"),
        (1j, "state holds a complex"),
    ],
)
def test_what_needs_pickle_is_refused_by_its_path(
    folder: RunFolder, tree: Any, message: str
) -> None:
    folder.states("d1").save({"v": 1}, step=1)
    with pytest.raises(TypeError, match=message):
        folder.states("d1").save(tree, step=2)
    assert folder.states("d1").load() == (1, {"v": 1})


# --- training states and history ---


def test_only_the_newest_state_stays(folder: RunFolder) -> None:
    assert folder.states("d1").load() is None
    for step, value in ((8, 1), (9, 2), (9, 3), (9, 4), (10, 5), (123_456_789, 6)):
        folder.states("d1").save({"v": value}, step=step)
        assert folder.states("d1").load() == (step, {"v": value})
        assert len(list((folder.private / "state" / "d1").glob("step-*"))) == 1
    folder.states("d1").drop()
    folder.states("d1").drop()
    assert folder.states("d1").load() is None


def test_a_state_stays_in_its_folder(folder: RunFolder, tmp_path: Path) -> None:
    """A base's path is no member's name; dropping its state must not drop the base."""
    for name in (str(tmp_path), "../../x", ""):
        with pytest.raises(ValueError, match="is no member's name"):
            folder.states(name).drop()


def test_states_saved_again_are_ordered_by_number(folder: RunFolder) -> None:
    """Left side by side by kills, 9.10 is newer than 9.9."""
    for again in range(12):
        folder.states("d1").save({"v": again}, step=9)
        home = folder.private / "state" / "d1"
        kept = home.parent / f"kept-{again}"
        shutil.copytree(next(home.glob("step-*")), kept)
    for again in range(12):
        name = f"step-{9:08d}" + (f".{again}" if again else "")
        shutil.rmtree(home / name, ignore_errors=True)
        (home.parent / f"kept-{again}").rename(home / name)
    assert folder.states("d1").load() == (9, {"v": 11})
    folder.states("d1").save({"v": 12}, step=9)
    assert [p.name for p in home.glob("step-*")] == ["step-00000009.12"]


def test_what_a_kill_left_beside_the_newest_state_goes_when_the_run_goes_on(
    folder: RunFolder,
) -> None:
    """Killed after a state was committed and before the older one was removed."""
    states = folder.states("d1")
    states.prune()
    for step in (10, 20, 20, 30, 30):
        states.save({"v": step}, step=step, keep=[10])
        kept = folder.private / f"kept-{len(list(folder.private.glob('kept-*')))}"
        shutil.copytree(states.home, kept)
    for kept in sorted(folder.private.glob("kept-*")):
        shutil.copytree(kept, states.home, dirs_exist_ok=True)
    assert len(list(states.home.glob("step-*"))) == 5
    states.prune([10, 20])
    assert sorted(p.name for p in states.home.glob("step-*")) == [
        "step-00000010", "step-00000020.1", "step-00000030.1"
    ]  # fmt: skip
    states.prune([30])
    assert [p.name for p in states.home.glob("step-*")] == ["step-00000030.1"]


def test_states_that_are_asked_for_stay_beside_the_newest(folder: RunFolder) -> None:
    for step in (10, 20, 30):
        folder.states("d1").save({"v": step}, step=step, keep=[10])
    assert folder.states("d1").steps() == [10, 30]
    folder.states("d1").save({"v": 40}, step=40, keep=[10, 30])
    assert folder.states("d1").steps() == [10, 30, 40]
    assert folder.states("d1").load() == (40, {"v": 40})
    assert folder.states("d1").load(step=10) == (10, {"v": 10})
    assert folder.states("d1").load(step=20) is None
    folder.states("d1").save({"v": 50}, step=50)
    assert folder.states("d1").steps() == [50]


def test_going_back_removes_the_later_states_and_saves_again_in_place(folder: RunFolder) -> None:
    for step in (10, 20, 30):
        folder.states("d1").save({"v": step}, step=step, keep=[10, 20])
    folder.states("d1").return_to(10)
    assert folder.states("d1").load() == (10, {"v": 10})
    folder.states("d1").save({"v": "again"}, step=10, keep=[10])
    assert folder.states("d1").load() == (10, {"v": "again"})
    home = folder.private / "state" / "d1"
    assert [p.name for p in home.glob("step-*")] == ["step-00000010.1"]
    folder.states("d1").save({"v": 20}, step=20, keep=[10])
    assert folder.states("d1").load(step=10) == (10, {"v": "again"})


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_damaged_state_is_never_passed_over(folder: RunFolder, name: str) -> None:
    folder.states("d1").save({"v": torch.zeros(3), "n": 5}, step=1)
    file = folder.private / "state" / "d1" / "step-00000001" / name
    size = file.stat().st_size
    for at in range(0, size, max(1, size // 100)):
        original = flip(file, at)
        with pytest.raises(IntegrityError, match="training state of d1 is damaged: ") as caught:
            folder.states("d1").load()
        assert name in str(caught.value) or name == "manifest.json"
        file.write_bytes(original)
    assert folder.states("d1").load() is not None


def test_killed_while_going_back_no_later_state_is_left_without_the_latest(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        folder.states("d1").save({"v": step}, step=step, keep=[10, 20])
    removed: list[Path] = []

    def dying(path: Path, *, scratch: Path) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        shutil.rmtree(path)

    monkeypatch.setattr("ars_kit.states.discard", dying)
    with pytest.raises(KeyboardInterrupt):
        folder.states("d1").return_to(10)
    assert folder.states("d1").steps() == [10, 20]


def test_history_survives_a_torn_line(folder: RunFolder) -> None:
    folder.states("d1").append([{"step": i, "note": "größer"} for i in range(3)])
    folder.states("d1").append([{"step": i} for i in range(3, 5)])
    path = folder.history_path("d1")
    for torn in (b'{"step": 5, "lo', b"\xc3", b"{}"):
        with path.open("ab") as file:
            file.write(torn)
        assert [r["step"] for r in read_history(path)] == list(range(5))
        folder.states("d1").cut(5)
    folder.states("d1").cut(2)
    assert [r["step"] for r in read_history(path)] == [0, 1]
    folder.states("nobody").cut(2)


def test_a_damaged_history_is_named(folder: RunFolder) -> None:
    folder.states("d1").append([{"step": i} for i in range(5)])
    path = folder.history_path("d1")
    flip(path, path.read_bytes().index(b"2") - 3, 0xFF)
    with pytest.raises(IntegrityError, match=r"history.jsonl, line 3 is damaged"):
        folder.states("d1").cut(5)


# --- members ---


def test_a_member_is_what_was_written(folder: RunFolder) -> None:
    family_of(folder)
    assert folder.members() == ["d0", "d1", "d2"]
    path = folder.open_member("d1")
    assert (path / "sub" / "b.txt").read_text() == "text 1text 1"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["parent"] == "d0"
    assert manifest["seed"] == 1
    assert set(manifest["files"]) == {"a.txt", "sub/b.txt"}
    assert manifest["files"]["a.txt"]["size"] == 6
    assert verify(folder.path) == (["d0", "d1", "d2"], [])


def test_facts_are_kept_as_json_keeps_them(folder: RunFolder) -> None:
    facts = {"by number": {10: 1, 2: float("nan")}, "größer": ("a", "\udcff")}
    folder.commit_member("d0", writer("x"), parent=None, facts=facts)
    assert verify(folder.path) == (["d0"], [])
    manifest = json.loads((folder.open_member("d0") / "manifest.json").read_text())
    assert manifest["größer"] == ["a", "\udcff"]
    assert set(manifest["by number"]) == {"10", "2"}


def test_files_have_the_rights_the_user_asked_for(folder: RunFolder) -> None:
    before = os.umask(0o027)
    try:
        family_of(folder, 1)
    finally:
        os.umask(before)
    for path in (folder.path / "d0", folder.path / "d0" / "sub"):
        assert path.stat().st_mode & 0o777 == 0o750
    for path in (folder.path / "d0" / "manifest.json", folder.path / "lineage.json"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_library_that_writes_private_files_does_not_hide_them(folder: RunFolder) -> None:
    def private(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"x")
        (path / "model.safetensors").chmod(0o600)

    before = os.umask(0o022)
    try:
        folder.commit_member("d1", private, parent=None, facts={})
    finally:
        os.umask(before)
    assert (folder.path / "d1" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_name_is_given_once(folder: RunFolder) -> None:
    family_of(folder, 1)
    with pytest.raises(ConfigError, match="already exists"):
        folder.commit_member("d0", writer("x"), parent=None, facts={})
    with pytest.raises(ConfigError, match="no such member"):
        folder.commit_member("d1", writer("x"), parent="d7", facts={})
    for name in ("../d1", ".d1", "a/b", ""):
        with pytest.raises(ConfigError, match="cannot be a member's name"):
            folder.commit_member(name, writer("x"), parent=None, facts={})
    assert verify(folder.path) == (["d0"], [])


def test_something_else_in_a_members_place_is_left_alone(folder: RunFolder) -> None:
    (folder.path / "d0").mkdir()
    (folder.path / "d0" / "thesis.txt").write_text("years of work")
    with pytest.raises(IntegrityError, match=r"has no manifest\.json, so it is no member"):
        folder.has("d0")
    with pytest.raises(ConfigError, match="already exists"):
        family_of(folder, 1)
    folder.start_anew()
    assert (folder.path / "d0" / "thesis.txt").exists()


def test_starting_anew_spares_strangers_and_mends_damage(folder: RunFolder) -> None:
    family_of(folder)
    web = folder.path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "an app"}')
    (folder.private / "data.json").write_text("{}")
    flip(folder.path / "lineage.json", 5)
    assert verify(folder.path)[1] != []
    folder.start_anew()
    assert {p.name for p in folder.path.iterdir()} == {".arskit", "web"}
    assert [p.name for p in folder.private.iterdir()] == ["state"]
    family_of(folder)
    assert verify(folder.path) == (["d0", "d1", "d2"], [])


def test_an_ancestor_that_is_gone_is_not_trained_again(folder: RunFolder) -> None:
    family_of(folder)
    shutil.rmtree(folder.path / "d2")
    assert not folder.has("d2")  # nobody descends from it
    folder.commit_member("d2", writer("again"), parent="d1", facts={})
    shutil.rmtree(folder.path / "d1")
    with pytest.raises(IntegrityError, match="d1 was committed and d2 was born from it"):
        folder.has("d1")
    assert folder.members() == ["d0", "d2"]
    assert "d1: its directory or manifest.json is missing" in verify(folder.path)[1]
    assert "d2: its parent d1 is missing" in verify(folder.path)[1]


# --- integrity ---


def test_every_flipped_bit_is_named(folder: RunFolder) -> None:
    family_of(folder)
    rng = random.Random(0)
    files = [p for p in folder.path.glob("d*/**/*") if p.is_file()]
    assert len(files) == 9
    for file in files:
        member = file.relative_to(folder.path).parts[0]
        name = file.relative_to(folder.path / member).as_posix()
        size = file.stat().st_size
        for at in {0, size - 1, *(rng.randrange(size) for _ in range(40))}:
            original = flip(file, at, 1 << rng.randrange(8))
            _, problems = verify(folder.path)
            assert any(p.startswith(f"{member}: {name} ") for p in problems), (file, at, problems)
            with pytest.raises(IntegrityError, match=f"{member}: {name} "):
                folder.open_member(member)
            file.write_bytes(original)
    assert verify(folder.path)[1] == []


def test_every_flipped_bit_of_the_lineage_is_named(folder: RunFolder) -> None:
    family_of(folder)
    file = folder.path / "lineage.json"
    rng = random.Random(0)
    for at in range(file.stat().st_size):
        original = flip(file, at, 1 << rng.randrange(8))
        _, problems = verify(folder.path)
        assert any("lineage.json" in p for p in problems), (at, problems)
        file.write_bytes(original)


def test_problems_say_what_was_expected_and_found(folder: RunFolder) -> None:
    family_of(folder, 1)
    file = folder.path / "d0" / "a.txt"
    file.write_text("text 1")
    digest = "[0-9a-f]{64}"
    expected = f"d0: a.txt is not what was committed: sha256 is {digest}, not {digest}"
    with pytest.raises(IntegrityError, match=expected):
        folder.open_member("d0")
    file.write_text("text")
    assert verify(folder.path)[1] == ["d0: a.txt is not what was committed: 4 bytes, not 6"]
    file.unlink()
    assert verify(folder.path)[1] == ["d0: a.txt is missing"]
    with pytest.raises(IntegrityError, match=r"a\.txt is missing"):
        locate("d0", folder.path)


def test_a_stray_file_is_named_and_a_hidden_one_is_not(folder: RunFolder) -> None:
    """transformers would load a stray adapter or chat template without a word."""
    family_of(folder, 1)
    (folder.path / "d0" / ".DS_Store").write_text("")
    assert verify(folder.path)[1] == []
    (folder.path / "d0" / "adapter_config.json").write_text("{}")
    assert verify(folder.path)[1] == ["d0: adapter_config.json was not committed"]


def test_members_that_changed_places_are_found(folder: RunFolder) -> None:
    family_of(folder)
    (folder.path / "d0").rename(folder.path / "x")
    (folder.path / "d1").rename(folder.path / "d0")
    (folder.path / "x").rename(folder.path / "d1")
    for name in ("d0", "d1"):
        with pytest.raises(IntegrityError, match=f"{name}: manifest.json is not the one"):
            locate(name, folder.path)


def test_a_newer_format_is_refused(folder: RunFolder) -> None:
    family_of(folder, 1)
    file = folder.path / "d0" / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    assert check_directory(folder.path / "d0") == [
        "manifest.json has format 2; this version reads 1"
    ]


def test_verify_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        verify(tmp_path)


def test_verify_names_a_member_that_a_crash_kept_out_of_the_lineage(folder: RunFolder) -> None:
    family_of(folder, 1)
    (folder.path / "lineage.json").unlink()
    assert verify(folder.path) == ([], ["d0: not in lineage.json"])
    folder.heal_lineage("d0", None)
    folder.heal_lineage("d9", None)
    assert verify(folder.path) == (["d0"], [])


# --- locating ---


def test_models_are_located(folder: RunFolder, tmp_path: Path) -> None:
    def files(to: Path) -> None:
        (to / "config.json").write_text("{}")
        save_file({"w": torch.ones(3)}, to / "model.safetensors")

    folder.commit_member("d1", files, parent=None, facts={})
    assert locate("d1", folder.path) == folder.path / "d1"
    assert locate(str(folder.path / "d1"), tmp_path) == folder.path / "d1"
    with pytest.raises(ConfigError, match="arskit select"):
        locate("best", folder.path)
    folder.write_text("best.json", '{"member": "d1"}')
    assert locate("best", folder.path) == folder.path / "d1"
    folder.write_text("best.json", '{"member"')
    with pytest.raises(IntegrityError, match=r"best.json is damaged.*arskit select"):
        locate("best", folder.path)
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        locate(str(alone), folder.path)
    (alone / "config.json").write_text("{}")
    assert locate(str(alone), folder.path) == alone
    taken = tmp_path / "taken"  # a member carried off without its family
    shutil.copytree(folder.path / "d1", taken)
    assert load_file(locate(str(taken), folder.path) / "model.safetensors")["w"].sum() == 3
    flip(taken / "model.safetensors", -1)
    with pytest.raises(IntegrityError, match=r"taken: model\.safetensors is not what"):
        locate(str(taken), folder.path)


def test_an_unknown_member_gets_a_suggestion(folder: RunFolder) -> None:
    family_of(folder)
    with pytest.raises(ConfigError, match=r"no member 'd7'.* There are: d0, d1, d2"):
        locate("d7", folder.path)
    with pytest.raises(ConfigError, match=r"no member 'd1' in .*nowhere.*There are: none"):
        locate("d1", folder.path / "nowhere")


# --- the folder ---


def test_the_second_run_is_refused_by_the_owners_name(folder: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from ars_kit.store import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock(): print('mine')"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with folder.lock():
        kept = folder.private / "tmp-of-the-first"
        kept.mkdir()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"in use by another run: process {os.getpid()} of" in done.stderr
        assert kept.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "mine\n"
    assert not kept.exists()
    with folder.lock():
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="nobody is dead and not buried there")
def test_what_a_living_process_writes_is_not_cleared_away(folder: RunFolder) -> None:
    """As `arskit select` does in the folder of a run that begins; it holds no lock."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        theirs = folder.private / f"tmp-{other.pid}-0123abcd"
        theirs.write_text("half")
        for begin in (folder.lock, lambda: nullcontext(folder.start_anew())):
            with begin():
                assert theirs.read_text() == "half"
        os.utime(theirs, (1, 1))  # of one that had the same number long before
        with folder.lock():
            assert not theirs.exists()
        theirs.write_text("half")
        other.kill()
        other.stdout.read()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with folder.lock():
            assert not theirs.exists()


def test_what_two_clear_away_at_once_is_gone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [folder.private / f"tmp-99999999-0123abc{i}" for i in range(3)]
    left[0].mkdir()
    for file in left[1:]:
        file.write_text("half")
    real = Path.glob

    def slower(path: Path, pattern: str) -> list[Path]:
        found = list(real(path, pattern))
        monkeypatch.setattr(Path, "glob", real)
        clear_temporaries(path)  # the other, between our look and our hand
        return found

    monkeypatch.setattr(Path, "glob", slower)
    clear_temporaries(folder.private)
    assert not [p for p in left if p.exists()]


def test_a_small_file_that_was_cleared_away_is_written_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that begins on another machine, where nobody sees that this process lives."""
    real, cleared = Path.replace, list[Path]()

    def meanwhile(path: Path, target: Path) -> Path:
        if len(cleared) < 2:
            cleared.append(path)
            path.unlink()
        return real(path, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    folder.write_text("best.json", "whole")
    assert (folder.path / "best.json").read_text() == "whole"
    assert len(set(cleared)) == 2
    assert not list(folder.private.glob("tmp-*"))
    monkeypatch.setattr(Path, "replace", lambda path, target: real(path.with_name("gone"), target))
    with pytest.raises(FileNotFoundError):
        folder.write_text("best.json", "again")


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(ConfigError, match=r"cannot write to .*; choose another --out"),
            RunFolder(path).lock(),
        ):
            pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_folder_is_said(folder: RunFolder) -> None:
    folder.private.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write to"), folder.lock():
        pass


def test_a_full_disk_is_known_by_what_rust_says_of_it(tmp_path: Path) -> None:
    """Tokenizers, like safetensors, leave the system's number in the message only."""
    with pytest.raises(ArsKitError, match="no space left to write"), disk_errors(tmp_path):
        raise Exception("No space left on device (os error 28)")  # noqa: TRY002 -- as they do
    with pytest.raises(RuntimeError), disk_errors(tmp_path):
        raise RuntimeError("(os error 28)")


def test_a_folder_holds_work_once_a_state_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.holds_work()
    folder.create()
    folder.write_text("run.toml", "")
    folder.states("d1").append([{"step": 0}])
    assert not folder.holds_work()
    folder.states("d1").save({}, step=1)
    assert folder.holds_work()


def test_preflight_names_both_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "not" / "yet")
    folder.preflight(1)
    with pytest.raises(
        ArsKitError, match=r"has [\d.]+ [GMk]B free; this run needs about 1000000000"
    ):
        folder.preflight(10**18)
    assert not (tmp_path / "not").exists()


def test_small_files_are_replaced(folder: RunFolder) -> None:
    folder.write_text("report.md", "größer 🙂\n")
    folder.write_text("report.md", "größer\n")
    assert (folder.path / "report.md").read_bytes() == "größer\n".encode()
    assert [p.name for p in folder.private.iterdir()] == ["state"]


def test_the_last_row_is_found_and_few_others_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ars_kit import history

    path = tmp_path / "history.jsonl"
    rows = [{"step": i, "loss": 3.5 / (i + 1), "z": None if i % 9 else 0.5} for i in range(500)]
    history.append_rows(path, rows)
    with path.open("a") as file:
        file.write('{"step": 500, "lo')
    parsed: list[Any] = []
    real = json.loads
    monkeypatch.setattr(history.json, "loads", lambda text: parsed.append(text) or real(text))
    assert history.last_row(path) == (500, rows[-1])
    assert len(parsed) == 3
    path.write_text('{"step": 0')
    assert history.last_row(path) == (0, {})


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"\0" * (len(line) - 1) + b"\n",
        lambda line: line.replace(b'": ', b'"; ', 1),
        lambda line: line[: len(line) // 2] + b"\n",
        lambda line: line.replace(b"loss", b"\xffoss"),
        lambda _: b"12\n",
    ],
)
def test_a_damaged_line_anywhere_is_named_with_what_to_do(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    from ars_kit.history import append_rows, last_row

    path = tmp_path / "history.jsonl"
    append_rows(path, [{"step": i, "loss": 1.0} for i in range(9)])
    whole = path.read_bytes().splitlines(keepends=True)
    for at in (0, 4, 8):
        damaged = [damage(line) if i == at else line for i, line in enumerate(whole)]
        path.write_bytes(b"".join(damaged))
        for reads in (last_row, read_history):
            with pytest.raises(IntegrityError, match=rf"line {at + 1} is damaged .* remove that"):
                reads(path)
        path.write_bytes(b"".join(line for i, line in enumerate(whole) if i != at))
        assert last_row(path)[0] == len(read_history(path)) == 8

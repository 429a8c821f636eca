"""Training states and histories: kept exactly, ordered, and never passed over when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_run import flip

from ars_kit.errors import IntegrityError
from ars_kit.history import read_history
from ars_kit.state import pack, unpack
from ars_kit.store import RunFolder

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

"""Training states in parts: any process that cannot write is heard of, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from ars_kit import sharding
from ars_kit.errors import ArsKitError
from ars_kit.state import pack
from ars_kit.states import States

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TREE: dict[str, Any] = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(0)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.5},
}


def kept(states: States, step: int, tree: Any) -> None:
    with states.shared(step, main=True, wait=lambda: None) as parts:
        sharding.write_parts(pack(tree)[0], parts)
        states.save(tree, step=step, parts=parts)


def test_a_state_in_parts_comes_back_whole(tmp_path: Path) -> None:
    states = States(tmp_path, "d2")
    kept(states, 7, TREE)
    (folder,) = states.home.iterdir()
    assert sharding.in_parts(folder)
    assert not list(tmp_path.glob("tmp-*"))
    step, tree = states.load() or (0, {})
    assert step == 7
    assert torch.equal(tree["weights"]["a"], TREE["weights"]["a"])
    assert tree["weights"]["b"].shape == (0,)
    assert tree["optimizer"]["state"][0]["step"] == 3
    assert tree["optimizer"]["lr"] == 0.5


def test_a_part_that_cannot_be_written_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = States(tmp_path, "d2")
    kept(states, 7, TREE)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckpointException("write", {1: (full, None)})  # type: ignore[dict-item]

    monkeypatch.setattr(state_dict_saver, "save", refuse)
    with pytest.raises(ArsKitError, match="no space left to write"):
        kept(states, 8, TREE)
    assert not list(tmp_path.glob("tmp-*"))
    assert states.steps() == [7]


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    states = States(tmp_path, "d2")
    kept(states, 7, TREE)
    (part,) = states.home.glob("*/shard-*")
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with pytest.raises(ArsKitError, match="damaged: shard-00001"):
        states.load()

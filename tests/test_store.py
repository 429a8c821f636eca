"""Members in a run folder: committed, named, found again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_run import family_of, flip, writer

from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.store import RunFolder, locate, verify


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

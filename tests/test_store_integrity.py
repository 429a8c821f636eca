"""Whatever changed in a run folder is found and named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from stored_run import family_of, flip

from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.store import RunFolder, check_directory, locate, verify


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

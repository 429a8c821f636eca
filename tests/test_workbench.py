"""What is made beside its target: nothing stays of the dead, and the living are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ars_kit import lock
from ars_kit.workbench import LOCK, workbench

VICTIM = """
import sys
from pathlib import Path
from ars_kit.workbench import workbench
with workbench(Path(sys.argv[1])) as bench:
    (bench / "tmp-1").mkdir()
    (bench / "tmp-1" / "model.safetensors").write_text("half")
    print(bench, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_with_the_next_and_not_before(tmp_path: Path) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert victim.stdin is not None
    assert victim.stdout is not None
    with victim, victim.stdin, victim.stdout:
        theirs = Path(victim.stdout.readline().decode().strip())
        with workbench(tmp_path) as mine:
            assert {*tmp_path.iterdir()} == {mine, theirs}
        assert (theirs / "tmp-1" / "model.safetensors").read_text() == "half"
        os.kill(victim.pid, signal.SIGKILL)
    assert [*tmp_path.iterdir()] == [theirs]
    with workbench(tmp_path) as mine:
        assert [*tmp_path.iterdir()] == [mine]
    assert not [*tmp_path.iterdir()]


def test_what_nobody_signed_is_left_alone(tmp_path: Path) -> None:
    """It may be somebody else's folder, or one that its maker is about to lock."""
    (tmp_path / ".arskit-notes").mkdir()
    (tmp_path / ".arskit-new").mkdir()
    (tmp_path / ".arskit-new" / LOCK).touch()
    (tmp_path / ".arskit-file").touch()
    before = {*tmp_path.rglob("*")}
    with workbench(tmp_path):
        pass
    assert {*tmp_path.rglob("*")} == before


def test_a_volume_that_cannot_lock_can_be_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    with workbench(tmp_path) as mine, workbench(tmp_path):
        assert mine.is_dir()
    assert not [*tmp_path.iterdir()]

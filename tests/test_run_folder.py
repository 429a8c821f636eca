"""The folder of a run: whose it is, what is cleared away, what cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest

from ars_kit.durable import clear_temporaries, disk_errors
from ars_kit.errors import ArsKitError, ConfigError, IntegrityError
from ars_kit.history import read_history
from ars_kit.store import RunFolder


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

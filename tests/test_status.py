"""``arskit status``: how far a run is, from its folder alone, while it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from ars_kit import outcome
from ars_kit.cli import cli
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.history import last_row
from ars_kit.host import Host
from ars_kit.records import read_run
from ars_kit.resolving import resolve
from ars_kit.runs import check_folder
from ars_kit.settings import to_toml
from ars_kit.store import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run whose first member is in training."""
    made = RunFolder(tmp_path / "run")
    made.create()
    made.write_text(outcome.FROZEN, to_toml(resolve({"family.members": "d2..d3"}, {}, None)))
    taken = {"loss": 3.0, "gradient": 1.0, "step_size": 1.0, "skipped": False}
    made.states("d2").append([{"step": i, **taken} for i in range(20)])
    return made


def test_a_damaged_line_in_the_middle_of_a_history_is_one_line(folder: RunFolder) -> None:
    path = folder.history_path("d2")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:7], "\0" * 20 + "\n", *lines[8:]]))
    done = CliRunner().invoke(cli, ["status", "--out", str(folder.path)])
    assert isinstance(done.exception, IntegrityError)
    said = str(done.exception)
    assert "line 8 is damaged" in said
    assert "remove that line" in said
    assert "\n" not in said
    path.write_text("".join([*lines[:7], *lines[8:]]))
    assert outcome.status(folder.path)[0]["state"] == "training"


def test_a_member_that_is_committed_meanwhile_is_done(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(home: Path) -> None:
        (home / "metrics.json").write_text('{"model_id": "d2", "steps": 20}')

    def overtaken(path: Path) -> object:
        if folder.states("d2").home in path.parents:
            folder.commit_member("d2", commit, parent=None, facts={})
            folder.states("d2").drop()
        return last_row(path)

    monkeypatch.setattr(outcome, "last_row", overtaken)
    found = outcome.status(folder.path)
    assert [row["state"] for row in found] == ["done", "waiting"]


def test_a_settings_file_that_was_edited_under_way_is_noticed(folder: RunFolder) -> None:
    """Whoever is trained next would be trained otherwise, and every table would say all were."""

    def commit(home: Path) -> None:
        (home / "metrics.json").write_text('{"model_id": "d2", "steps": 20}')
        (home / outcome.FROZEN).write_text((folder.path / outcome.FROZEN).read_text())

    folder.commit_member("d2", commit, parent=None, facts={})
    as_it_was = outcome.frozen_settings(folder.path)
    assert outcome.trained_otherwise(folder.path, as_it_was) == []
    file = folder.path / outcome.FROZEN
    text = file.read_text()
    file.write_text(text.replace("save_every = 100", "save_every = 7"))  # changes no weight
    assert outcome.trained_otherwise(folder.path, outcome.frozen_settings(folder.path)) == []
    file.write_text(text.replace("seed = 0", "seed = 1"))
    edited = outcome.frozen_settings(folder.path)
    complaint = f"d2 was trained under other settings than {file} holds: family.seed: 0 -> 1"
    assert [p for p in read_run(folder.path).problems if "settings" in p] == [complaint]
    with pytest.raises(ConfigError, match=r"family.seed: 0 -> 1\. Put the file back"):
        check_folder(folder.path, edited, Host.installed(), restart=False)
    check_folder(folder.path, edited, Host.installed(), restart=True)


def test_a_folder_that_cannot_be_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    settings, host = resolve({}, {}), Host.installed()
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"cannot write to .*file is no directory; choose"):
            check_folder(out, settings, host, restart=False)
    check_folder(tmp_path / "a" / "new" / "run", settings, host, restart=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_may_not_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="may not be written to; choose another --out"):
        check_folder(tmp_path / "run", resolve({}, {}), Host.installed(), restart=False)
    tmp_path.chmod(0o700)


def test_a_record_that_holds_something_else_is_damaged(folder: RunFolder) -> None:
    for name in ("best.json", "control.json", ".arskit/plan.json", ".arskit/data.json"):
        folder.write_text(name, "[1]")
    run = read_run(folder.path)
    assert (run.best, run.control, run.plan, run.data) == (None, None, None, {})
    found = [problem for problem in run.problems if "it holds a list" in problem]
    assert len(found) == 4

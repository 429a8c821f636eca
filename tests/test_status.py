"""``arskit status``: how far a run is, from its folder alone, while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ars_kit import outcome
from ars_kit.cli import cli
from ars_kit.errors import IntegrityError
from ars_kit.history import last_row
from ars_kit.resolving import resolve
from ars_kit.settings import to_toml
from ars_kit.store import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run whose first member is in training."""
    made = RunFolder(tmp_path / "run")
    made.create()
    made.write_text(outcome.FROZEN, to_toml(resolve({"family.members": "d2..d3"}, {}, None)))
    made.states("d2").append([{"step": i, "loss": 3.0} for i in range(20)])
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

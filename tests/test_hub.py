"""Bases of the hub: a cache laid out as the hub's own client lays it out, and no network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import Quiet
from served import make_checkpoint

from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.hub import pinned, place_of
from ars_kit.models import load_base
from ars_kit.plan import plan_run
from ars_kit.resolving import read_toml, resolve
from ars_kit.runs import check_folder, execute
from ars_kit.settings import Settings

FIRST, SECOND = "a" * 40, "b" * 40
SMALL: dict[str, Any] = {
    "train.batch_size": 4, "data.sequence_length": 16, "train.iterations": (2, 2),
    "family.members": "d1",
}  # fmt: skip


class Hub:
    """What the hub's client has fetched of one model."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.files = home / "hub" / "models--acme--tiny"

    def publish(self, commit: str, checkpoint: Path) -> None:
        """Have a commit on the main branch."""
        shutil.copytree(checkpoint, self.files / "snapshots" / commit)
        (self.files / "refs").mkdir(exist_ok=True)
        (self.files / "refs" / "main").write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "home")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("published") / "tiny")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("acme/tiny", ("acme/tiny", "main")),
        ("acme/tiny@v1.0", ("acme/tiny", "v1.0")),
        ("acme/tiny@pr/7", ("acme/tiny", "pr/7")),
        ("acme/tiny@", ("acme/tiny@", "main")),
        ("@v1.0", ("@v1.0", "main")),
    ],
)
def test_a_revision_stands_behind_the_name(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place


def test_a_directory_may_have_an_at_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme" / "tiny@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert place_of("acme/tiny@v1") == ("acme/tiny@v1", "main")


def test_a_run_keeps_the_commit_that_it_began_with(
    hub: Hub, checkpoint: Path, text_folder: Path, cache: Path, tmp_path: Path
) -> None:
    hub.publish(FIRST, checkpoint)
    host, out = Host.installed(), tmp_path / "run"
    flags = {**SMALL, "family.base": "acme/tiny", "data.source": str(text_folder)}

    def go(settings: Settings) -> list[dict[str, Any]]:
        plan = plan_run(settings, host)
        check_folder(out, plan.settings, host, restart=False)
        return execute(plan, host, out, cache, watcher=Quiet())[0]

    (member,) = go(resolve(flags, {}))
    assert member["parent_model"] == f"acme/tiny@{FIRST}"
    assert read_toml(out / "run.toml")["family.base"] == f"acme/tiny@{FIRST}"

    frozen = [out / "run.toml", out / ".arskit" / "run.toml"]
    for file in frozen:  # as it was before commits were kept
        text = file.read_text("utf-8")
        assert text.count(f"@{FIRST}") == 1
        file.write_text(text.replace(f"@{FIRST}", ""), "utf-8")
    go(resolve(flags, {}))
    assert read_toml(out / "run.toml")["family.base"] == f"acme/tiny@{FIRST}"

    hub.publish(SECOND, checkpoint)
    with pytest.raises(ConfigError, match=f"acme/tiny@{FIRST}.*acme/tiny@{SECOND}.*--resume"):
        go(resolve(flags, {}))
    go(resolve({}, {}, frozen[0]))  # as --resume does
    go(resolve({**flags, "family.base": f"acme/tiny@{FIRST}"}, {}))


def test_the_weights_are_those_of_the_revision(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.publish(FIRST, checkpoint)
    other = tmp_path / "other"
    model = load_base(str(checkpoint))
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    shutil.copytree(checkpoint, other)
    model.save_pretrained(other)
    hub.publish(SECOND, other)
    for revision, empty in ((FIRST, False), (SECOND, True), ("main", True)):
        read = load_base(f"acme/tiny@{revision}").get_input_embeddings().weight
        assert bool((read == 0).all()) == empty


def test_a_revision_that_is_not_there_is_named(hub: Hub, checkpoint: Path) -> None:
    hub.publish(FIRST, checkpoint)
    with pytest.raises(ConfigError, match="cannot load base 'acme/tiny@v9': it is not in the c"):
        plan_run(resolve({"family.base": "acme/tiny@v9"}, {}), Host.installed())


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_what_is_a_path_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.hub

    monkeypatch.setattr(transformers.utils.hub, "cached_file", pytest.fail)
    assert pinned(name) == name

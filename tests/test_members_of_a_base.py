"""A pretrained base grows to the shapes of a file, or says in one line why it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ars_kit import inputs
from ars_kit.cli import cli
from ars_kit.errors import ArsKitError

Run = Callable[..., tuple[int, str, list[dict[str, Any]]]]

DEEPER_THEN_WIDER = """
[[member]]
name = "deeper"
num_hidden_layers = 3
tokens = 640
[[member]]
name = "wider"
num_hidden_layers = 3
hidden_size = 24
num_attention_heads = 3
num_key_value_heads = 3
"""
ALIKE = """
[[member]]
name = "first"
num_hidden_layers = 2
hidden_size = 16
head_dim = 8
[[member]]
name = "second"
num_hidden_layers = 2
tokens = 1280
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(home: Path, text_folder: Path, cache: Path) -> Run:
    """Run the command line in this process, and read the members' metrics."""

    def call(out: str, *options: str, shapes: str = "") -> tuple[int, str, list[dict[str, Any]]]:
        if shapes:
            (home / f"{out}.toml").write_text(shapes)
            options = ("--members", str(home / f"{out}.toml"), *options)
        common = [
            "--iterations", "4,4", "--sequence-length", "32", "--batch-size", "4",
            "--data", str(text_folder), "--out", str(home / out), "--json",
        ]  # fmt: skip
        env = {"ARSKIT_CACHE": str(cache)}
        done = CliRunner().invoke(cli, ["run", *common, *options], env=env)
        error = done.exception
        if isinstance(error, ArsKitError):
            return error.exit_code, str(error), []
        assert error is None, done.output
        return done.exit_code, "", json.loads(done.stdout)["members"]

    return call


@pytest.fixture(scope="module")
def base(run: Run, home: Path) -> Path:
    shape = ("--set", "family.aspect=6", "--set", "family.vocab_size=300")
    code, error, _ = run("root", "--members", "d2", *shape)
    assert (code, error) == (0, "")
    return home / "root" / "d2"


def test_a_base_grows_to_the_shapes_of_a_file(run: Run, home: Path, base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    grow = ("--base", str(base), "--depth", "grow")
    code, error, members = run("grown", *grow, shapes=DEEPER_THEN_WIDER)
    assert (code, error) == (0, "")
    deeper, wider = members
    assert (deeper["parent_model"], wider["parent_model"]) == (str(base), "deeper")
    assert (deeper["tokens"], wider["tokens"]) == (640, 4 * 4 * 32)
    for member in members:
        assert member["birth"]["preserves"] == "exact"
        assert member["birth"]["birth_logits_difference"] < 1e-4
    folder = home / "grown"
    shapes = [json.loads((folder / n / "config.json").read_text()) for n in ("deeper", "wider")]
    assert [c["num_hidden_layers"] for c in shapes] == [3, 3]
    assert [(c["hidden_size"], c["num_attention_heads"]) for c in shapes] == [(16, 2), (24, 3)]
    assert load_file(folder / "wider" / "model.safetensors")["model.norm.weight"].shape == (24,)
    assert (base / "model.safetensors").read_bytes() == before


def test_a_base_may_lie_where_it_has_the_name_of_a_member(
    run: Run, home: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a family's own member does, seen from its folder: it is no parent in the new one."""
    monkeypatch.chdir(base.parent)
    code, error, members = run("named", "--base", "d2", "--members", "d2,d3")
    assert (code, error) == (0, "")
    assert [m["parent_model"] for m in members] == ["./d2", "d2"]
    assert [m["parent_manifest"] is None for m in members] == [True, False]


def test_a_chain_of_fine_tunes_takes_names_and_tokens_from_a_file(
    run: Run, home: Path, base: Path
) -> None:
    code, error, members = run("alike", "--base", str(base), shapes=ALIKE)
    assert (code, error) == (0, "")
    assert [m["model_id"] for m in members] == ["first", "second"]
    assert [m["tokens"] for m in members] == [4 * 4 * 32, 1280]
    assert {m["birth"]["note"] for m in members} == {"chain of fine-tunes"}
    weights = [
        load_file(home / "alike" / n / "model.safetensors")["model.norm.weight"]
        for n in ("first", "second")
    ]
    assert not torch.equal(*weights)


def test_a_base_that_is_another_by_now_is_refused(
    run: Run, home: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copytree(base, home / "mine")
    weights = mine / "model.safetensors"
    options = ("heir", "--base", str(mine), "--members", "d2,d3")
    real, hashed = inputs.sha256, list[str]()
    monkeypatch.setattr(inputs, "sha256", lambda path: hashed.append(path.name) or real(path))
    assert run(*options)[0] == 0
    assert sorted(hashed) == ["config.json", "model.safetensors"]  # by threads
    hashed.clear()
    assert run(*options)[0] == 0
    assert not hashed
    os.utime(weights, (1, 1))  # as a copy of the same would have
    assert run(*options)[0] == 0
    assert hashed == ["model.safetensors"]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.rmtree(home / "heir" / "d3")
    code, error, _ = run(*options)
    assert (code, "\n" in error) == (3, False)
    assert re.fullmatch(
        r"model\.safetensors of the base '.*mine' has changed since this run began in .*heir; put "
        r"it back, or start anew with --restart",
        error,
    )
    assert not (home / "heir" / "d3").exists()
    weights.write_bytes(content)
    assert run(*options)[0] == 0
    weights.rename(mine / "model-00001-of-00001.safetensors")
    assert "model-00001-of-00001.safetensors of the base" in run(*options)[1]


@pytest.mark.parametrize(
    ("change", "depth", "message"),
    [
        (("", ""), "same", "deeper: it was given num_hidden_layers 3, and under --depth same"),
        (("num_hidden_layers = 3\ntokens", "num_hidden_layers = 1\ntokens"), "grow", "shrinks"),
        (("num_key_value_heads = 3", "num_key_value_heads = 2"), "grow", "3 is no multiple of"),
        (("hidden_size = 24\n", "head_dim = 12\n"), "grow", "no multiple of it"),
    ],
)
def test_shapes_that_a_base_cannot_have_are_refused(
    run: Run, home: Path, base: Path, change: tuple[str, str], depth: str, message: str
) -> None:
    shapes = DEEPER_THEN_WIDER.replace(*change) if change[0] else DEEPER_THEN_WIDER
    code, error, _ = run("refused", "--base", str(base), "--depth", depth, shapes=shapes)
    assert code == 3
    assert "\n" not in error
    assert re.search(message, error), error
    assert not (home / "refused").exists()

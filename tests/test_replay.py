"""Members with texts of their own, and a share of what their ancestors read, read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import Quiet, make_text
from safetensors.torch import load_file

from ars_kit.births import _windows
from ars_kit.cli import cli
from ars_kit.errors import ArsKitError, ConfigError, DataError
from ars_kit.evaluating import evaluate
from ars_kit.family import _judged
from ars_kit.host import Host
from ars_kit.judge import Judged
from ars_kit.members import placed
from ars_kit.plan import plan_run
from ars_kit.resolving import resolve
from ars_kit.roster import parse_roster, read_roster
from ars_kit.runs import execute
from ars_kit.schema import Choice
from ars_kit.states import States
from ars_kit.texts import open_texts
from ars_kit.tokenizer import load_fast
from ars_kit.tokens import Batches, Replayed

pytestmark = pytest.mark.usefixtures("undrawn")

LENGTH = 4


def batches(first: int, *, rank: int = 0, world: int = 1, start: int = 0) -> Batches:
    """Read tokens from ``first`` on, so that a token tells its text."""
    stream = np.arange(first, first + 400, dtype=np.uint16)
    return Batches(
        stream, sequence_length=LENGTH, batch_size=8, seed=0, rank=rank, world_size=world,
        start=start,
    )  # fmt: skip


def replayed(share: float, *, rank: int = 0, world: int = 1) -> Replayed:
    own = batches(0, rank=rank, world=world, start=5)
    old = [(batches(n, rank=rank, world=world), read) for n, read in ((1000, 3), (2000, 50))]
    return Replayed(own, old, share)


# --- Batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.125, 0.3, 0.5])
def test_the_share_is_even_and_one_s_own_text_is_read_without_a_gap(share: float) -> None:
    mixed = replayed(share)
    rows = np.concatenate([mixed.batch(step) for step in range(5)])
    old = rows[:, 0] >= 1000
    assert old.sum() == int(40 * share)
    counts = np.add.reduceat(old, range(0, 40, 8))
    assert counts.max() - counts.min() <= 1
    expected = np.concatenate([batches(0, start=5).batch(step) for step in range(5)])
    assert np.array_equal(rows[~old], expected[: (~old).sum()])


def test_old_texts_take_turns_and_give_nothing_that_was_not_read() -> None:
    mixed = replayed(0.5)
    rows = np.concatenate([mixed.batch(step) for step in range(5)])
    old = rows[rows[:, 0] >= 1000]
    assert [row[0] // 1000 for row in old[:4]] == [1, 2, 1, 2]
    first = np.concatenate([batches(1000).batch(0)])[:3]
    read = {tuple(row) for row in first}
    assert {tuple(row) for row in old if row[0] < 2000} == read


def test_processes_and_micro_batches_share_a_mixed_step() -> None:
    whole = replayed(0.3).batch(3)
    parts = [
        replayed(0.3, rank=rank, world=2).batch(3, micro, 2) for rank in (0, 1) for micro in (0, 1)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


# --- The plan ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.installed()


LINE = (
    "a:num_hidden_layers=1,hidden_size=8; b:num_hidden_layers=2,hidden_size=8,data=other; "
    "c:num_hidden_layers=2,hidden_size=8"
)
SIZES = {"data.sequence_length": "32", "train.batch_size": "4", "train.iterations": "2,1"}


def test_a_text_is_gone_on_with_where_the_lineage_stopped_in_it() -> None:
    settings = resolve({"family.members": LINE, "data.source": "main", **SIZES}, {})
    a, b, c = plan_run(settings, Host.installed()).members
    assert [(m.data, m.start, m.before) for m in (a, b, c)] == [
        ("main", 0, ()),
        ("other", 0, (("main", 6 * 4),)),
        ("main", 6 * 4, (("other", 3 * 4),)),
    ]
    trunk = resolve(
        {"family.members": LINE, "data.source": "main", "family.strategy": "trunk", **SIZES}, {}
    )
    a, b, _ = plan_run(trunk, Host.installed()).members
    assert a.branch is not None
    assert b.before == (("main", a.branch * 4),)


def test_an_heir_goes_on_behind_what_was_really_read(host: Host) -> None:
    """Batches that were passed over are behind it too; what was read again took no new text."""
    flags = {"family.members": LINE, "data.source": "main", "family.strategy": "trunk", **SIZES}
    family = plan_run(resolve(flags, {}), host).members
    assert (family[0].branch, family[1].branch) == (5, 3)
    known: dict[str, Any] = {
        # The second time it was already cooling: the trunk knows nothing of it.
        "a": {
            "rollbacks": [{"batches": 7, "back_to": 4}, {"batches": 9, "back_to": 5}],
            "birth": {},
        },
        "b": {"rollbacks": [], "birth": {"replay": 0.3}},
    }
    found = [placed(m, family, 4, known.__getitem__) for m in family]
    assert [(m.start, m.before) for m in found] == [
        (0, ()),
        (0, (("main", (5 + 7) * 4),)),
        ((5 + 7) * 4, (("other", 3 * 4 - 3),)),  # 3 of 12 were read again
    ]
    chain = plan_run(resolve({**flags, "family.strategy": "replay"}, {}), host).members
    found = [placed(m, chain, 4, known.__getitem__) for m in chain]
    assert found[1].before == (("main", (6 + 7 + 9) * 4),)
    assert found[0] is chain[0]


def test_what_is_measured_at_birth_is_measured_on_what_the_parent_read() -> None:
    settings = resolve({"family.members": LINE, "data.source": "main", **SIZES}, {})
    plan = plan_run(settings, Host.installed())
    texts = {
        name: SimpleNamespace(train=np.arange(first, first + 2000))
        for name, first in (("main", 0), ("other", 10_000))
    }
    cradle: Any = SimpleNamespace(plan=plan, texts=texts)
    seen = [int(_windows(cradle, member, 2).min()) for member in plan.members]
    assert [n >= 10_000 for n in seen] == [False, False, True]


def test_a_member_s_own_text_is_judged_by_the_run_s_own_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses of different strides are not to be read side by side."""
    asked = []

    def judging(*_: Any, choices: Any = None) -> Judged:
        asked.append(choices)
        return Judged({"heldout_loss": 1.0}, by={"heldout_loss": "perplexity"})

    monkeypatch.setattr("ars_kit.family.judge", judging)
    settings = resolve({"run.evaluators": "bleu,perplexity:stride=8"}, {})
    family: Any = SimpleNamespace(
        host=None, plan=SimpleNamespace(settings=settings), corpus="main", texts={"b": "other"}
    )
    member: Any = SimpleNamespace(name="d3", data="b")
    found = _judged(family, member, SimpleNamespace())  # type: ignore[arg-type]
    assert found.figures == {"heldout_loss": 1.0, "own_heldout_loss": 1.0}
    assert found.by.keys() == found.figures.keys()
    assert asked == [None, [Choice("perplexity", {"stride": "8"})]]


def test_a_text_stands_in_the_one_line_form(tmp_path: Path) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text('[[member]]\nname = "a"\nnum_hidden_layers = 2\ndata = "hf:owner/name"\n')
    line = read_roster(path)
    (member,) = parse_roster(line)
    assert member.data == "hf:owner/name"
    assert str(member) == line
    assert "data" not in member.shape()


@pytest.mark.parametrize("data", ['"a,b"', '"a;b"', '""', "3"])
def test_a_text_that_one_line_cannot_hold_is_refused(tmp_path: Path, data: str) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(f'[[member]]\nname = "a"\nnum_hidden_layers = 2\ndata = {data}\n')
    with pytest.raises(ConfigError, match="member 'a': data must be a path") as caught:
        read_roster(path)
    assert "\n" not in str(caught.value)


# --- Runs --------------------------------------------------------------------------------------

SHAPES = """
[[member]]
name = "first"
num_hidden_layers = 2
[[member]]
name = "second"
num_hidden_layers = 3
data = "{other}"
"""
Run = Callable[..., tuple[Path, dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text that is unlike the family's."""
    folder = tmp_path_factory.mktemp("other")
    for i in range(30):
        text = "\n".join(f"{i * j % 97} <|endoftext|> ZYX {j:05}" for j in range(120))
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, text_folder: Path, other: Path, cache: Path
) -> Run:
    home = tmp_path_factory.mktemp("replay")
    (home / "shapes.toml").write_text(SHAPES.format(other=other))

    def call(strategy: str, out: str = "") -> tuple[Path, dict[str, dict[str, Any]]]:
        folder = home / (out or strategy.partition(":")[0])
        command = [
            "run", "--members", str(home / "shapes.toml"), "--strategy", strategy,
            "--iterations", "20,20", "--data", str(text_folder), "--sequence-length", "32",
            "--batch-size", "4", "--set", "family.vocab_size=300", "--set", "family.aspect=6",
            "--set", "run.save_every=20", "--out", str(folder),
        ]  # fmt: skip
        done = CliRunner().invoke(cli, command, env={"ARSKIT_CACHE": str(cache)})
        if done.exception is not None:
            raise done.exception
        names = ("first", "second")
        return folder, {n: json.loads((folder / n / "metrics.json").read_text()) for n in names}

    return call


@pytest.fixture(scope="module")
def runs(run: Run) -> dict[str, tuple[Path, dict[str, dict[str, Any]]]]:
    return {name: run(name) for name in ("progressive", "replay:share=0.5")}


def test_each_member_reads_its_text_and_all_are_judged_on_the_run_s(
    runs: Any, text_folder: Path, other: Path
) -> None:
    _, members = runs["progressive"]
    first, second = members["first"], members["second"]
    assert (first["data"], second["data"]) == (str(text_folder), str(other))
    assert first["data_hash"] != second["data_hash"]
    assert first["tokenizer_hash"] == second["tokenizer_hash"]
    assert "own_heldout_loss" not in first
    # It left the family's text behind, and learned its own.
    assert second["heldout_loss"] > first["heldout_loss"]
    assert second["own_heldout_loss"] < second["heldout_loss"]


def test_text_that_spells_the_separator_is_text_in_every_text(
    runs: Any, cache: Path, text_folder: Path, other: Path
) -> None:
    settings = resolve({}, {}, runs["progressive"][0] / "run.toml")
    texts = open_texts(settings, Host.installed(), cache)
    assert list(texts) == [str(text_folder), str(other)]
    for corpus in texts.values():
        ends = int((corpus.train == 0).sum() + (corpus.heldout == 0).sum())
        assert 0 < ends <= 2 * corpus.facts.documents  # twice where documents are divided


def test_a_text_that_holds_documents_of_the_runs_is_divided_like_it(
    tmp_path: Path, cache: Path
) -> None:
    """A run on a few documents, by span, of which a member's many are some, by document."""
    many, few = tmp_path / "many.jsonl", tmp_path / "few.jsonl"
    documents = make_text(200)
    many.write_text("".join(json.dumps(text) + "\n" for text in documents), encoding="utf-8")
    few.write_text("".join(json.dumps(text) + "\n" for text in documents[:6]), encoding="utf-8")
    flags = {
        "family.members": f"a:num_hidden_layers=2; b:num_hidden_layers=2,data={many}",
        "family.vocab_size": 300, "train.iterations": (2, 2), "train.batch_size": 4,
        "data.source": str(few), "data.sequence_length": 32,
    }  # fmt: skip
    settings, host = resolve(flags, {}), Host.installed()
    texts = open_texts(settings, host, cache)
    assert [c.facts.split for c in texts.values()] == ["spans", "documents"]
    core = load_fast(texts[str(few)].tokenizer_dir)
    heldout, train = (
        core.decode(list(s)) for s in (texts[str(few)].heldout, texts[str(many)].train)
    )
    lines = heldout.split("\n")[1:-1]
    assert len(lines) > 10
    assert not [line for line in lines if len(line) > 30 and line in train]
    out = tmp_path / "out"
    metrics, _ = execute(plan_run(settings, host), host, out, cache, watcher=Quiet())
    (found,) = evaluate(
        ["b"], host, out, cache, {"data.source": str(many)}, watcher=Silent(), fresh=True
    )
    assert found["heldout_loss"] == pytest.approx(metrics[1]["own_heldout_loss"], abs=1e-6)


@pytest.mark.parametrize(("text", "why"), [("a\n", "too little text"), (" \n", "holds no text")])
def test_a_member_s_text_that_is_too_little_is_named(
    tmp_path: Path, text_folder: Path, cache: Path, text: str, why: str
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text)
    flags = {
        "family.members": f"a:num_hidden_layers=2; b:num_hidden_layers=2,data={own}",
        "family.vocab_size": 300, "data.source": str(text_folder), "data.sequence_length": 32,
    }  # fmt: skip
    with pytest.raises(DataError, match=f"own.txt, the text of a member: .*{why}"):
        open_texts(resolve(flags, {}), Host.installed(), cache)


class Silent:
    """Hears of a judging, and says nothing."""

    def preparing(self, stage: str, count: int) -> None: ...

    def judging(self, model: str, evaluator: str) -> None: ...

    def share(self, done: float) -> None: ...

    def judged(self, model: str, evaluator: str, *, cached: bool) -> None: ...

    def unkept(self, reason: str) -> None: ...


def test_replay_keeps_what_a_shift_would_lose(runs: Any) -> None:
    _, plain = runs["progressive"]
    _, again = runs["replay:share=0.5"]
    assert plain["first"]["heldout_loss"] == again["first"]["heldout_loss"]
    assert again["second"]["heldout_loss"] < plain["second"]["heldout_loss"] - 0.1
    assert [m["birth"].get("replay", 0.0) for m in again.values()] == [0.0, 0.5]
    assert plain["second"]["birth"]["replay"] == 0.0
    assert again["second"]["flops"] == plain["second"]["flops"]


def test_an_heir_reads_what_its_parent_left_to_a_replay(
    host: Host,
    text_folder: Path,
    other: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three members the last reads on in the second's text, of which half was read again."""
    shape = "num_hidden_layers=1,hidden_size=8"
    line = f"a:{shape}; b:{shape},data={other}; c:{shape},data={other}"
    flags = {
        "family.members": line, "data.source": str(text_folder), "family.vocab_size": 300,
        "family.strategy": "replay:share=0.5", "data.heldout_tokens": 64, **SIZES,
    }  # fmt: skip
    starts = []

    def reading(*args: Any, **rest: Any) -> Batches:
        starts.append(rest["start"])
        return Batches(*args, **rest)

    monkeypatch.setattr("ars_kit.readying.Batches", reading)
    plan = plan_run(resolve(flags, {}), host)
    execute(plan, host, tmp_path / "run", cache, watcher=Quiet())
    assert [m.start for m in plan.members] == [0, 0, 3 * 4]
    # Each of its own text, then of the old one.
    assert starts == [0, 0, 0, 3 * 4 - 6, 0]


def test_a_replay_that_was_cut_off_goes_on_exactly(
    run: Run, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = States.save, []

    def failing(self: States, *args: Any, **rest: Any) -> None:
        save(self, *args, **rest)
        saved.append(self.member)
        if saved.count("second") == 1 and self.member == "second":
            raise ZeroDivisionError("power cut")

    monkeypatch.setattr(States, "save", failing)
    with pytest.raises(ZeroDivisionError):
        run("replay:share=0.5", "cut")
    folder, _ = run("replay:share=0.5", "cut")
    whole, _ = runs["replay:share=0.5"]
    one, two = (load_file(f / "second" / "model.safetensors") for f in (whole, folder))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_member_s_text_that_changed_is_named(run: Run, runs: Any, other: Path) -> None:
    (other / "new.txt").write_text("More of the same, and then some.\n" * 40)
    with pytest.raises(ArsKitError, match="has changed since this run began") as caught:
        run("progressive")
    assert str(other) in str(caught.value)
    (other / "new.txt").unlink()

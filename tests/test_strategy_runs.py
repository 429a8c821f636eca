"""Every strategy through ``arskit run``: small real families, their cost and their crashes."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ars_kit.cli import cli
from ars_kit.errors import ArsKitError
from ars_kit.host import Host, Plugin
from ars_kit.lineage import lineage_text, read_lineage, verify
from ars_kit.models import flops_per_token, load_member, logits_difference
from ars_kit.records import read_run
from ars_kit.schedule import stable_steps
from ars_kit.spec import Block, Descent, Lesson, Offer, hookimpl
from ars_kit.states import States
from ars_kit.store import RunFolder

QUICK = {"ewc": "ewc:sequences=4"}
STRATEGIES = [QUICK.get(s, s) for s in sorted(Host.installed().shelves["strategies"])]
TOKENS = 32 * 4
"""A step's."""

MEMBERS = """
[[member]]
name = "a"
num_hidden_layers = 2
hidden_size = 16
[[member]]
name = "b"
num_hidden_layers = 3
hidden_size = 24
[[member]]
name = "c"
num_hidden_layers = 3
hidden_size = 24
"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    out: Path
    exit_code: int
    message: str
    members: dict[str, dict[str, Any]]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.out / name / "model.safetensors")

    def same_weights(self, other: Outcome) -> bool:
        return all(
            torch.equal(tensor, other.weights(name)[key])
            for name in self.members
            for key, tensor in self.weights(name).items()
        )


Run = Callable[..., Outcome]
Families = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def options(
    tmp_path_factory: pytest.TempPathFactory, text_folder: Path
) -> Callable[..., list[str]]:
    """Return the command that trains a strategy's family of three in a second."""
    shapes = tmp_path_factory.mktemp("shapes") / "members.toml"
    shapes.write_text(MEMBERS)

    def command(strategy: str) -> list[str]:
        members = str(shapes) if strategy.startswith("soup") else "d2..d4"
        return [
            "run", "--members", members, "--strategy", strategy, "--iterations", "6,4",
            "--data", str(text_folder), "--sequence-length", "32", "--batch-size", "4",
            "--set", "family.vocab_size=300", "--set", "family.aspect=6",
            "--set", "data.heldout_tokens=512", "--set", "run.save_every=5",
        ]  # fmt: skip

    return command


def called(folder: Path, command: Sequence[str]) -> Outcome:
    """Run the command line in this process."""
    done = CliRunner().invoke(cli, [*command, "--out", str(folder)])
    error = done.exception
    if error is not None and not isinstance(error, ArsKitError):
        raise error
    names = RunFolder(folder).members() if folder.exists() else []
    return Outcome(
        folder,
        error.exit_code if error else done.exit_code,
        str(error or ""),
        {n: json.loads((folder / n / "metrics.json").read_text()) for n in names},
    )


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, options: Callable[..., list[str]], cache: Path
) -> Families:
    """Return a strategy's family, trained once for all who only read it."""
    home = tmp_path_factory.mktemp("families")

    @functools.cache
    def trained(strategy: str) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ARSKIT_CACHE", str(cache))
            return called(home / strategy.partition(":")[0], options(strategy))

    return trained


@pytest.fixture
def run(
    tmp_path: Path,
    options: Callable[..., list[str]],
    cache: Path,
    undrawn: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Train a family in this process."""
    monkeypatch.setenv("ARSKIT_CACHE", str(cache))

    def call(strategy: str, *extra: str, out: str = "out") -> Outcome:
        return called(tmp_path / out, [*options(strategy), *extra])

    return call


def offer(monkeypatch: pytest.MonkeyPatch, **makers: Any) -> None:
    """Let the command line find strategies of a test."""
    host = Host.installed()
    offers = [Offer(name, "for a test", make) for name, make in makers.items()]
    module: Any = type("M", (), {"arskit_strategies": staticmethod(hookimpl(lambda: offers))})
    host.register(module, Plugin("test", "arskit-test", "1"))
    assert not host.quarantined
    monkeypatch.setattr("ars_kit.cli.training.make_host", lambda: host)


def progressive() -> Any:
    return Host.installed().listing("strategies", "progressive").offer.make()


class Wrapped:
    """The default strategy, of which a test changes one thing."""

    inherits = True

    def __init__(self) -> None:
        self.inner = progressive()

    def supports(self, parent: Any, child: Any) -> str | None:
        return self.inner.supports(parent, child)  # type: ignore[no-any-return]

    def inherit(self, parent: Any, birth: Any) -> Any:
        return self.inner.inherit(parent, birth)


# --- Every strategy ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_family_trains_and_its_cost_adds_up(families: Families, strategy: str) -> None:
    done = families(strategy)
    assert done.exit_code == 0, done.message
    assert CliRunner().invoke(cli, ["verify", "--out", str(done.out)]).exit_code == 0
    spent = 0.0
    for name, m in done.members.items():
        assert m["heldout_loss"] < 5.0 < torch.tensor(300.0).log().item(), name
        assert m["total_flops"] == m["flops"] + m["setup_flops"] + m["loss_flops"]
        config = load_member(done.out / name).config
        assert m["flops"] == flops_per_token(config, 32) * m["tokens"]
        assert m["tokens"] == m["steps"] * TOKENS
        before = done.members.get(m["parent_model"], {"lineage_flops": 0.0, "lineage_tokens": 0})
        if strategy != "trunk":
            assert m["lineage_flops"] == before["lineage_flops"] + m["total_flops"]
            assert m["lineage_tokens"] == before["lineage_tokens"] + m["tokens"]
        if m["parent_model"]:
            assert m["birth"]["note"]
        spent += m["total_flops"]
    report = (done.out / "report.md").read_text()
    assert f"{spent:.3g} FLOPs" in report
    notes = {m["birth"]["note"] for m in done.members.values() if m["birth"].get("note")}
    assert all(note in report for note in notes)
    assert not list((done.out / ".arskit" / "state").iterdir())


SLICE = ("progressive", "prune", "soup", "trunk")
"""A chain, its reverse, one that makes a member at the end, one with two states of a member."""
CRASHED = [s if s in SLICE else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES]


@pytest.mark.parametrize("strategy", CRASHED)
def test_a_crash_changes_nothing(
    families: Families, run: Run, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is cut off at its fourth and again at its tenth saving, and goes on each time."""
    whole = families(strategy)
    save, saved = States.save, []

    def failing(self: States, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        saved.append(1)
        if len(saved) in (4, 10):
            raise ZeroDivisionError("power cut")

    monkeypatch.setattr(States, "save", failing)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run(strategy, out="cut")
    cut = run(strategy, out="cut")
    assert cut.exit_code == 0, cut.message
    assert list(cut.members) == list(whole.members)
    assert whole.same_weights(cut)
    for name, m in cut.members.items():
        assert m["loss_flops"] == pytest.approx(whole.members[name]["loss_flops"])
        assert m["lineage_flops"] == pytest.approx(whole.members[name]["lineage_flops"])


@pytest.mark.parametrize("strategy", ["progressive", "trunk", "prune", "duplicate"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_other_architectures_inherit_too(run: Run, strategy: str, architecture: str) -> None:
    done = run(strategy, "--set", f"family.architecture={architecture}", "--iterations", "2,1")
    assert done.exit_code == 0, done.message
    config = json.loads((done.out / "d4" / "config.json").read_text())
    assert config["model_type"] == architecture
    for m in done.members.values():
        if m["birth"].get("preserves") == "exact":
            assert m["birth"]["birth_logits_difference"] < 1e-4


# --- Who descends from whom --------------------------------------------------------------------


def test_a_jump_grows_every_member_from_the_first(families: Families, run: Run) -> None:
    jump, chain = run("jump:last_decay_fraction=none"), families("progressive")
    assert [m["parent_model"] for m in jump.members.values()] == [None, "d2", "d2"]
    # The second member is the same in both; the third read less text before its birth.
    again = chain.weights("d3")
    assert all(torch.equal(t, again[k]) for k, t in jump.weights("d3").items())
    first, third = jump.members["d2"], jump.members["d4"]
    assert third["lineage_flops"] == first["total_flops"] + third["total_flops"]


def test_a_trunk_is_left_before_it_cools(families: Families) -> None:
    done = families("trunk")
    assert [m["parent_model"] for m in done.members.values()] == [None, "d2", "d3"]
    first, second = done.members["d2"], done.members["d3"]
    stable = stable_steps(18, 0.3)
    assert second["birth"]["phase"] == "stable"
    assert second["lineage_tokens"] == stable * TOKENS + second["tokens"]
    expected = first["flops"] * stable / 18 + second["total_flops"]
    assert second["lineage_flops"] == pytest.approx(expected)
    # An heir goes on at the learning rate of the trunk: its first step is as large as any.
    history = (done.out / "d3" / "history.jsonl").read_text().splitlines()
    assert len(history) == 12


def test_a_trunk_s_heir_begins_as_its_parent_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ars_kit import dealing

    seen: dict[str, Any] = {}
    bear = dealing.bear

    def watching(cradle: Any, member: Any) -> Any:
        if member.name == "d3":
            seen["state"] = cradle.folder.states("d2.stable").load()
        born = bear(cradle, member)
        seen[member.name] = born
        return born

    monkeypatch.setattr(dealing, "bear", watching)
    done = run("trunk")
    step, tree = seen["state"]
    assert step == stable_steps(18, 0.3)
    cooled = load_member(done.out / "d2")
    parent, tokens = seen["d3"].parent, torch.arange(32)[None]
    assert all(torch.equal(tree["weights"][n], p) for n, p in parent.named_parameters())
    assert logits_difference(parent, cooled, tokens) > 1e-3
    assert seen["d3"].facts["birth_logits_difference"] < 1e-4


def test_a_trunk_needs_a_stable_phase(run: Run) -> None:
    done = run("trunk", "--schedule", "cosine")
    assert done.exit_code == 3
    assert "only train.schedule = wsd tells; it is cosine" in done.message


def test_pruning_trains_the_largest_first(families: Families) -> None:
    done = families("prune")
    assert list(done.members) == ["d4", "d3", "d2"]
    assert [m["parent_model"] for m in done.members.values()] == [None, "d4", "d3"]
    assert [m["steps"] for m in done.members.values()] == [18, 12, 12]
    assert all(m["loss_flops"] > 0 for n, m in done.members.items() if n != "d4")
    record = read_run(done.out)
    assert [m.name for m in record.members] == ["d2", "d3", "d4"]
    assert [m.name for m in record.by_birth] == ["d4", "d3", "d2"]
    lines = (done.out / "report.md").read_text(encoding="utf-8")
    assert re.search(r"cumulative FLOPs: d4 ends at [\d.]+; d3 ends at [\d.]+; d2 ends", lines)


def test_a_soup_is_the_average_of_the_last_of_one_shape(
    families: Families, run: Run, tmp_path: Path
) -> None:
    done = families("soup")
    b, c, soup = (done.weights(name) for name in ("b", "c", "soup"))
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (b[name] + c[name]) / 2)
    facts = done.members["soup"]
    assert facts["birth"]["sources"] == ["b", "c"]
    assert facts["steps"] == 0
    total = sum(done.members[n]["total_flops"] for n in "abc")
    assert facts["lineage_flops"] == pytest.approx(total)
    before = (done.out / "soup" / "metrics.json").read_bytes()
    shutil.copytree(done.out, tmp_path / "out")
    again = run("soup")
    assert again.exit_code == 0, again.message
    assert (again.out / "soup" / "metrics.json").read_bytes() == before


def test_a_soup_of_different_shapes_is_refused(run: Run) -> None:
    done = run("soup", "--members", "d2..d4")
    assert done.exit_code == 3
    assert "no two at the end of this family have one" in done.message


def test_a_soup_that_a_kill_kept_out_of_the_lineage_enters_it(
    families: Families, run: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(families("soup").out, tmp_path / "out")
    entries = read_lineage(out)
    assert [e.member for e in entries] == ["a", "b", "c", "soup"]
    (out / "lineage.json").write_text(lineage_text(entries[:-1]), encoding="utf-8")
    assert run("soup").exit_code == 0
    assert read_lineage(out) == entries
    assert verify(out) == (["a", "b", "c", "soup"], [])


def test_a_member_called_like_the_soup_is_refused_before_anything_trains(run: Run) -> None:
    done = run("soup", "--members", "soup:num_hidden_layers=2; b:num_hidden_layers=2")
    assert done.exit_code == 3
    assert "member 'soup' has the name of what strategy 'soup' makes" in done.message
    assert not done.members


def test_what_cannot_be_repeated_is_refused_before_anything_trains(run: Run) -> None:
    done = run("prune", "--set", "family.architecture=gpt2")
    assert done.exit_code == 3
    assert "'gpt2' is not one that grows exactly: growth knows" in done.message
    assert not done.members


# --- What a loss costs -------------------------------------------------------------------------


def test_a_teacher_s_passes_are_counted(run: Run) -> None:
    done = run("distill", "--accumulation", "2")
    for name, m in done.members.items():
        if m["parent_model"]:
            parent = load_member(done.out / m["parent_model"]).config
            assert m["loss_flops"] == flops_per_token(parent, 32) / 3 * m["tokens"], name
    assert done.members["d2"]["loss_flops"] == 0


def test_the_plan_foresees_the_teacher(families: Families, text_folder: Path) -> None:
    done = families("distill")
    command = ["plan", "--members", "d2..d4", "--iterations", "6,4", "--data", str(text_folder),
               "--sequence-length", "32", "--batch-size", "4", "--set", "family.vocab_size=300",
               "--set", "family.aspect=6", "--strategy", "distill", "--json"]  # fmt: skip
    foreseen = json.loads(CliRunner().invoke(cli, command).stdout)
    spent = sum(m["total_flops"] for m in done.members.values())
    assert foreseen["flops"] == pytest.approx(spent)


def test_the_fisher_pass_is_counted(families: Families) -> None:
    done = families(QUICK["ewc"])
    for m in done.members.values():
        if m["parent_model"]:
            parent = load_member(done.out / m["parent_model"]).config
            passes = flops_per_token(parent, 32) * 4 * 32
            # torch's attention computes its scores again in the backward pass; the rest are SVDs.
            assert passes < m["setup_flops"] < 2 * passes


def test_the_history_shows_the_cross_entropy_whatever_is_minimised(families: Families) -> None:
    first = [
        json.loads((out / "d3" / "history.jsonl").read_text().splitlines()[0])["loss"]
        for out in (families("progressive").out, families("distill").out)
    ]
    assert first[0] == first[1]


# --- Promises ----------------------------------------------------------------------------------


class Liar(Wrapped):
    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        weights = {name: seed.weights[name] for name in seed.weights}
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
        return replace(seed, weights=weights)


def test_a_promise_that_is_not_kept_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, liar=Liar)
    done = run("liar", "--iterations", "1,1")
    assert done.exit_code == 4
    assert "(arskit-test 1) promised that d3 computes what d2 does" in done.message
    found = re.search(r"a logit differs by (\S+) \(allowed: (\S+)\)", done.message)
    assert found
    difference, allowed = map(float, found.groups())
    assert difference > allowed > 0
    assert list(done.members) == ["d2"]


def broken(**changes: Any) -> type[Wrapped]:
    class Broken(Wrapped):
        def inherit(self, parent: Any, birth: Any) -> Any:
            return replace(super().inherit(parent, birth), **changes)

    return Broken


def fails(*_: Any) -> Any:
    raise KeyError("x")


def leaves(*_: Any) -> Any:
    sys.exit(9)


class Raises(Wrapped):
    def inherit(self, parent: Any, birth: Any) -> Any:
        raise KeyError(birth.name)


class HalfBorn(Wrapped):
    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        return replace(seed, weights={n: seed.weights[n] for n in list(seed.weights)[1:]})


class NoSeed(Wrapped):
    def inherit(self, parent: Any, birth: Any) -> Any:
        return super().inherit(parent, birth).weights


class Backwards(Wrapped):
    def descents(self, configs: Any) -> Any:
        return [Descent(1, 0), Descent(0, None), Descent(2, 1)]


class Forgets(Wrapped):
    def descents(self, configs: Any) -> Any:
        return [Descent(0, None)]


class MovesTheDecay(Wrapped):
    def descents(self, configs: Any) -> Any:
        return [Descent(0, None), Descent(1, 0), Descent(2, 1, phase="stable")]

    def inherit(self, parent: Any, birth: Any) -> Any:
        return replace(super().inherit(parent, birth), decay_fraction=0.5)


class SaysYes(Wrapped):
    def supports(self, parent: Any, child: Any) -> Any:
        return True


class Astray(Wrapped):
    """Says of every tensor that it came from a place beyond its end."""

    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        beyond = tuple((0, 10**6, 1) for _ in birth.fresh["model.norm.weight"].shape)
        name = "model.norm.weight"
        far = Block(name, ((0, 2, 1),), beyond)
        return replace(seed, opt_state="derive", provenance={**seed.provenance, name: [far]})


class Unnamed(Wrapped):
    def inherit(self, parent: Any, birth: Any) -> Any:
        seed = super().inherit(parent, birth)
        (block,) = seed.provenance["model.norm.weight"]
        told = {**seed.provenance, "model.gone.weight": [block]}
        return replace(seed, opt_state="derive", provenance=told)


class NoBlend(Wrapped):
    def finish(self, members: Any) -> Any:
        return [members[-1].weights]


class Renames(Wrapped):
    def finish(self, members: Any) -> Any:
        from ars_kit.spec import Blend

        last = members[-1]
        return [Blend("d2", last.config, last.weights, (last.name,))]


class Twice(Wrapped):
    def finish(self, members: Any) -> Any:
        from ars_kit.spec import Blend

        last = members[-1]
        return [Blend("mix", last.config, last.weights, (last.name,))] * 2


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Raises, "failed at the birth of d3: KeyError('d3')"),
        (HalfBorn, "bore a bad d3: weights do not fit: missing ['model.embed_tokens.weight']"),
        (NoSeed, "bore a LazyWeights, no Seed"),
        (Backwards, "bears member 1 before its parent 0"),
        (Forgets, "bears members [0] of a family of 3"),
        (MovesTheDecay, "moved the decay of d3"),
        (SaysYes, "supports must return None, or the reason in words, not True"),
        (Astray, "(arskit-test 1) failed in what its seed says of d3: RuntimeError"),
        (Unnamed, "(arskit-test 1) failed in what its seed says of d3: KeyError"),
        (broken(hints=None), "(arskit-test 1) failed in what its seed says of d3: AttributeError"),
        (NoBlend, "(arskit-test 1) finished with a LazyWeights, no Blend"),
        (Renames, "cannot make 'd2' of d4"),
        (Twice, "cannot make 'mix' of d4: there are d2, d3, d4, mix"),
        (broken(decay_fraction=-1.0), "bore d3 against the rules: a seed's decay_fraction must be"),
        (broken(hints={"nowhere": None}), "gave a hint about nowhere, which d3 has not"),
        (broken(loss=fails), "its loss failed at step 0: KeyError('x')"),
        (broken(loss=lambda lesson: 1.0), "must return a 0-d tensor; at step 0 it is float"),
        (broken(loss=lambda lesson: lesson.logits), "it is torch.Size([4, 32, 300])"),
        (broken(loss=leaves), "its loss failed at step 0: SystemExit(9)"),
        (broken(on_step=leaves), "its on_step failed at step 0: SystemExit(9)"),
        (broken(on_step=fails), "its on_step failed at step 0: KeyError('x')"),
    ],
)
def test_a_strategy_that_breaks_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, strategy: type[Wrapped], message: str
) -> None:
    offer(monkeypatch, broken=strategy)
    done = run("broken", "--iterations", "1,1")
    assert (done.exit_code, message in done.message) == (4, True), done.message


# --- What a seed may ask for -------------------------------------------------------------------


def test_a_loss_of_one_s_own_is_minimised_and_paid_for(
    families: Families, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = families("progressive")

    def loss(lesson: Lesson) -> Any:
        weight = lesson.weights["model.layers.0.mlp.up_proj.weight"]
        assert lesson.teacher is None
        return lesson.loss + 1e3 * (weight @ weight.T).square().mean()

    offer(monkeypatch, shrinks=broken(loss=loss))
    done = run("shrinks")
    m = done.members["d3"]
    width = load_member(done.out / "d3").config.hidden_size
    assert m["loss_flops"] == 3 * 2 * (3 * width) ** 2 * width * m["steps"]
    sizes = [
        float(o.weights("d3")["model.layers.0.mlp.up_proj.weight"].norm()) for o in (plain, done)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_on_step_changes_weights_after_each_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def on_step(done: int, weights: Mapping[str, torch.Tensor]) -> None:
        seen.append(done)
        weights["model.norm.weight"].fill_(0.5)

    offer(monkeypatch, fills=broken(on_step=on_step))
    done = run("fills", "--members", "d2,d3")
    assert seen == list(range(1, 13))
    assert (done.weights("d3")["model.norm.weight"] == 0.5).all()


def test_hints_hold_tensors_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ars_kit.spec import Hint

    name = "model.layers.0.mlp.up_proj.weight"
    births: dict[str, torch.Tensor] = {}
    states: dict[int, torch.Tensor] = {}

    class Freezes(Wrapped):
        def inherit(self, parent: Any, birth: Any) -> Any:
            seed = super().inherit(parent, birth)
            births[name] = seed.weights[name]
            return replace(seed, hints={name: Hint(frozen_until=5)})

    save = States.save

    def watching(self: States, tree: Any, **rest: Any) -> None:
        if self.member == "d3":
            states[rest["step"]] = tree["weights"][name].clone()
        save(self, tree, **rest)

    monkeypatch.setattr(States, "save", watching)
    offer(monkeypatch, freezes=Freezes)
    assert run("freezes", "--members", "d2,d3").exit_code == 0
    assert torch.equal(states[5], births[name])
    assert not torch.equal(states[10], births[name])


def test_new_blocks_may_learn_faster(families: Families, run: Run) -> None:
    slow, fast = families("progressive"), run("progressive:new_lr=4,new_decay_from=5")
    assert fast.exit_code == 0, fast.message
    assert not slow.same_weights(fast)
    assert fast.members["d4"]["birth"]["birth_logits_difference"] < 1e-4


def test_the_last_member_alone_may_cool_otherwise(families: Families, run: Run) -> None:
    cooled, plain = families("progressive"), run("progressive:last_decay_fraction=none")
    assert plain.exit_code == 0, plain.message
    shares = [[m["decay_fraction"] for m in r.members.values()] for r in (plain, cooled)]
    assert shares == [[0.3, 0.3, 0.3], [0.3, 0.3, 1.0]]
    first, last = list(plain.members)[:-1], list(plain.members)[-1]
    for name in first:
        assert all(torch.equal(t, cooled.weights(name)[k]) for k, t in plain.weights(name).items())
    assert not torch.equal(
        plain.weights(last)["model.norm.weight"], cooled.weights(last)["model.norm.weight"]
    )

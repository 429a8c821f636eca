"""The gate ``skip``: it leaves out what stands out, unmasked and unpoisoned, so often in a row."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, signal_of

from ars_kit.damping import DampedOptimizer
from ars_kit.errors import ConfigError, PluginError
from ars_kit.figures import _converged
from ars_kit.host import Host, Listing, Plugin
from ars_kit.optim import build_gates
from ars_kit.schema import Choice
from ars_kit.settings import OptimizerSettings
from ars_kit.spec import Offer
from ars_kit.testing import check_gate
from ars_kit_plugins.ars import ARS
from ars_kit_plugins.skipping import NEEDED, WINDOW, SkipStep


def ask(gate: SkipStep, losses: list[float], norms: list[float] | None = None) -> list[bool]:
    found = []
    for i, loss in enumerate(losses):
        size = torch.tensor([1.0 if norms is None else norms[i]])
        signal = dataclasses.replace(signal_of(i, loss), norms=lambda size=size: size)
        answer = gate(signal)
        assert answer.skip is not None
        found.append(bool(answer.skip))
    return found


def calm(count: int, seed: int = 0) -> list[float]:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (3 + 0.1 * noise).tolist()


def olmo(losses: list[float], limit: float = 6.0) -> list[bool]:
    """SkipStep as OLMo-core has it: mean and deviation of the last 128, whatever they were."""
    found = []
    for i, loss in enumerate(losses):
        past = torch.tensor(losses[max(0, i - WINDOW) : i])
        far = len(past) >= WINDOW // 2 and loss - past.mean() > limit * past.std()
        found.append(bool(far))
    return found


def test_it_follows_its_formula() -> None:
    # Of constant losses the deviation is 0, so sigma is its floor: 0.02 or a hundredth.
    for level, sigma in ((1.0, 0.02), (5.0, 0.05)):
        for z, skipped in ((5.9, False), (6.1, True)):
            gate = SkipStep(limit=6.0)
            losses = [level] * NEEDED + [level + z * sigma]
            assert ask(gate, losses) == [False] * NEEDED + [skipped]
            assert float(gate.explain()["z"]) == pytest.approx(z, rel=1e-3)


def test_too_few_losses_are_no_ground_to_skip() -> None:
    assert not any(ask(SkipStep(), [1.0] * (NEEDED - 1) + [100.0]))


def test_low_losses_are_never_skipped() -> None:
    assert not any(ask(SkipStep(), [5.0] * 50 + [0.1] * 50))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_bad_batches_do_not_mask_each_other(share: float) -> None:
    rng = torch.Generator().manual_seed(1)
    bad = (torch.rand(600, generator=rng) < share).tolist()
    losses = [v + 4 * b for v, b in zip(calm(600), bad, strict=True)]
    found = ask(SkipStep(limit=6, most=20), losses)
    later = slice(WINDOW, None)
    assert found[later] == bad[later]
    if share >= 0.1:
        assert sum(olmo(losses)[later]) < 0.1 * sum(bad[later]), "the original masks itself"


def test_what_was_skipped_is_not_learned_from() -> None:
    """More bad batches than good ones, but never too many in a row."""
    bad = [False] * 128 + [True, True, True, False, False] * 60
    losses = [v + 4 * b for v, b in zip(calm(428), bad, strict=True)]
    assert ask(SkipStep(most=3), losses) == bad


def test_many_values_that_are_no_numbers_do_not_blind_it() -> None:
    for wild in (math.nan, math.inf, -math.inf):
        losses = [*calm(100), *[wild] * 120, 9.0]
        assert ask(SkipStep(), losses) == [False] * 220 + [True]


def test_one_value_that_is_no_number_changes_nothing_after_it() -> None:
    for wild in (math.nan, math.inf, -math.inf):
        losses = [*calm(100), wild, *calm(100, seed=2)]
        losses[150] = 9.0
        found = ask(SkipStep(), losses)
        assert found == [i == 150 for i in range(201)]
    poisoned = [*calm(100), math.nan, *calm(100, seed=2)]
    poisoned[150] = 9.0
    assert not any(olmo(poisoned)[101:]), "the original is blind after it"


def test_no_more_than_so_many_in_a_row() -> None:
    found = ask(SkipStep(most=5), calm(100) + [v + 5 for v in calm(300, seed=3)])
    assert found[100:105] == [True] * 5
    assert not any(found[105:]), "the new level was not let through"


def test_after_a_new_level_is_learned_it_is_the_measure() -> None:
    losses = calm(100) + [v + 5 for v in calm(300, seed=3)] + [13.0, 8.0]
    assert ask(SkipStep(most=5), losses)[-2:] == [True, False]


def test_a_step_that_is_skipped_anyway_is_not_learned_from() -> None:
    gate = SkipStep()
    ask(gate, calm(64))
    before = {k: v.clone() for k, v in gate.state_dict().items() if v is not None}
    signal = dataclasses.replace(signal_of(64, 50.0), skip=torch.tensor(True))
    answer = gate(signal)
    assert answer.skip is not None
    assert not answer.skip
    for name, value in before.items():
        torch.testing.assert_close(gate.state_dict()[name], value, equal_nan=True)


def test_norms_are_looked_at_where_that_is_asked_for() -> None:
    norms = [1.0 + 0.1 * math.sin(i * i) for i in range(100)]
    norms[60] = 50.0
    losses = [2.0] * 100
    assert ask(SkipStep(norm=True), losses, norms) == [i == 60 for i in range(100)]
    assert not any(ask(SkipStep(), losses, norms))


@pytest.mark.parametrize("norm", [False, True])
def test_it_keeps_every_rule_of_a_gate(*, norm: bool) -> None:
    check_gate(lambda: SkipStep(norm=norm))


@pytest.mark.parametrize("bad", [{"limit": 0.0}, {"limit": math.nan}, {"most": -1}])
def test_settings_without_a_meaning_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="limit must be greater than 0, and most must not be"):
        SkipStep(**bad)


def test_a_skipped_step_leaves_the_weights_as_they_were() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = ARS(torch.optim.SGD([p], lr=0.1), gates={"skip": SkipStep()})
    before = None
    for step in range(60):
        p.grad = torch.ones(2)
        before = p.detach().clone() if step == 50 else before
        optimizer.step(loss=30.0 if step == 50 else 1.0)
        assert step != 50 or torch.equal(p, before)
    rows = optimizer.drain()
    assert [row["step"] for row in rows if row["skipped"]] == [50]
    assert rows[50]["skip"] == 0
    assert rows[50]["skip_z"] > 6
    assert optimizer.summary()["skipped"] == 1


def test_a_run_asks_it_by_name(arskit: Cli, tiny: list[str], tmp_path: Path) -> None:
    done = arskit("run", *tiny, "--members", "d2", "--gate", "skip:limit=6,most=8", "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "checkpoints" / "d2" / "metrics.json").read_text())
    assert list(metrics["gates"])[-1] == "skip"
    history = (tmp_path / "checkpoints" / "d2" / "history.jsonl").read_text().splitlines()
    assert "skip_z" in json.loads(history[0])


def test_convergence_is_a_step_of_the_training_not_of_those_that_were_taken() -> None:
    losses = [4.0, 1.0, *[0.9] * 60]
    taken = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    at = _converged(taken)
    assert at is not None
    assert 2 < at < 50
    late = [{**row, "step": row["step"] + 100 * (row["step"] > 1)} for row in taken]
    assert _converged(late) == at + 100
    assert _converged([]) is None


@pytest.mark.parametrize("name", ["loss", "gradient", "skipped"])
def test_a_gate_takes_the_place_of_nothing_else_in_the_history(name: str) -> None:
    """Its factor would stand where the loss stands, in every figure that is made of that."""
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match=f"no damping gate can be called '{name}'"):
        DampedOptimizer(base, {name: SkipStep()})
    host = Host.installed()
    host.shelves["gates"][name] = [
        Listing(Offer(name, "for a test", SkipStep), Plugin("mine", "arskit-mine", "0.1"))
    ]
    settings = OptimizerSettings(gates=(Choice(name),))
    complaint = rf"gate '{name}' of plugin 'mine' \(arskit-mine 0.1\) needs another name"
    with pytest.raises(PluginError, match=complaint):
        build_gates(host, settings, position=0.0)

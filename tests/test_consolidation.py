"""Both terms of the penalty are what the formula says, and touch what was inherited alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import installed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_growth import TOKENS, child_of, config_of, trained

from ars_kit.errors import ConfigError
from ars_kit.models import build, weights_of
from ars_kit.schema import parse_choice
from ars_kit.spec import Birth, Block, Lesson, Parent
from ars_kit_plugins.consolidation import Consolidation, anchor, fisher_information, leading

ONE: Any = torch.zeros(())


def strategy(text: str) -> Any:
    return installed().make("strategies", parse_choice(text))


def lesson_of(weights: Any) -> Lesson:
    return Lesson(0, ONE, ONE, ONE, torch.tensor(2.0), weights)


def born(text: str = "ewc:sequences=2", **shape: Any) -> tuple[Any, Any, Any]:
    """Return the parent, the child's fresh weights, and the seed."""
    parent = trained(config_of())
    config = config_of(**{"layers": 3, "groups": 2, **shape})
    fresh = weights_of(build(config, seed=1))
    birth = Birth(
        "d3", config, fresh, torch.Generator().manual_seed(0), windows=lambda n: TOKENS[:n]
    )
    heir = Parent("d2", parent.config, weights_of(parent), model=lambda: trained(config_of()))
    return parent, fresh, strategy(text).inherit(heir, birth)


def test_nothing_is_lost_at_birth() -> None:
    _, _, seed = born()
    weights = {n: seed.weights[n] for n in seed.weights}
    assert seed.loss(lesson_of(weights)) == 2.0


def test_new_slices_are_free() -> None:
    _, _, seed = born()
    weights = {n: seed.weights[n] for n in seed.weights}
    for name, tensor in weights.items():
        free = torch.ones_like(tensor, dtype=torch.bool)
        for block in seed.provenance[name]:
            free[block.target] = False
        tensor[free] += 3.0
    assert float(seed.loss(lesson_of(weights))) == pytest.approx(2.0, abs=1e-6)


def test_the_penalty_is_the_formula_element_by_element() -> None:
    """Against plain loops over the parent's own coordinates, for a grown child."""
    parent, _, seed = born("ewc:sequences=2,strength=3,gamma=0.5,energy=0.8")
    rng = torch.Generator().manual_seed(0)
    fisher = fisher_information(trained(config_of()), TOKENS[:2], rng)
    birth = {n: seed.weights[n] for n in seed.weights}
    noise = torch.Generator().manual_seed(7)
    live = {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in birth.items()}
    old = weights_of(parent)
    first = second = 0.0
    for name, blocks in seed.provenance.items():
        change = torch.zeros_like(live[name])
        for block in blocks:
            # The parent's weight w stands in the child as c w; a change of c w by d is one of w
            # by d / c.
            moved = (live[name][block.target] - birth[name][block.target]) / block.coefficient
            first += float((block.source(fisher[block.parent]) * moved.square()).sum())
            change[block.target] = live[name][block.target] - birth[name][block.target]
            kept = block.coefficient * block.source(old[block.parent])
            assert torch.equal(birth[name][block.target], kept)
        if name.endswith("_proj.weight") and blocks:
            inherited = torch.zeros_like(live[name])
            for block in blocks:
                inherited[block.target] = birth[name][block.target]
            u, s, _ = torch.linalg.svd(inherited)
            count = next(
                k for k in range(1, len(s) + 1)
                if s[:k].square().sum() >= (0.8 - 1e-6) * s.square().sum()
            )  # fmt: skip
            projector = u[:, :count] @ u[:, :count].T
            outside = torch.eye(len(u)) - projector
            second += float(torch.trace(outside @ change @ change.T))
    expected = 2.0 + 0.5 * 3 * first + 0.5 * second
    assert first > 0
    assert second > 0
    assert float(seed.loss(lesson_of(live))) == pytest.approx(expected, rel=1e-4)


def test_its_gradient_pulls_back() -> None:
    _, _, seed = born("ewc:sequences=2,gamma=0.5")
    live = {n: seed.weights[n] + 0.1 for n in seed.weights}
    for tensor in live.values():
        tensor.requires_grad_()
    before = seed.loss(lesson_of(live))
    before.backward()
    name = "model.layers.0.mlp.up_proj.weight"
    assert live[name].grad is not None
    with torch.no_grad():
        moved = {n: t - 0.05 * (t.grad if t.grad is not None else 0) for n, t in live.items()}
    assert seed.loss(lesson_of(moved)) < before


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 99))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_projector_is_one(m: int, n: int, energy: float, seed: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    basis = leading(matrix, energy)
    projector = basis @ basis.T
    torch.testing.assert_close(projector @ projector, projector, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projector, projector.T)
    held = (projector @ matrix).square().sum() / matrix.square().sum()
    assert held >= energy - 1e-4
    fewer = basis[:, :-1]
    assert (fewer @ fewer.T @ matrix).square().sum() / matrix.square().sum() < energy + 1e-4
    # Within the space, a change is free; outside of it, it is not.
    free = Consolidation({"w": _gamma_only(matrix, basis)}, 0.0, 1.0)
    within = basis @ torch.ones(basis.shape[1], n)
    assert free.penalty({"w": matrix + within}).abs() < 1e-3
    outside = torch.randn(m, n) - projector @ torch.randn(m, n)
    outside = outside - projector @ outside
    expected = outside.square().sum()
    assert free.penalty({"w": matrix + outside}) == pytest.approx(float(expected), abs=1e-3)


def _gamma_only(matrix: Any, basis: Any) -> Any:
    whole = Block(
        "w", tuple((0, n, 1) for n in matrix.shape), tuple((0, n, 1) for n in matrix.shape)
    )
    made = anchor(matrix, [whole], {"w": torch.zeros_like(matrix)}, energy=None)
    return replace(made, basis=basis)


def test_a_whole_matrix_leaves_no_outside() -> None:
    assert leading(torch.eye(3), 1.0).shape == (3, 3)
    assert leading(torch.zeros(3, 2), 0.5).shape == (3, 0)


def test_fisher_information_is_the_expectation_over_the_model_s_own_labels() -> None:
    """Against the sum over every label, for windows of two tokens."""
    model = trained(config_of(layers=1))
    window = TOKENS[:1, :2]
    parameters = dict(model.named_parameters())
    exact = {name: torch.zeros_like(p) for name, p in parameters.items()}
    scores = model(input_ids=window[:, :1]).logits[0, 0].log_softmax(-1)
    for label in range(len(scores)):
        model.zero_grad()
        model(input_ids=window[:, :1]).logits[0, 0].log_softmax(-1)[label].backward()
        for name, p in parameters.items():
            if p.grad is not None:
                exact[name] += float(scores[label].detach().exp()) * p.grad.square()
    rng = torch.Generator().manual_seed(0)
    found = fisher_information(model, window.repeat(1500, 1), rng)
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        total, want = found[name].sum(), exact[name].sum()
        assert float(total) == pytest.approx(float(want), rel=0.15), name


def test_fisher_information_is_per_token_however_long_the_window() -> None:
    """A window's tokens have uncorrelated scores, so longer windows change no expectation."""
    model = trained(config_of(layers=1))
    rng = torch.Generator().manual_seed(0)
    single = TOKENS[:1, :1].repeat(1, 2)
    # Attention over equal tokens yields that token's value: each position sees what one alone does.
    short = fisher_information(model, single.repeat(1200, 1), rng)["model.norm.weight"].sum()
    same = TOKENS[:1, :1].repeat(1, 9)
    long = fisher_information(model, same.repeat(400, 1), rng)["model.norm.weight"].sum()
    assert float(long) == pytest.approx(float(short), rel=0.2)


def test_ewc_is_repeated_by_its_seed_and_needs_text() -> None:
    first, second = (born()[2] for _ in range(2))
    live = {n: first.weights[n] + 0.1 for n in first.weights}
    assert torch.equal(first.loss(lesson_of(live)), second.loss(lesson_of(live)))
    parent, fresh, _ = born()
    birth = Birth("d3", config_of(layers=3, groups=2), fresh, torch.Generator())
    with pytest.raises(ConfigError, match="training text"):
        strategy("ewc").inherit(Parent("d2", parent.config, weights_of(parent)), birth)


@pytest.mark.parametrize("text", ["ewc:gamma=-1", "ewc:energy=0", "ewc:sequences=0"])
def test_settings_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        strategy(text)


def test_growth_is_unchanged_by_the_penalty() -> None:
    parent, _, seed = born()
    child, _ = child_of(parent, config_of(layers=3, groups=2))
    assert seed.preserves == "exact"
    inherited = "model.layers.0.self_attn.q_proj.weight"
    (block, *_) = seed.provenance[inherited]
    assert torch.equal(
        seed.weights[inherited][block.target], weights_of(child)[inherited][block.target]
    )

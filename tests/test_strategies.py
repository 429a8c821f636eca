"""The built-in strategies keep what they promise."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import installed

from ars_kit.errors import ConfigError
from ars_kit.models import build, logits_difference, set_weights, weights_of
from ars_kit.schema import parse_choice
from ars_kit.shapes import embedded_config
from ars_kit.spec import Birth, InheritanceStrategy, Parent

TOKENS = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(0))


def strategy(text: str) -> InheritanceStrategy:
    made: InheritanceStrategy = installed().make("strategies", parse_choice(text))
    return made


def config_of(depth: int) -> Any:
    return embedded_config(depth, vocab_size=60, context=32)


def birth_of(depth: int) -> Birth:
    fresh = weights_of(build(config_of(depth), seed=1))
    return Birth(f"d{depth}", config_of(depth), fresh, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parent() -> Any:
    return build(config_of(10), seed=0).eval()


@pytest.mark.parametrize("depth", [10, 11, 13, 18])
def test_progressive_continues_its_parent_exactly(parent: Any, depth: int) -> None:
    progressive = strategy("progressive")
    assert progressive.inherits
    assert progressive.supports(parent.config, config_of(depth)) is None
    heir = Parent("d10", parent.config, weights_of(parent))
    seed = progressive.inherit(heir, birth_of(depth))
    assert (seed.preserves, seed.opt_state, seed.rewarm_steps) == ("exact", "derive", 10)
    child = build(config_of(depth), seed=1)
    set_weights(child, seed.weights)
    assert logits_difference(parent, child, TOKENS) <= 1e-5
    assert seed.provenance.keys() == seed.weights.keys()
    if depth == 10:  # the same shape: a chain of fine-tunes
        assert all(torch.equal(t, heir.weights[n]) for n, t in seed.weights.items())


def test_a_child_shares_no_memory_with_its_parent(parent: Any) -> None:
    seed = strategy("progressive").inherit(
        Parent("d10", parent.config, weights_of(parent)), birth_of(10)
    )
    before = parent.model.norm.weight.clone()
    for tensor in seed.weights.values():
        tensor.add_(1)
    assert torch.equal(parent.model.norm.weight, before)


def test_settings_reach_the_seed(parent: Any) -> None:
    chosen = strategy("progressive:opt_state=reset,rewarm_steps=3")
    seed = chosen.inherit(Parent("d10", parent.config, weights_of(parent)), birth_of(11))
    assert (seed.opt_state, seed.rewarm_steps) == ("reset", 3)


@pytest.mark.parametrize("name", ["progressive", "duplicate", "stack", "jump"])
def test_the_last_heir_cools_from_birth_on_and_may_cool_otherwise(parent: Any, name: str) -> None:
    member = Parent("d10", parent.config, weights_of(parent))
    for last in (birth_of(10), birth_of(11)):
        births = replace(last, heirs=1), last
        for given, wanted in (("", 1.0), (":last_decay_fraction=0.5", 0.5)):
            own = strategy(name + given)
            assert [own.inherit(member, b).decay_fraction for b in births] == [None, wanted]
        as_the_run = strategy(f"{name}:last_decay_fraction=none")
        assert as_the_run.inherit(member, last).decay_fraction is None


@pytest.mark.parametrize(
    "text",
    [
        "progressive:rewarm_steps=-1", "progressive:opt_state=keep", "progressive:new_lr=inf",
        "progressive:new_lr=nan", "distill:weight=inf", "distill:temperature=inf", "ewc:gamma=nan",
        "ewc:strength=inf", "duplicate:last_decay_fraction=1.5",
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        strategy(text)


def test_scratch_inherits_from_a_base_alone(parent: Any) -> None:
    scratch = strategy("scratch")
    assert not scratch.inherits
    seed = scratch.inherit(Parent("base", parent.config, weights_of(parent)), birth_of(10))
    assert seed.opt_state == "reset"
    assert all(torch.equal(t, weights_of(parent)[n]) for n, t in seed.weights.items())
    # Its members rise to the learning rate as any model does, not as an heir.
    assert seed.rewarm_steps is None


def test_shrinking_is_refused_in_words() -> None:
    for name in ("progressive", "scratch"):
        assert "shrinks" in (strategy(name).supports(config_of(11), config_of(10)) or "")


def test_offering_the_strategies_imports_no_torch() -> None:
    code = (
        "import sys, ars_kit_plugins.strategies; print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

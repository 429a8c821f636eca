"""Blocks are repeated where they should be, and the rest is exact growth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import installed
from test_growth import TOKENS, config_of, trained

from ars_kit.errors import ConfigError
from ars_kit.inherit import derive_opt_state, inherited_share
from ars_kit.models import build, logits_difference, set_weights, weights_of
from ars_kit.schema import parse_choice
from ars_kit.spec import Birth, Parent
from ars_kit_plugins.architecture import Shape


def strategy(name: str) -> Any:
    return installed().make("strategies", parse_choice(name))


def seeded(name: str, before: Any, after: Any) -> tuple[Any, Any, Any]:
    parent, child = trained(before), build(after, seed=1).eval()
    birth = Birth("child", after, weights_of(child), torch.Generator().manual_seed(0))
    seed = strategy(name).inherit(Parent("parent", before, weights_of(parent)), birth)
    set_weights(child, seed.weights)
    return parent, child, seed


@pytest.mark.parametrize(
    ("name", "parent", "child", "layers"),
    [
        ("stack", 3, 6, (0, 1, 2, 0, 1, 2)),
        ("stack", 3, 4, (0, 1, 2, 0)),
        ("duplicate", 3, 6, (0, 0, 1, 1, 2, 2)),
        ("duplicate", 4, 5, (0, 1, 1, 2, 3)),
        ("duplicate", 1, 3, (0, 0, 0)),
    ],
)
def test_blocks_are_copied_from_where_they_should_be(
    name: str, parent: int, child: int, layers: tuple[int, ...]
) -> None:
    found = strategy(name).places(["full"] * parent, ["full"] * child)
    assert found == layers
    old, new, seed = seeded(name, config_of(layers=parent), config_of(layers=child))
    for j, source in enumerate(layers):
        mine, theirs = new.model.layers[j].state_dict(), old.model.layers[source].state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert seed.preserves == "none"
    shapes = {n: t.shape for n, t in seed.weights.items()}
    assert inherited_share(seed.provenance, shapes) == 1


@pytest.mark.parametrize("name", ["stack", "duplicate"])
def test_a_copy_is_one_of_its_own(name: str) -> None:
    _, child, seed = seeded(name, config_of(layers=1), config_of(layers=2))
    with torch.no_grad():
        child.model.layers[0].mlp.up_proj.weight.zero_()
    assert child.model.layers[1].mlp.up_proj.weight.abs().sum() > 0
    state = {
        n: {"exp_avg": torch.ones_like(t), "step": torch.tensor(3.0)}
        for n, t in weights_of(child).items()
        if ".layers.1." not in n
    }
    derived = derive_opt_state(
        state, seed.provenance, {n: t.shape for n, t in seed.weights.items()}
    )
    up = [derived[f"model.layers.{i}.mlp.up_proj.weight"]["exp_avg"] for i in (0, 1)]
    assert torch.equal(*up)
    assert up[0].data_ptr() != up[1].data_ptr()


@pytest.mark.parametrize("name", ["stack", "duplicate"])
def test_width_alone_grows_exactly(name: str) -> None:
    parent, child, seed = seeded(name, config_of(), config_of(groups=2))
    assert seed.preserves == "exact"
    assert logits_difference(parent, child, TOKENS) < 1e-4
    parent, child, seed = seeded(name, config_of(), config_of(groups=2, layers=3))
    assert (seed.preserves, seed.note.split(", ")[0]) == ("none", "grown cooled lineage")
    assert logits_difference(parent, child, TOKENS) > 1e-2


def test_a_layer_is_not_copied_onto_one_of_another_kind() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    before = config_of(layers=2, **sliding)
    after = config_of(layers=3, **{**sliding, "max_window_layers": 2})
    assert Shape.of(after).kinds == ("full_attention", "full_attention", "sliding_attention")
    assert strategy("duplicate").supports(before, after) is None
    reason = strategy("stack").supports(before, after) or ""
    assert "layer 1 has full_attention" in reason
    assert "it would copy has sliding_attention" in reason


def test_a_block_and_its_copy_may_share_the_work() -> None:
    before, after = config_of(layers=2), config_of(layers=3)
    parent, halved, seed = seeded("duplicate:share=0.5", before, after)
    _, doubled, _ = seeded("duplicate", before, after)
    places = strategy("duplicate").places(["full"] * 2, ["full"] * 3)
    assert places == (0, 0, 1)
    old = weights_of(parent)
    for j, place in enumerate(places):
        factor = 0.5 if place == 0 else 1.0
        for end in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            mine, theirs = f"model.layers.{j}.{end}", f"model.layers.{place}.{end}"
            assert torch.equal(seed.weights[mine], old[theirs] * factor)
            assert [b.coefficient for b in seed.provenance[mine]] == [factor]
        up = seed.weights[f"model.layers.{j}.mlp.up_proj.weight"]
        assert torch.equal(up, old[f"model.layers.{place}.mlp.up_proj.weight"])
    away = [logits_difference(parent, child, TOKENS) for child in (halved, doubled)]
    assert 0 < away[0] < away[1]


def test_width_alone_is_not_shared() -> None:
    parent, child, seed = seeded("duplicate:share=0.5", config_of(), config_of(groups=2))
    assert seed.preserves == "exact"
    assert logits_difference(parent, child, TOKENS) < 1e-4


@pytest.mark.parametrize("share", ["0", "1.5", "-1"])
def test_no_share_beyond_the_whole(share: str) -> None:
    with pytest.raises(ConfigError, match="share must be greater than 0 and at most 1"):
        strategy(f"duplicate:share={share}")

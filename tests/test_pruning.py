"""Pruning takes away what contributes least, and so undoes growth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import installed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_growth import TOKENS, child_of, config_of, growths, norms_in_float64, trained

from ars_kit.models import build, logits_difference, set_weights, weights_of
from ars_kit.schema import parse_choice
from ars_kit.spec import Birth, Parent
from ars_kit_plugins.architecture import Shape
from ars_kit_plugins.pruning import Cut, Importance, cut, keep_layers, measure, prune


def strategy(text: str = "prune") -> Any:
    return installed().make("strategies", parse_choice(text))


@given(growths())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_what_was_grown_is_cut_back_to_what_it_was(pair: tuple[Any, Any]) -> None:
    small, large = pair
    if Shape.of(small).head != Shape.of(large).head:
        assert "head_dim" in (strategy().supports(large, small) or "")
        return
    assert strategy().supports(large, small) is None
    with norms_in_float64():
        origin = trained(small, dtype=torch.float64)
        grown, _ = child_of(origin, large)
        kept = cut(measure(grown, TOKENS), Shape.of(large), Shape.of(small))
        back = build(small, seed=5, dtype=torch.float64).eval()
        weights, _ = prune(large, weights_of(grown), small, weights_of(back), kept)
        set_weights(back, weights)
        for name, tensor in weights_of(origin).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-12, atol=1e-12)
        assert logits_difference(origin, back, TOKENS) <= 1e-11


def test_provenance_says_where_each_weight_was() -> None:
    large, small = config_of(layers=4, groups=3, ratio=2), config_of(layers=2, groups=2, ratio=1)
    small.rms_norm_eps = large.rms_norm_eps * large.hidden_size / small.hidden_size
    parent = trained(large)
    kept = cut(measure(parent, TOKENS), Shape.of(large), Shape.of(small))
    old = weights_of(parent)
    new, provenance = prune(large, old, small, weights_of(build(small, seed=0)), kept)
    for name, (block,) in provenance.items():
        found = block.source(old[block.parent]) * block.coefficient
        assert torch.equal(new[name][block.target], found), name
        assert block.target == tuple(slice(0, n, 1) for n in new[name].shape)


def test_each_query_head_stays_with_its_key() -> None:
    p, c = Shape.of(config_of(layers=1, groups=3, ratio=2)), Shape.of(config_of(layers=1, groups=2))
    scores = torch.tensor([1.0, 9.0, 2.0, 2.5, 8.0, 3.0])
    small = Importance(
        [torch.tensor(1.0)], torch.arange(float(p.residual)), [scores], [torch.ones(p.hidden)]
    )
    kept = cut(small, p, c)
    assert kept.groups == ((0, 2),)
    assert kept.heads == ((0, 1, 4, 5),)
    one = cut(small, p, Shape.of(config_of(layers=1, groups=2, ratio=1)))
    assert one.heads == ((1, 4),)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from("ab")), min_size=1, max_size=7),
    st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_layers_of_greatest_influence_stay(
    layers: list[tuple[float, str]], data: st.DataObject
) -> None:
    from itertools import combinations

    influence, kinds = [x for x, _ in layers], [k for _, k in layers]
    chosen = sorted(data.draw(st.sets(st.integers(0, len(layers) - 1), min_size=1)))
    child = [kinds[i] for i in chosen]
    kept = keep_layers(influence, kinds, child)
    assert [kinds[i] for i in kept] == child
    rivals = [
        sum(influence[i] for i in places)
        for places in combinations(range(len(layers)), len(child))
        if [kinds[i] for i in places] == child
    ]
    assert sum(influence[i] for i in kept) == pytest.approx(max(rivals))


def test_contributions_are_what_they_say() -> None:
    """Against taking a unit away: the change of what it writes to is its contribution."""
    model = trained(config_of(layers=1))
    found = measure(model, TOKENS)
    layer = model.model.layers[0]
    seen: list[torch.Tensor] = []
    layer.mlp.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    layer.self_attn.register_forward_hook(lambda *args: seen.append(args[2][0].detach()))

    def change(projection: Any, columns: slice, place: int) -> float:
        with torch.no_grad():
            model(input_ids=TOKENS)
            before, kept = seen[place], projection.weight[:, columns].clone()
            seen.clear()
            projection.weight[:, columns] = 0
            model(input_ids=TOKENS)
            after = seen[place]
            seen.clear()
            projection.weight[:, columns] = kept
        return float((before - after).square().sum(-1).mean())

    heads = [change(layer.self_attn.o_proj, slice(8 * h, 8 * h + 8), 0) for h in range(2)]
    assert found.heads[0].tolist() == pytest.approx(heads, rel=1e-3)
    units = [change(layer.mlp.down_proj, slice(u, u + 1), 1) for u in range(3)]
    assert found.units[0][:3].tolist() == pytest.approx(units, rel=1e-3)


def test_pruning_needs_text_and_says_so() -> None:
    from ars_kit.errors import ConfigError

    large, small = config_of(layers=3), config_of(layers=2)
    parent = Parent("large", large, weights_of(build(large, seed=0)))
    fresh = weights_of(build(small, seed=0))
    birth = Birth("small", small, fresh, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="training text"):
        strategy().inherit(parent, birth)
    assert "shrinks from 3 to 2" in (strategy().supports(small, large) or "")
    assert isinstance(
        cut(measure(build(large, seed=0), TOKENS), Shape.of(large), Shape.of(small)), Cut
    )

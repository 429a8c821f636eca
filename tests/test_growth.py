"""Growth is exact in theory and in float64, and its provenance tells the whole truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from ars_kit.errors import ConfigError
from ars_kit.inherit import derive_opt_state, inherited_share
from ars_kit.models import (
    build,
    logits_difference,
    set_weights,
    weights_of,
)
from ars_kit.shapes import embedded_config, grown_config
from ars_kit_plugins.architecture import inherited_layers, refusal
from ars_kit_plugins.growth import grow, plan

FAMILIES = {"qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}
TOKENS = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(0))
EPS_TIMES_WIDTH = 3e-2
"""A large epsilon: were it handled wrongly, no tolerance would hide it."""


def config_of(
    family: str = "qwen2",
    *,
    layers: int = 2,
    groups: int = 1,
    ratio: int = 2,
    head: int = 8,
    width: int | None = None,
    inner: int | None = None,
    tied: bool = True,
    **more: Any,
) -> Any:
    width = width or head * groups * ratio
    return FAMILIES[family](
        vocab_size=60,
        hidden_size=width,
        intermediate_size=inner or 3 * width,
        num_hidden_layers=layers,
        num_attention_heads=groups * ratio,
        num_key_value_heads=groups,
        head_dim=head,
        rms_norm_eps=EPS_TIMES_WIDTH / width,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        **more,
    )


def trained(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose every parameter, biases too, is away from its initial value."""
    model = build(config, seed=seed, dtype=dtype).eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=source, dtype=dtype))
    return model


def child_of(parent: Any, config: PretrainedConfig) -> tuple[Any, Any]:
    child = build(config, seed=1, dtype=parent.dtype).eval()
    with torch.no_grad():  # an initialisation of zeros would hide a bias that leaks
        for name, p in child.named_parameters():
            if name.endswith("bias"):
                p.fill_(0.2)
    weights, provenance = grow(parent.config, weights_of(parent), config, weights_of(child))
    set_weights(child, weights)
    return child, provenance


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """Let RMSNorm compute in the model's precision; transformers' always goes through float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        grown: Tensor = self.weight * (x * scale)
        return grown

    classes: tuple[type[nn.Module], ...] = (Qwen2RMSNorm, LlamaRMSNorm, Qwen3RMSNorm)
    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, "forward", forward)
        yield


def assert_exact(before: PretrainedConfig, after: PretrainedConfig) -> None:
    """Check the theory in float64, then the practice in float32."""
    assert refusal(before, after) is None
    with norms_in_float64():
        parent = trained(before, dtype=torch.float64)
        child, _ = child_of(parent, after)
        logits = parent(input_ids=TOKENS).logits
        assert logits.std() > 0.1
        assert logits_difference(parent, child, TOKENS) <= 1e-12 * max(1.0, logits.abs().max())
    parent = trained(before)
    child, _ = child_of(parent, after)
    scale = parent(input_ids=TOKENS).logits.abs().max()
    assert logits_difference(parent, child, TOKENS) <= 1e-5 * max(1.0, scale)


@st.composite
def growths(draw: st.DrawFn) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Draw two shapes of which the second contains the first; widths may be odd."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    tied = draw(st.booleans())
    layers, groups, ratio = (draw(st.integers(1, n)) for n in (3, 3, 4))
    width = 3 * groups * ratio
    before = config_of(
        family, layers=layers, groups=groups, ratio=ratio, width=width, inner=13, tied=tied
    )
    groups += draw(st.integers(0, 2))
    ratio += draw(st.integers(0, 2))
    # Llama's configuration insists on a multiple of its query heads.
    width = -(-(width + draw(st.integers(0, 17))) // (groups * ratio)) * groups * ratio
    after = config_of(
        family,
        layers=layers + draw(st.integers(0, 3)),
        groups=groups,
        ratio=ratio,
        head=8 * (1 if family == "qwen3" else draw(st.integers(1, 3))),
        width=width,
        inner=13 + draw(st.integers(0, 17)),
        tied=tied,
    )
    return before, after


@given(growths())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_growth_is_exact(pair: tuple[PretrainedConfig, PretrainedConfig]) -> None:
    assert_exact(*pair)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases_grow_exactly(family: str) -> None:
    bias = {"attention_bias": True, **({"mlp_bias": True} if family == "llama" else {})}
    before = config_of(family, **bias)
    assert_exact(before, config_of(family, layers=4, groups=2, ratio=3, width=54, **bias))


def test_rescaled_rotary_frequencies_grow_exactly() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    before = config_of("llama", rope_parameters=rope)
    assert_exact(before, config_of("llama", head=16, rope_parameters=rope))


def test_layers_keep_their_kind_of_attention() -> None:
    sliding: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    }
    base = config_of(layers=3, **sliding)
    grown = grown_config(base, 5)
    assert grown.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    assert_exact(base, grown)
    backwards = config_of(layers=3, layer_types=list(reversed(base.layer_types)), **sliding)
    assert "layer_types" in (refusal(base, backwards) or "")


def test_the_embedded_family_is_exact_throughout() -> None:
    """Step by step from the first member to the last, and the last against the first."""
    with norms_in_float64():
        first = trained(embedded_config(10, vocab_size=60, context=32), dtype=torch.float64)
        parent = first
        for depth in range(11, 19):
            config = embedded_config(depth, vocab_size=60, context=32)
            assert refusal(parent.config, config) is None
            child, _ = child_of(parent, config)
            assert logits_difference(parent, child, TOKENS) <= 1e-12
            parent = child
        assert logits_difference(first, parent, TOKENS) <= 1e-12


GROWN = [
    ("qwen2", {"layers": 4, "groups": 2, "ratio": 3, "head": 16, "inner": 101}),
    ("llama", {"layers": 3, "groups": 3, "ratio": 2, "head": 8, "tied": False}),
    ("qwen3", {"layers": 3, "groups": 2, "ratio": 3, "head": 8, "width": 42}),
]


@pytest.mark.parametrize(("family", "after"), GROWN)
def test_provenance_is_complete_and_true(family: str, after: dict[str, Any]) -> None:
    parent = trained(config_of(family, tied=after.get("tied", True)))
    config = config_of(family, **after)
    fresh = {n: torch.full_like(t, 7.0) for n, t in weights_of(build(config, seed=1)).items()}
    new, provenance = grow(parent.config, weights_of(parent), config, fresh)
    old = weights_of(parent)
    assert provenance.keys() == new.keys()
    used = {name: torch.zeros_like(t) for name, t in old.items()}
    for name, blocks in provenance.items():
        untold = torch.ones_like(new[name], dtype=torch.bool)
        for block in blocks:
            here = tuple(slice(*s) for s in block.child_index)
            there = tuple(slice(*s) for s in block.parent_index)
            assert torch.equal(new[name][here], block.coefficient * old[block.parent][there])
            assert untold[here].all()
            untold[here] = False
            used[block.parent][there] += 1
        rest = new[name][untold]
        assert ((rest == 0) | (rest == 7)).all(), name
    assert all((count == 1).all() for count in used.values())
    share = inherited_share(provenance, {n: t.shape for n, t in new.items()})
    whole = sum(t.numel() for t in new.values())
    assert share == pytest.approx(sum(t.numel() for t in old.values()) / whole)


@pytest.mark.parametrize(("family", "after"), GROWN)
def test_new_parameters_come_alive_within_two_steps(family: str, after: dict[str, Any]) -> None:
    parent = trained(config_of(family, tied=after.get("tied", True)))
    child, provenance = child_of(parent, config_of(family, **after))
    optimizer = torch.optim.SGD(child.parameters(), lr=0.1)
    alive = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in child.named_parameters()}
    for _ in range(3):  # gradients after none, one and two steps
        optimizer.zero_grad()
        child(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for name, p in child.named_parameters():
            alive[name] |= p.grad.abs() > 0
        optimizer.step()
    seen = TOKENS.unique()
    for name, live in alive.items():
        for block in provenance[name]:
            live[tuple(slice(*s) for s in block.child_index)] = True
        if "embed_tokens" in name:
            live[[i for i in range(60) if i not in seen]] = True
        assert live.all(), name


def gradients_of(model: Any) -> dict[str, Any]:
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "after"), GROWN)
def test_moments_follow_their_weights(family: str, after: dict[str, Any]) -> None:
    """The child's gradient is what the derived first moment says, on every inherited rectangle."""
    with norms_in_float64():
        parent = trained(config_of(family, tied=after.get("tied", True)), dtype=torch.float64)
        child, provenance = child_of(parent, config_of(family, **after))
        before, gradients = gradients_of(parent), gradients_of(child)
    state = {
        n: {"exp_avg": g, "exp_avg_sq": g.square(), "step": torch.tensor(5.0)}
        for n, g in before.items()
    }
    derived = derive_opt_state(state, provenance, {n: g.shape for n, g in gradients.items()})
    scaled = 0
    for name, blocks in provenance.items():
        covered = torch.zeros_like(gradients[name], dtype=torch.bool)
        for block in blocks:
            covered[tuple(slice(*s) for s in block.child_index)] = True
            scaled += block.coefficient != 1
        if not blocks:
            assert name not in derived
            continue
        expected = torch.where(covered, gradients[name], 0.0)
        close: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-8}
        torch.testing.assert_close(derived[name]["exp_avg"], expected, **close)
        torch.testing.assert_close(derived[name]["exp_avg_sq"], expected.square(), **close)
        assert derived[name]["step"] == 5
    assert scaled


def optimizer_of(name: str, model: Any) -> Any:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    if name == "muon":
        return torch.optim.Muon(matrices, lr=1e-3)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if name == "amsgrad":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    return torch.optim.Adafactor(model.parameters(), lr=1e-3)


def by_name(optimizer: Any, model: Any) -> dict[str, dict[str, Tensor]]:
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: dict(entry) for p, entry in optimizer.state.items()}


@pytest.mark.parametrize("name", ["muon", "sgd", "amsgrad", "adafactor"])
def test_every_built_in_optimizer_steps_on_from_the_derived_state(name: str) -> None:
    parent = trained(config_of())
    optimizer = optimizer_of(name, parent)
    gradients_of(parent)
    optimizer.step()
    child, provenance = child_of(parent, config_of(layers=3, groups=2))
    shapes = {n: p.shape for n, p in child.named_parameters()}
    derived = derive_opt_state(by_name(optimizer, parent), provenance, shapes)
    # Every tensor is wider, and Adafactor's factors of a wider tensor cannot be had.
    had = set() if name == "adafactor" else by_name(optimizer, parent).keys()
    assert derived.keys() == {n for n, bs in provenance.items() if any(b.parent in had for b in bs)}
    heir = optimizer_of(name, child)
    parameters = dict(child.named_parameters())
    for key, entry in derived.items():
        heir.state[parameters[key]] = entry
    gradients_of(child)
    heir.step()
    assert all(p.isfinite().all() for p in child.parameters())


def test_a_copy_carries_state_of_any_kind() -> None:
    parent = trained(config_of())
    optimizer = optimizer_of("adafactor", parent)
    gradients_of(parent)
    optimizer.step()
    child, provenance = child_of(parent, config_of(layers=3))
    state = by_name(optimizer, parent)
    derived = derive_opt_state(state, provenance, {n: p.shape for n, p in child.named_parameters()})
    assert derived.keys() == {n for n, blocks in provenance.items() if blocks}
    for name, entry in derived.items():
        source = state[provenance[name][0].parent]
        assert all(torch.equal(entry[k], source[k]) for k in source)


def test_growth_is_deterministic_and_leaves_its_sources_alone() -> None:
    parent = trained(config_of("llama", tied=False))
    config = config_of("llama", layers=3, groups=2, tied=False)
    before = {n: t.clone() for n, t in weights_of(parent).items()}
    fresh = weights_of(build(config, seed=1))
    kept = {n: t.clone() for n, t in fresh.items()}
    first, second = (grow(parent.config, weights_of(parent), config, fresh)[0] for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    first["model.norm.weight"].zero_()
    assert all(torch.equal(before[n], t) for n, t in weights_of(parent).items())
    assert all(torch.equal(kept[n], t) for n, t in fresh.items())


def test_the_child_decides_precision() -> None:
    parent = trained(config_of(), dtype=torch.bfloat16)
    config = config_of(groups=2)
    grown, _ = grow(parent.config, weights_of(parent), config, weights_of(build(config, seed=1)))
    assert {t.dtype for t in grown.values()} == {torch.float32}


def test_the_plan_names_its_operators() -> None:
    before, after = config_of(), config_of(layers=3, groups=2, inner=100)
    assert [o.name for o in plan(before, after).operators] == [
        "identity-blocks",
        "residual-width",
        "mlp-width",
        "heads",
    ]
    assert plan(before, before).operators == ()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
YARN |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({}, {"layers": 1}, "num_hidden_layers shrinks from 2 to 1"),
        ({}, {"groups": 2, "ratio": 1}, "query heads per KV head shrinks from 2 to 1"),
        ({}, {"inner": 40}, "intermediate_size shrinks"),
        ({}, {"tied": False}, "tie_word_embeddings changes"),
        ({}, {"family": "llama"}, "a llama cannot continue a qwen2"),
        ({}, {"head": 12, "width": 16}, "no multiple"),
        ({"family": "qwen3"}, {"family": "qwen3", "head": 16, "width": 16}, "untrainable"),
        ({"rope_parameters": YARN}, {"rope_parameters": YARN, "head": 16}, "'yarn'"),
        ({}, {"rope_parameters": YARN}, "rope_parameters changes"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_words(
    before: dict[str, Any], after: dict[str, Any], reason: str
) -> None:
    parent, child = config_of(**before), config_of(**after)
    assert reason in (refusal(parent, child) or "")
    with pytest.raises(ConfigError):
        plan(parent, child)


def test_an_epsilon_that_does_not_follow_the_width_is_refused() -> None:
    wide = config_of(groups=2)
    wide.rms_norm_eps = config_of().rms_norm_eps
    assert "needs rms_norm_eps" in (refusal(config_of(), wide) or "")


def test_another_family_is_copied_but_not_grown() -> None:
    small = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=60, n_positions=32)
    large = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=60, n_positions=32)
    assert "can only be continued in its own shape" in (refusal(small, large) or "")
    assert "n_layer" in (refusal(small, large) or "")
    parent = trained(small)
    child, provenance = child_of(parent, GPT2Config(**{**small.to_dict(), "eos_token_id": 5}))
    assert logits_difference(parent, child, TOKENS) == 0
    assert inherited_share(provenance, {n: t.shape for n, t in weights_of(child).items()}) == 1


def test_weights_that_belie_their_configuration_are_refused() -> None:
    before, after = config_of(), config_of(groups=2)
    weights, fresh = weights_of(build(before, seed=0)), weights_of(build(after, seed=0))
    with pytest.raises(ConfigError, match=r"lack model\.norm\.weight"):
        grow(before, {k: v for k, v in weights.items() if k != "model.norm.weight"}, after, fresh)
    with pytest.raises(ConfigError, match="does not fit"):
        grow(before, {**weights, "model.norm.weight": torch.ones(3)}, after, fresh)


def test_new_blocks_are_spread_evenly() -> None:
    def places(parent: int, child: int) -> tuple[int | None, ...] | None:
        return inherited_layers(["full"] * parent, ["full"] * child)

    assert places(3, 6) == (0, None, 1, None, 2, None)
    assert places(4, 5) == (0, 1, None, 2, 3)
    assert places(2, 2) == (0, 1)
    assert places(1, 3) == (None, 0, None)

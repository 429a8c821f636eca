"""What a strategy multiplies is counted as torch sees it, and agrees with the host's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ars_kit.ledger import counting
from ars_kit.models import build, flops_per_token
from ars_kit.shapes import ARCHITECTURES, embedded_config

TOKENS = torch.zeros(2, 32, dtype=torch.int64)


def model_of(architecture: str, attention: str) -> Any:
    config = embedded_config(
        3, vocab_size=300, context=32, aspect=12, architecture=architecture,
    )  # fmt: skip
    model = build(config, seed=0)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_pass_costs_a_third_of_the_formula(architecture: str, attention: str) -> None:
    model = model_of(architecture, attention)
    expected = flops_per_token(model.config, 32) * TOKENS.numel() / 3
    with counting() as account, torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    assert account.flops == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_and_backward_cost_the_formula(architecture: str) -> None:
    model = model_of(architecture, "eager")
    expected = flops_per_token(model.config, 32) * TOKENS.numel()
    with counting() as account:
        model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
    assert account.flops == pytest.approx(expected, rel=0.01)


def test_the_cpu_s_attention_is_counted_with_what_its_backward_computes_again() -> None:
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * 2 * 4 * 16 * 16 * 8
    with counting() as account:
        out = attend(q, k, v, is_causal=True)
    assert account.flops == 2 * product
    with counting() as account:
        out.sum().backward()
    assert account.flops == 5 * product  # the scores once more, and two for each of the two


def test_a_decomposition_is_counted() -> None:
    with counting() as account:
        torch.linalg.svd(torch.randn(3, 10, 20), full_matrices=False)
    assert account.flops == 3 * (6 * 20 * 100 + 20 * 1000)


def test_what_multiplies_nothing_costs_nothing() -> None:
    with counting() as account:
        torch.randn(100).softmax(0).sum()
    assert account.flops == 0

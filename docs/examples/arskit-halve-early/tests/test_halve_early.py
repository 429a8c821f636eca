"""The gate keeps every gate's rules, and does what it says."""

from __future__ import annotations

import pytest
import torch
from ars_kit.damping import DampedOptimizer
from ars_kit.testing import check_gate

from arskit_halve_early import HalveEarly


def test_the_gate_keeps_the_rules() -> None:
    check_gate(HalveEarly)


def test_the_first_step_is_halved() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    gates = {"halve-early": HalveEarly(steps=1)}
    optimizer = DampedOptimizer(torch.optim.SGD([weight], lr=0.1), gates)
    for _ in range(2):
        weight.grad = torch.ones(())
        optimizer.step(loss=torch.ones(()))
    assert weight.item() == pytest.approx(1 - 0.05 - 0.1)

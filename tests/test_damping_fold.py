"""How a step's factors reach the base: without waiting for the device, and in how many passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ars_kit.damping import DampedOptimizer
from ars_kit.errors import ConfigError
from ars_kit.spec import Damping, StepSignal
from ars_kit.testing import WAITS
from ars_kit_plugins.ars import ARS
from ars_kit_plugins.gating import ClipGate, Guard, NormMemory, SurpriseGate, TensorState

WIDE = 64
"""Larger than any gate's window, so that what touches so many numbers touches gradients."""


READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}
"""Methods of a tensor that wait for it; on the CPU some of them reach no operator."""


class Reading(TorchFunctionMode):
    """Notes every function and method of tensors that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func.__name__)
        return func(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    """Notes every operator, and those that touch as much as a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.passes: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.called.append(name)
        touched = tree_leaves([args, kwargs or {}])
        if any(isinstance(t, torch.Tensor) and t.numel() >= WIDE * WIDE for t in touched):
            self.passes.append(name)
        return func(*args, **(kwargs or {}))


class Ask(TensorState):
    """Asks for what it is told to ask for."""

    def __init__(self, damping: Damping) -> None:
        self.damping = damping

    def __call__(self, signal: StepSignal) -> Damping:
        return self.damping


def weight() -> torch.nn.Parameter:
    rng = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(WIDE, WIDE, generator=rng))


def gradient(step: int) -> torch.Tensor:
    return torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(step + 1))


FOLDING: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "sgd-dampened": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5, fused=True),
}


def loss_at(step: int) -> float:
    """Calm, with two surprises in a row, a NaN, and a stretch that oscillates."""
    if step in (30, 31):
        return 3.0
    return math.nan if step == 35 else 1.0 + 0.3 * (step % 2) * (step > 60)


def train(optimizer: DampedOptimizer, steps: range) -> None:
    p = optimizer.param_groups[0]["params"][0]
    for step in steps:
        p.grad = gradient(step)
        optimizer.step(loss=torch.tensor(loss_at(step)))


@pytest.mark.parametrize("base", FOLDING)
def test_folded_or_read_the_factors_do_the_same(base: str) -> None:
    weights = []
    for fold in (False, True):
        p = weight()
        optimizer = ARS(FOLDING[base]([p]), fold=fold)
        train(optimizer, range(160))
        summary = optimizer.summary()
        assert summary["skipped"] == 1
        assert summary["gates"]["surprise"] < 1
        assert summary["gates"]["entropy"] < 1
        weights.append(p)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", FOLDING)
def test_a_folded_step_waits_for_nothing(base: str) -> None:
    optimizer = ARS(FOLDING[base]([weight()]), fold=True)
    train(optimizer, range(1))
    with Watching() as operators, Reading() as methods:
        train(optimizer, range(1, 80))
    assert not (WAITS | READS) & {*operators.called, *methods.called}
    with Reading() as methods:
        optimizer.drain()
    assert methods.called & READS, "the watch sees nothing"


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("gates", "passes"),
    [
        ({"surprise": SurpriseGate()}, []),
        ({"guard": Guard(), "surprise": SurpriseGate()}, ["_foreach_norm"]),
        ({"guard": Guard(), "memory": NormMemory()}, ["_foreach_norm", "_foreach_mul_"]),
        (
            {"guard": Guard(), "clip": ClipGate(limit=1e-3), "memory": NormMemory()},
            ["_foreach_norm", "_foreach_mul_"],
        ),
    ],
)
def test_gradients_are_read_once_and_multiplied_once_at_most(
    gates: dict[str, Any], passes: list[str], *, fold: bool
) -> None:
    optimizer = DampedOptimizer(FOLDING["adamw"]([weight()]), gates, fold=fold)
    train(optimizer, range(3))
    p = optimizer.param_groups[0]["params"][0]
    p.grad = gradient(3)
    with Watching() as seen:
        optimizer.step(loss=torch.tensor(1.0))
    assert seen.passes == [*passes, "_fused_adamw_"]


def test_one_factor_is_folded_without_a_pass() -> None:
    """Read by the host it costs one multiplication; the kernel takes it for nothing."""
    for fold, passes in ((True, []), (False, ["_foreach_mul_"])):
        gates = {"half": Ask(Damping(gradient=torch.tensor(0.5)))}
        optimizer = DampedOptimizer(FOLDING["adamw"]([weight()]), gates, fold=fold)
        train(optimizer, range(1))
        optimizer.param_groups[0]["params"][0].grad = gradient(1)
        with Watching() as seen:
            optimizer.step(loss=torch.tensor(1.0))
        assert seen.passes == [*passes, "_fused_adamw_"]


@pytest.mark.parametrize("base", FOLDING)
@pytest.mark.parametrize("fold", [False, True])
def test_a_first_step_that_is_skipped_leaves_no_trace(base: str, *, fold: bool) -> None:
    late, plain = weight(), weight()
    optimizer = DampedOptimizer(FOLDING[base]([late]), {"guard": Guard()}, fold=fold)
    late.grad = torch.full_like(late, math.nan)
    optimizer.step(loss=torch.tensor(1.0))
    assert torch.equal(late, plain)
    bare = FOLDING[base]([plain])
    for step in range(3):
        late.grad, plain.grad = gradient(step), gradient(step)
        optimizer.step(loss=torch.tensor(1.0))
        bare.step()
    torch.testing.assert_close(late, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", FOLDING)
def test_undamped_a_folded_step_is_the_base_s_bit_for_bit(base: str) -> None:
    ours, plain = weight(), weight()
    optimizer = DampedOptimizer(FOLDING[base]([ours]), {"guard": Guard()}, fold=True)
    bare = FOLDING[base]([plain])
    for step in range(5):
        ours.grad, plain.grad = gradient(step), gradient(step)
        optimizer.step(loss=torch.tensor(1.0))
        bare.step()
    assert torch.equal(ours, plain)


def test_nothing_of_a_fold_stays_behind() -> None:
    base = FOLDING["adamw"]([weight()])
    half = Damping(step=torch.tensor(0.5))
    optimizer = DampedOptimizer(base, {"half": Ask(half)}, fold=True)
    train(optimizer, range(2))
    assert base.param_groups[0]["lr"] == 0.01
    assert not {"grad_scale", "found_inf"} & base.__dict__.keys()
    base.step = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        train(optimizer, range(2, 3))
    assert base.param_groups[0]["lr"] == 0.01
    assert not {"grad_scale", "found_inf"} & base.__dict__.keys()


def test_only_what_can_fold_is_told_to() -> None:
    class Own(torch.optim.AdamW):
        pass

    for base in (
        torch.optim.AdamW([weight()], foreach=True),
        torch.optim.Adafactor([weight()]),
        Own([weight()], fused=True),
    ):
        with pytest.raises(ConfigError, match="only a fused Adam, AdamW or SGD folds"):
            ARS(base, fold=True)


@pytest.mark.parametrize("fold", [None, True])
def test_a_scaler_leaves_unscaling_to_a_fused_base(*, fold: bool | None) -> None:
    ours, plain = weight(), weight()
    optimizer = ARS(FOLDING["adamw"]([ours]), fold=fold)
    bare = ARS(FOLDING["adamw"]([plain]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(45):
        factor = math.inf if step == 40 else 1.0
        ours.grad = scaler.scale(gradient(step)) * factor
        plain.grad = gradient(step) * factor
        loss = torch.tensor(loss_at(step))
        scaler.step(optimizer, loss=loss)
        scaler.update()
        bare.step(loss=loss)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    # The gates see unscaled norms and remember the loss of a step that overflowed as the guard's.
    assert repr(optimizer.drain()) == repr(bare.drain())
    assert optimizer.summary()["skipped"] == 2
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("fold", [None, True])
def test_a_scaler_s_skip_needs_no_guard(*, fold: bool | None) -> None:
    p = weight()
    optimizer = DampedOptimizer(FOLDING["adamw"]([p]), {"surprise": SurpriseGate()}, fold=fold)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    p.grad = scaler.scale(gradient(0)) * math.inf
    scaler.step(optimizer, loss=torch.tensor(1.0))
    assert torch.equal(p, weight())
    assert optimizer.drain()[0]["skipped"]


def test_told_no_loss_a_scaler_drives_the_base_alone() -> None:
    ours, plain = weight(), weight()
    pair = [(ours, ARS(FOLDING["adamw"]([ours]))), (plain, FOLDING["adamw"]([plain]))]
    for p, optimizer in pair:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(4):
            p.grad = scaler.scale(gradient(step)) * (math.inf if step == 2 else 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert torch.equal(ours, plain)

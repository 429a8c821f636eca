from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import signal_of

from ars_kit.damping import DampedOptimizer
from ars_kit.errors import PluginError
from ars_kit.factors import alignment_of
from ars_kit.inherit import load_named_state
from ars_kit.spec import Damping, StepSignal
from ars_kit.state import pack, unpack
from ars_kit_plugins import optimizers
from ars_kit_plugins.ars import ARS
from ars_kit_plugins.gating import ClipGate, EntropyGuard, Guard, NormMemory, SurpriseGate


class Factor:
    """A gate that always answers the same."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, signal: StepSignal) -> Any:
        return self.answer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        assert not state


def problem() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(8, 8)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source))
    return model, torch.randn(64, 8, generator=source), torch.randn(64, 8, generator=source)


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {"params": [p], "names": [n], "role": "matrix" if p.ndim == 2 else "vector", "lr": 0.01,
         "weight_decay": 0.0}
        for n, p in named.items()
    ]  # fmt: skip


def train(optimizer: Any, task: Any, steps: int, *, spoil: dict[int, float] | None = None) -> None:
    model, x, y = task
    for i in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        for p in model.parameters():
            p.grad.mul_((spoil or {}).get(i, 1.0))
        optimizer.step(loss=loss) if isinstance(optimizer, DampedOptimizer) else optimizer.step()


def named_state(optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if p in optimizer.state
    }


BASES = {
    "adamw": lambda m: optimizers.adamw(groups_of(m), lr=0.01),
    "sgd": lambda m: optimizers.sgd(groups_of(m), lr=0.01),
    "adafactor": lambda m: optimizers.adafactor(groups_of(m), lr=0.01),
    "muon": lambda m: optimizers.muon(groups_of(m), lr=0.01),
    "foreach": lambda m: torch.optim.AdamW(groups_of(m), foreach=True),
    "loop": lambda m: torch.optim.AdamW(groups_of(m), foreach=False),
}


@pytest.mark.parametrize("base", BASES)
def test_undamped_is_bit_identical_to_the_base(base: str) -> None:
    plain, damped = problem(), problem()
    train(BASES[base](plain[0]), plain, 20)
    wrapped = DampedOptimizer(
        BASES[base](damped[0]), {"guard": Guard(), "surprise": SurpriseGate()}
    )
    train(wrapped, damped, 20)
    assert torch.equal(plain[0].weight, damped[0].weight)
    assert wrapped.summary()["damping"] == 1.0


def test_without_a_loss_it_is_the_base() -> None:
    plain, damped = problem(), problem()
    train(BASES["adamw"](plain[0]), plain, 5)
    optimizer = ARS(BASES["adamw"](damped[0]))
    model, x, y = damped
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert torch.equal(plain[0].weight, model.weight)


@pytest.mark.parametrize("fold", [None, True])
def test_a_bad_gradient_touches_nothing(fold: bool | None) -> None:
    task = problem()
    optimizer = DampedOptimizer(BASES["adamw"](task[0]), {"guard": Guard()}, fold=fold)
    train(optimizer, task, 5)
    before = copy.deepcopy((task[0].state_dict(), named_state(optimizer.base)))
    train(optimizer, task, 1, spoil={0: float("nan")})
    after = task[0].state_dict(), named_state(optimizer.base)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.summary()["skipped"] == 1


@pytest.mark.parametrize("fold", [None, True])
@pytest.mark.parametrize(
    ("damping", "lr", "spoil"),
    [
        (Damping(step=torch.tensor(0.5)), 0.005, 1.0),
        (Damping(gradient=torch.tensor(0.25)), 0.01, 0.25),
        (Damping(gradient=torch.tensor([0.25, 0.25])), 0.01, 0.25),
    ],
)
def test_factors_act_where_they_say(
    fold: bool | None, damping: Damping, lr: float, spoil: float
) -> None:
    plain, damped = problem(), problem()
    train(
        torch.optim.SGD(plain[0].parameters(), lr=lr, fused=True),
        plain,
        3,
        spoil=dict.fromkeys(range(3), spoil),
    )
    base = torch.optim.SGD(damped[0].parameters(), lr=0.01, fused=True)
    optimizer = DampedOptimizer(base, {"f": Factor(damping)}, fold=fold)
    train(optimizer, damped, 3)
    torch.testing.assert_close(plain[0].weight, damped[0].weight)
    assert float(base.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_a_spike_is_damped_before_the_moments() -> None:
    clean, spiked, plain = problem(), problem(), problem()
    gates = {"clip": ClipGate(limit=5.0)}
    train(DampedOptimizer(BASES["adamw"](clean[0]), gates), clean, 60)
    train(DampedOptimizer(BASES["adamw"](spiked[0]), gates), spiked, 60, spoil={40: 1000.0})
    train(BASES["adamw"](plain[0]), plain, 60, spoil={40: 1000.0})
    moved = [(t[0].weight - clean[0].weight).norm() for t in (spiked, plain)]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("base", BASES)
def test_resume_is_exact(base: str) -> None:
    whole, first = problem(), problem()
    train(ARS(BASES[base](whole[0])), whole, 60)
    optimizer = ARS(BASES[base](first[0]))
    train(optimizer, first, 30)
    state = copy.deepcopy(optimizer.state_dict())
    second = problem()
    second[0].load_state_dict(first[0].state_dict())
    resumed = ARS(BASES[base](second[0]))
    resumed.load_state_dict(state)
    train(resumed, second, 30)
    assert torch.equal(whole[0].weight, second[0].weight)
    assert resumed.summary()["steps"] == 60


def test_state_loads_without_pickle(tmp_path: Any) -> None:
    task = problem()
    optimizer = ARS(BASES["adamw"](task[0]))
    train(optimizer, task, 3)
    torch.save(optimizer.state_dict(), tmp_path / "s.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))


def test_named_state_moves_between_optimizers() -> None:
    first, second = problem(), problem()
    a, b = BASES["adamw"](first[0]), BASES["adamw"](second[0])
    train(a, first, 3)
    load_named_state(b, named_state(a))
    second[0].load_state_dict(first[0].state_dict())
    train(a, first, 3)
    train(b, second, 3)
    assert torch.equal(first[0].weight, second[0].weight)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
    ],
)
def test_schedulers_see_an_optimizer(scheduler: Any) -> None:
    task = problem()
    optimizer = ARS(torch.optim.AdamW(task[0].parameters(), lr=0.01))
    schedule = scheduler(optimizer)
    train(optimizer, task, 3)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"]
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_closures_and_hooks_work() -> None:
    model, x, y = problem()
    optimizer = ARS(torch.optim.AdamW(model.parameters(), lr=0.01))
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert len(called) == 5
    assert len(optimizer.drain()) == 5


@pytest.mark.parametrize(
    "answer", [0.5, None, Damping(gradient=torch.ones(1, 1, 1)), Damping(step=torch.ones(2))]
)
def test_a_wrong_answer_is_named(answer: Any) -> None:
    task = problem()
    with pytest.raises(PluginError, match="'bad' returned"):
        train(DampedOptimizer(BASES["adamw"](task[0]), {"bad": Factor(answer)}), task, 1)


def test_a_gate_that_acts_nowhere_is_named() -> None:
    class Typo(Guard):
        acts_on = "lr"

        def __call__(self, signal: StepSignal) -> Any:
            return torch.ones_like(signal.loss)

    model = torch.nn.Linear(2, 1)
    optimizer = DampedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"typo": Typo()})
    with pytest.raises(PluginError, match="'typo' says acts_on = 'lr'; it must be 'gradient' or"):
        optimizer.step(loss=torch.tensor(1.0))


@pytest.mark.parametrize("factor", [float("nan"), -0.1, 1.5])
def test_a_factor_out_of_range_is_surfaced(factor: float) -> None:
    task = problem()
    optimizer = DampedOptimizer(BASES["adamw"](task[0]), {"bad": Factor(torch.tensor(factor))})
    train(optimizer, task, 2)
    with pytest.raises(PluginError, match=r"'bad' returned a factor outside \[0, 1\]"):
        optimizer.drain()


def test_a_gate_that_raises_is_named_with_its_step() -> None:
    class Raises(Factor):
        def __call__(self, signal: StepSignal) -> Any:
            if signal.step == 3:
                raise KeyError("x")
            return torch.ones(())

    task = problem()
    with pytest.raises(PluginError, match="'bad' failed at step 3: KeyError"):
        train(DampedOptimizer(BASES["adamw"](task[0]), {"bad": Raises(0)}), task, 9)


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_alignment_is_the_cosine_with_the_first_moment(base: str) -> None:
    seen: list[Any] = []

    class Looks(Factor):
        def __call__(self, signal: StepSignal) -> Any:
            seen.append(signal.alignment())
            return torch.ones(())

    model, x, y = problem()
    optimizer = DampedOptimizer(BASES[base](model), {"looks": Looks(0)})
    moment = "exp_avg" if base == "adamw" else "momentum_buffer"
    wanted = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        if optimizer.state:
            first = [optimizer.state[p][moment].flatten() for p in model.parameters()]
            wanted.append(torch.cosine_similarity(grads, torch.cat(first), dim=0))
        optimizer.step(loss=loss)
    assert seen[0].isnan()
    assert torch.stack(seen[1:]) == pytest.approx(torch.stack(wanted), abs=1e-6)


def test_without_a_first_moment_nobody_knows_the_alignment() -> None:
    model, _, _ = problem()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    bare.step()
    assert alignment_of(bare, torch.ones(4)).isnan()


def test_a_step_that_broke_off_is_taken_up_with_the_answers_it_had() -> None:
    """Gates that learned from the step before another one raised do not learn from it twice."""

    class Raises(Factor):
        broken = True

        def __call__(self, signal: StepSignal) -> Any:
            if signal.step == 40 and self.broken:
                raise KeyError("x")
            return torch.ones(())

    def optimizer(task: Any) -> DampedOptimizer:
        gates = {"surprise": SurpriseGate(), "norm-memory": NormMemory(), "bad": Raises(0)}
        return DampedOptimizer(BASES["adamw"](task[0]), gates)

    def weights(task: Any) -> list[torch.Tensor]:
        return [p.detach().clone() for p in task[0].parameters()]

    whole, broken, again = problem(), problem(), problem()
    ends = optimizer(whole)
    ends.gates["bad"].broken = False  # type: ignore[attr-defined]
    train(ends, whole, 60)

    breaks = optimizer(broken)
    with pytest.raises(PluginError, match="'bad' failed at step 40"):
        train(breaks, broken, 60)
    assert breaks.intact
    tensors, skeleton = pack(breaks.state_dict())
    again[0].load_state_dict(broken[0].state_dict())
    resumed = optimizer(again)
    resumed.load_state_dict(unpack(tensors, skeleton))
    resumed.gates["bad"].broken = False  # type: ignore[attr-defined]
    train(resumed, again, 20)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_a_base_that_raises_is_named_only_where_its_plugin_is_known() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise KeyError("base")

    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    plain = DampedOptimizer(Broken([weight], lr=0.1), {"f": Factor(torch.ones(()))})
    with pytest.raises(KeyError, match="base"):
        plain.step(loss=torch.ones(()))
    named = DampedOptimizer(
        Broken([weight], lr=0.1), {"f": Factor(torch.ones(()))}, owners={None: "'b' (dist 1)"}
    )
    with pytest.raises(PluginError, match=r"of plugin 'b' \(dist 1\) failed at step 0"):
        named.step(loss=torch.ones(()))
    assert not named.intact


def ask(gate: Any, losses: list[float]) -> list[Damping]:
    return [gate(signal_of(i, v)) for i, v in enumerate(losses)]


def test_surprise_follows_its_formula() -> None:
    # All but two of the window are 1, so the deviation is 0 and sigma its floor, 0.02.
    found = ask(SurpriseGate(damping=0.1), [1.0] * 20 + [1.2, 1.4])
    assert all(float(f.gradient) == 1 for f in found[:20])
    first, second = found[20:]
    assert float(first.gradient) == pytest.approx((4 / 10) ** 2, rel=1e-4)
    assert float(first.step) == 1
    assert float(second.gradient) == pytest.approx((4 / 20) ** 2, rel=1e-4)
    assert float(second.step) == pytest.approx((4 / 20) ** 2, rel=1e-4)


def test_surprise_lets_a_lasting_shift_through() -> None:
    found = ask(SurpriseGate(patience=8), [1.0] * 20 + [5.0] * 40)
    damped = [float(f.gradient) < 1 for f in found]
    assert sum(damped) == 8
    assert damped[20:28] == [True] * 8


def test_surprise_never_answers_nan() -> None:
    found = ask(SurpriseGate(), [1.0] * 20 + [float("inf"), float("nan"), 1e38, -1e38, 0.0] * 8)
    assert all(0 <= float(f.gradient) <= 1 and 0 <= float(f.step) <= 1 for f in found)


def test_entropy_guard_damps_oscillation_and_recovers() -> None:
    found = ask(EntropyGuard(), [1.0, 2.0] * 100 + [1.5 - 0.01 * i for i in range(400)])
    factors = [float(f) for f in found]
    assert min(factors) == pytest.approx(0.1)
    assert factors[-1] > 0.9

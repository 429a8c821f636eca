"""Whatever torch can hand over: any optimizer, loss, gradient, state, and order of calls."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from ars_kit.damping import DampedOptimizer
from ars_kit.errors import ConfigError
from ars_kit.spec import Damping, StepSignal
from ars_kit_plugins.ars import ARS
from ars_kit_plugins.gating import Guard, TensorState


class Note(TensorState):
    """Halves gradients and keeps what it saw."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.turns: list[float] = []

    def __call__(self, signal: StepSignal) -> torch.Tensor:
        self.losses.append(signal.loss)
        self.norms.append(signal.norms())
        self.turns.append(float(signal.alignment()))
        return signal.loss.new_full((), 0.5)


class Remember(TensorState):
    """Keeps a sum and a generator's state."""

    remembers = ("sum", "rng")

    def __init__(self) -> None:
        self.sum: Any = torch.zeros(())
        self.rng: Any = torch.Generator().get_state()

    def __call__(self, signal: StepSignal) -> torch.Tensor:
        self.sum = self.sum + signal.loss
        return torch.ones_like(signal.loss)


def noted(base: torch.optim.Optimizer, **told: Any) -> tuple[DampedOptimizer, Note]:
    note = Note()
    return DampedOptimizer(base, {"note": note}, **told), note


# --- optimizers ------------------------------------------------------------------------------

KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"LBFGS", "SparseAdam"}))
def test_any_optimizer_of_torch_is_wrapped(name: str) -> None:
    """Told no loss it is the base; told one it trains damped and goes on exactly."""

    def pair() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        p = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10)
        return p, KINDS[name]([p], lr=0.01)

    def step(p: torch.nn.Parameter, optimizer: Any, i: int, **told: Any) -> None:
        p.grad = torch.full((3, 4), 0.1 * (i + 1))
        optimizer.step(**told)

    (plain, bare), (silent, base), (whole, base2) = pair(), pair(), pair()
    optimizer = ARS(base)
    for i in range(4):
        step(plain, bare, i)
        step(silent, optimizer, i)
    assert torch.equal(plain, silent)
    optimizer = ARS(base2)
    for i in range(30):
        step(whole, optimizer, i, loss=torch.tensor(9.0 if i == 25 else 1.0))
        if i == 20:
            kept = copy.deepcopy((whole.data, optimizer.state_dict()))
    again, base3 = pair()
    again.data.copy_(kept[0])
    resumed = ARS(base3)
    resumed.load_state_dict(kept[1])
    for i in range(21, 30):
        step(again, resumed, i, loss=torch.tensor(9.0 if i == 25 else 1.0))
    assert torch.equal(whole, again)
    assert resumed.drain()[4]["surprise"] < 0.01


def test_sparse_gradients_are_measured_and_damped() -> None:
    tables = [torch.nn.Embedding(10, 4, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    rows = torch.tensor([1, 1, 7])  # a row met twice has one gradient, the sum
    optimizer, note = noted(torch.optim.SparseAdam(tables[0].parameters()))
    tables[0](rows).sum().backward()
    optimizer.step(loss=torch.tensor(1.0))
    assert note.norms[0].tolist() == pytest.approx([(4 * 2**2 + 4) ** 0.5])
    tables[1](rows).sum().mul(0.5).backward()
    torch.optim.SparseAdam(tables[1].parameters()).step()
    assert torch.equal(tables[0].weight, tables[1].weight)
    optimizer.step(loss=torch.tensor(1.0))  # there is a moment now, but not of that shape


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="LBFGS evaluates the loss itself"):
        ARS(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))]))


# --- losses ----------------------------------------------------------------------------------


def one() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p, torch.optim.SGD([p], lr=0.1)


@pytest.mark.parametrize(
    "loss",
    [
        2.5,
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([2.5], requires_grad=True),
    ],
    ids=["float", "double", "bfloat16", "one-element"],
)
def test_a_loss_is_one_number_in_any_form(loss: Any) -> None:
    _, base = one()
    optimizer, note = noted(base)
    optimizer.step(loss=loss)
    (seen,) = note.losses
    assert seen.shape == ()
    assert seen.dtype == torch.float32
    assert not seen.requires_grad
    assert seen.item() == 2.5


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    _, base = one()
    with pytest.raises(ConfigError, match=r"not a tensor of shape \(2,\); take its mean"):
        ARS(base).step(loss=torch.ones(2))


def test_shares_are_summed_and_forgotten() -> None:
    _, base = one()
    optimizer, note = noted(base)
    optimizer.observe(torch.tensor(1.0))
    optimizer.observe(torch.tensor(2.0))
    optimizer.step(loss=torch.tensor(4.0))
    optimizer.step(loss=torch.tensor(8.0))
    assert [float(v) for v in note.losses] == [7.0, 8.0]


def test_a_closure_that_told_its_loss_is_not_heard_twice() -> None:
    _, base = one()
    optimizer, note = noted(base)

    def closure() -> torch.Tensor:
        optimizer.observe(torch.tensor(1.0))
        return torch.tensor(1.0)

    assert float(optimizer.step(closure)) == 1.0
    optimizer.step(lambda: torch.tensor(2.0))
    assert [float(v) for v in note.losses] == [1.0, 2.0]


def test_a_closure_that_returns_nothing_tells_nothing() -> None:
    p, base = one()
    optimizer, note = noted(base)
    assert optimizer.step(lambda: None) is None
    assert note.losses == []
    assert p.tolist() == pytest.approx([0.9, 0.9])


def test_a_loss_goes_with_the_gradients_that_a_scaler_threw_away() -> None:
    p, base = one()
    optimizer, note = noted(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(p.sum() * (float("inf") if overflow else 1.0)).backward()
        optimizer.observe(torch.tensor(3.0))
        scaler.step(optimizer)
        scaler.update()
    assert [float(v) for v in note.losses] == [3.0, 3.0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loss_told_before_the_gradients_are_cleared_counts(*, set_to_none: bool) -> None:
    p, base = one()
    optimizer, note = noted(base)
    for _ in range(3):
        for micro in range(2):
            optimizer.observe(torch.tensor(1.0))
            if micro == 0:
                optimizer.zero_grad(set_to_none)
            p.sum().backward()
        optimizer.step()
    assert [float(v) for v in note.losses][1:] == [2.0, 2.0]


def test_clearing_twice_forgets_no_loss() -> None:
    p, base = one()
    p.grad = None
    optimizer, note = noted(base)
    for _ in range(3):
        optimizer.observe(torch.tensor(1.0))
        optimizer.zero_grad(set_to_none=False)
        p.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert len(note.losses) == 3


# --- gradients -------------------------------------------------------------------------------


def test_norms_are_float32_whatever_the_gradients_are() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    params = [torch.nn.Parameter(torch.ones(4, dtype=kind)) for kind in kinds]
    optimizer, note = noted(torch.optim.SGD(params, lr=1e-5))
    for p in params:
        p.grad = torch.full_like(p, 40960)  # twice that overflows float16
    optimizer.step(loss=torch.tensor(1.0))
    assert note.norms[0].dtype == torch.float32
    assert note.norms[0].tolist() == [81920.0] * 3
    for p in params:
        assert p[0].item() == pytest.approx(1 - 1e-5 * 0.5 * 40960, rel=5e-3)


def test_one_factor_a_tensor_works_at_any_precision() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    params = [torch.nn.Parameter(torch.ones(4, dtype=kind)) for kind in kinds]
    for p in params:
        p.grad = torch.ones_like(p)

    class Each(Note):
        def __call__(self, signal: StepSignal) -> Any:
            return Damping(gradient=torch.tensor([0.5, 0.25, 0.125]))

    DampedOptimizer(torch.optim.SGD(params, lr=1.0), {"each": Each()}).step(loss=1.0)
    assert [p[0].item() for p in params] == [0.5, 0.75, 0.875]


def test_alignment_is_that_of_the_unscaled_gradients() -> None:
    turns = []
    for scale in (1.0, 2.0**10):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer, note = noted(torch.optim.AdamW([p], lr=0.1, fused=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for push in (1.0, 0.5, -1.0):
            p.grad = scaler.scale(torch.tensor([push, 1.0]))
            scaler.step(optimizer, loss=1.0)
            scaler.update()
        turns.append(note.turns[1:])
    assert turns[0] == pytest.approx(turns[1])
    assert 0.9 < turns[0][0] < 1
    assert turns[0][1] < 0.5


def test_parameters_without_a_gradient_are_left_out() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer, note = noted(torch.optim.SGD(params, lr=0.1))
    optimizer.step(loss=1.0)
    params[1].grad = torch.ones(2)
    optimizer.step(loss=1.0)
    assert [n.shape for n in note.norms] == [(0,), (1,)]
    assert [p[0].item() for p in params] == pytest.approx([1, 0.95, 1])


# --- state -----------------------------------------------------------------------------------


def test_a_state_goes_to_the_parameters_device() -> None:
    """The meta device stands for an accelerator: saved on the host, loaded there."""
    _, base = one()
    optimizer = DampedOptimizer(base, {"remember": Remember()})
    optimizer.step(loss=1.0)
    far = torch.nn.Parameter(torch.ones(2, device="meta"))
    gate = Remember()
    loaded = DampedOptimizer(torch.optim.SGD([far], lr=0.1), {"remember": gate})
    loaded.load_state_dict(optimizer.state_dict())
    assert gate.sum.device.type == "meta"
    assert gate.rng.device.type == "cpu", "a generator's state is the host's"
    far.grad = torch.ones(2, device="meta")
    loaded.base.step = lambda: None  # type: ignore[method-assign, assignment, return-value]
    loaded.observe(torch.tensor(1.0))
    assert loaded._memory.loss.told is not None
    assert loaded._memory.loss.told.device.type == "meta"


def test_the_damping_of_the_step_before_survives_a_resume() -> None:
    class Alternate(Note):
        """Halves every other step, by what it did before."""

        def __call__(self, signal: StepSignal) -> torch.Tensor:
            return torch.where(signal.last_damping < 1, 1.0, 0.5)

    _, base = one()
    optimizer = DampedOptimizer(base, {"alternate": Alternate()})
    for _ in range(3):
        optimizer.step(loss=1.0)
    _, base = one()
    resumed = DampedOptimizer(base, {"alternate": Alternate()})
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step(loss=1.0)
    rows = [*optimizer.drain(), *resumed.drain()]
    assert [row["alternate"] for row in rows] == [0.5, 1.0, 0.5, 1.0]


def test_a_gate_that_joins_later_begins_anew() -> None:
    p, base = one()
    optimizer = DampedOptimizer(base, {"remember": Remember()})
    for _ in range(3):
        optimizer.step(loss=1.0)
    gates = {"remember": Remember(), "guard": Guard()}
    joined = DampedOptimizer(torch.optim.SGD([p], lr=0.1), gates)
    joined.load_state_dict(optimizer.state_dict())
    joined.step(loss=1.0)
    assert float(gates["remember"].sum) == 4.0  # type: ignore[attr-defined]
    assert joined.summary()["steps"] == 1
    assert joined.drain()[0]["step"] == 3


def test_a_bare_base_s_state_is_accepted() -> None:
    p, _ = one()
    base = torch.optim.AdamW([p], lr=0.1)
    base.step()
    fresh = ARS(torch.optim.AdamW([p], lr=0.5))
    fresh.load_state_dict(base.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.1
    assert float(fresh.state[p]["step"]) == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_by_itself(how: str) -> None:
    p, base = one()
    optimizer = ARS(base)
    for _ in range(20):
        optimizer.step(loss=1.0)
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    mine = twin.param_groups[0]["params"][0]
    assert mine is not p
    mine.grad, p.grad = torch.ones(2), torch.ones(2)
    before = p.tolist()
    twin.step(loss=9.0)
    assert p.tolist() == before
    optimizer.step(loss=9.0)
    assert torch.equal(p, mine)
    assert repr(twin.drain()) == repr(optimizer.drain())
    assert twin.summary() == optimizer.summary()


def test_hooks_on_states_are_called_and_may_change_them() -> None:
    _, base = one()
    optimizer = ARS(base)
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "more": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {k: v for k, v in s.items() if k != "more"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert called == ["saving", "loaded"]


def test_step_hooks_see_the_wrapper_and_the_loss() -> None:
    _, base = one()
    optimizer = ARS(base)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((o, kwargs)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o))
    optimizer.step(loss=1.0)
    assert seen == [(optimizer, {"loss": 1.0}), optimizer]


def test_groups_may_join_later() -> None:
    _, base = one()
    optimizer, note = noted(base)
    late = torch.nn.Parameter(torch.ones(3))
    late.grad = torch.ones(3)
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    optimizer.step(loss=1.0)
    assert optimizer.param_groups is base.param_groups
    assert late.tolist() == pytest.approx([0.9] * 3)
    assert note.norms[0].shape == (2,)

"""Stepping within the backward pass does what a step after it does, and holds one gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from test_damping_fold import READS, Reading, Watching
from transformers import PreTrainedModel, Qwen2Config

from ars_kit import backward
from ars_kit.backward import InBackward, looks_at_gradients
from ars_kit.damping import DampedOptimizer
from ars_kit.errors import ConfigError, PluginError
from ars_kit.host import Host
from ars_kit.live import LiveBytes
from ars_kit.memory import RECIPES, ChunkedLoss, prepare
from ars_kit.models import build, parameter_groups
from ars_kit.optim import build_optimizer
from ars_kit.resolving import resolve
from ars_kit.schema import Choice, parse_choice
from ars_kit.spec import Damping, StepSignal
from ars_kit.state import pack, unpack
from ars_kit.testing import WAITS
from ars_kit_plugins.gating import ClipGate, Guard, TensorState
from ars_kit_plugins.wrappers import ars_gates

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.installed()


class Student:
    """A small model with recomputed activations and chunked logits, and its optimizer."""

    def __init__(
        self,
        host: Host,
        base: str,
        kind: Callable[..., DampedOptimizer],
        *,
        tied: bool = True,
        layers: int = 1,
    ) -> None:
        config = Qwen2Config(**SIZES, num_hidden_layers=layers, tie_word_embeddings=tied)
        self.model: PreTrainedModel = build(config, seed=0)
        prepare(self.model, RECIPES["lean"])
        self.model.train()
        groups = parameter_groups(
            self.model, lr=1e-3, weight_decay=0.1, lr_width=None, lr_vectors=1e-3
        )
        made = host.make("optimizers", Choice(base), groups, lr=1e-3)
        self.optimizer = kind(made, ars_gates(loss_only=True))
        self.loss_of = ChunkedLoss(self.model, 300 * 10)

    def step(self, step: int, parts: int = 1) -> None:
        """Take a step; the 17th and 18th stand out and are damped, the 19th is skipped."""
        rng = torch.Generator().manual_seed(step)
        window = torch.randint(0, 300, (2, 9), generator=rng)
        scale = {17: 20.0, 18: 20.0, 19: float("nan")}.get(step, 1.0)
        self.take(window, parts, scale)

    def take(self, window: torch.Tensor, parts: int = 1, scale: float = 1.0) -> None:
        """Take a step on token ids, shape (sequences, length + 1)."""
        for micro, part in enumerate(window.chunk(parts), start=1):
            loss = self.loss_of(self.model, part)[1] * scale / parts
            self.optimizer.observe(loss)
            if isinstance(self.optimizer, InBackward) and micro == parts:
                with self.optimizer.in_backward():
                    loss.backward()
            else:
                loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """Return weights and moments."""
        moments, _ = pack(self.optimizer.base.state_dict()["state"])
        # Which parameter was stepped first decides the order of states, and nothing else.
        inner = [moments[name] for name in sorted(moments)]
        return [*(p.detach() for p in self.model.parameters()), *inner]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("base", "tied"), [("adamw", True), ("adamw-8bit", False), ("sgd", True), ("adafactor", False)]
)
@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_the_step_after_the_backward_pass_bit_for_bit(
    host: Host, base: str, tied: bool, parts: int
) -> None:
    found = []
    for kind in (DampedOptimizer, InBackward):
        student = Student(host, base, kind, tied=tied)
        for step in range(21):
            student.step(step, parts)
        rows = student.optimizer.drain()
        dropped = [row.pop("dropped", 0.0) for row in rows]
        found.append((student, rows))
    (usual, was), (within, now) = found
    assert same(usual.tensors(), within.tensors())
    assert repr(was) == repr(now)  # some figures are not numbers
    assert [row["step"] for row in now if row["skipped"]] == [19]
    assert {row["step"] for row in now if row["gradient"] < 1} == {17, 18}
    assert [n for n in dropped if n] == [len(list(within.model.parameters()))]  # of the 19th
    assert all(p.grad is None for p in within.model.parameters())


def test_never_do_two_gradients_stand(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    student, standing = Student(host, "adamw", InBackward), []
    alone = backward.step_alone

    def noting(*args: Any) -> None:
        standing.append(sum(p.grad is not None for p in student.model.parameters()))
        alone(*args)

    monkeypatch.setattr(backward, "step_alone", noting)
    student.step(0)
    assert standing == [1] * len(list(student.model.parameters()))
    assert not any(p._post_accumulate_grad_hooks for p in student.model.parameters())


def test_the_peak_is_lower_by_the_gradients(host: Host) -> None:
    peaks, window = [], torch.zeros((1, 3), dtype=torch.int64)
    for kind in (DampedOptimizer, InBackward):
        student = Student(host, "adamw", kind, layers=6)
        student.step(0)
        with LiveBytes() as live:
            student.take(window)
        peaks.append(live.peak)
    gradients = sum(p.nbytes for p in student.model.parameters())
    assert peaks[0] > gradients
    assert 0.8 * gradients < peaks[0] - peaks[1] < gradients


@contextmanager
def spoilt(parameter: torch.nn.Parameter) -> Iterator[None]:
    """Make a parameter's gradient no number."""
    handle = parameter.register_hook(lambda grad: grad * torch.nan)
    yield
    handle.remove()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("base", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_gradient_that_is_no_number_leaves_its_parameter_as_it_was(
    host: Host, base: str, on_device: bool, first: int
) -> None:
    def kind(*args: Any) -> InBackward:
        return InBackward(*args, on_device=on_device)

    student = Student(host, base, kind)
    for step in range(first):
        student.step(step)
    parameter = student.model.model.layers[0].mlp.up_proj.weight
    state = student.optimizer.base.state
    weights = [p.detach().clone() for p in student.model.parameters()]
    was, _ = pack(dict(state.get(parameter, {})))
    with spoilt(parameter):
        student.step(first)
    changed = [
        not torch.equal(p, w) for p, w in zip(student.model.parameters(), weights, strict=True)
    ]
    assert changed == [p is not parameter for p in student.model.parameters()]
    now, _ = pack(dict(state.get(parameter, {})))
    assert now.keys() == was.keys()
    assert all(torch.equal(now[key], was[key]) for key in was)
    row = student.optimizer.drain()[-1]
    assert (row["dropped"], row["skipped"]) == (1.0, False)
    student.step(first + 1)
    assert student.optimizer.drain()[-1]["dropped"] == 0
    assert all(p.isfinite().all() for p in student.model.parameters())


def test_without_the_guard_nobody_looks(host: Host) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = InBackward(torch.optim.SGD([weight], lr=0.1), {})
    with optimizer.in_backward():
        (weight * torch.nan).sum().backward()
    optimizer.step()
    assert weight.isnan().all()


def test_on_a_device_nothing_is_read(host: Host) -> None:
    def kind(*args: Any) -> InBackward:
        return InBackward(*args, on_device=True)

    student = Student(host, "adamw-8bit", kind)
    student.step(0)  # a state that is not there yet cannot be put back: its first step asks
    window = torch.zeros((2, 9), dtype=torch.int64)
    with Watching() as operators, Reading() as python:
        student.take(window)
    assert "where" in operators.called
    assert not WAITS & {*operators.called}
    assert not READS & python.called
    usual = Student(host, "adamw-8bit", InBackward)
    usual.step(0)
    usual.take(window)
    assert same(usual.tensors(), student.tensors())


def test_a_state_that_was_saved_goes_on_with_the_same_bits(host: Host) -> None:
    whole, first = Student(host, "adamw-8bit", InBackward), Student(host, "adamw-8bit", InBackward)
    for step in range(6):
        whole.step(step)
        if step < 4:
            first.step(step)
    tensors, skeleton = pack(first.optimizer.state_dict())
    later = Student(host, "adamw-8bit", InBackward)
    later.model.load_state_dict(first.model.state_dict())
    later.optimizer.load_state_dict(unpack({k: v.clone() for k, v in tensors.items()}, skeleton))
    for step in range(4, 6):
        later.step(step)
    assert same(whole.tensors(), later.tensors())
    assert later.optimizer.summary()["steps"] == 6


class Late(TensorState):
    """Asks for norms once the loss stands out."""

    def __call__(self, signal: StepSignal) -> torch.Tensor:
        if float(signal.loss) > 20:
            signal.norms()
        return torch.ones_like(signal.loss)


@pytest.mark.parametrize(
    ("gate", "looks"),
    [
        ("guard", False), ("surprise", False), ("entropy", False), ("jitter", False),
        ("skip", False), ("skip:norm=true", True), ("clip", True), ("norm-memory", True),
    ],
)  # fmt: skip
def test_gates_that_look_at_gradients_are_told_from_others(
    host: Host, gate: str, looks: bool
) -> None:
    assert looks_at_gradients(host.make("gates", parse_choice(gate))) is looks


def test_a_gate_that_looks_only_when_the_loss_stands_out_is_found_out() -> None:
    assert looks_at_gradients(Late())


@pytest.mark.parametrize("wrapper", ["ars:loss_only=true", "ars-plan", "ars-paper"])
def test_wrappers_can_do_without_gradients(host: Host, wrapper: str) -> None:
    gates = host.make("wrappers", parse_choice(wrapper))
    assert not any(map(looks_at_gradients, gates.values()))


def test_a_gate_that_asks_for_norms_is_refused_before_anything_is_stepped() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = InBackward(
        torch.optim.SGD([weight], lr=0.1), {"guard": Guard(), "clip": ClipGate()}
    )
    loss = weight.sum()
    optimizer.observe(loss)
    with pytest.raises(PluginError, match="'clip' asks for the norms or the alignment of all"):  # noqa: SIM117
        with optimizer.in_backward():
            loss.backward()
    assert optimizer.intact
    assert torch.equal(weight, torch.ones(3))


class Each(TensorState):
    """Damps each tensor by a factor of its own."""

    def __init__(self, factors: list[float]) -> None:
        self.factors = torch.tensor(factors)

    def __call__(self, signal: StepSignal) -> Damping:
        return Damping(gradient=self.factors)


@pytest.mark.parametrize("on_device", [False, True])
def test_factors_by_tensor_go_to_their_tensors(on_device: bool) -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": weights[:1]}, {"params": weights[1:]}]
    optimizer = InBackward(
        torch.optim.SGD(groups, lr=1.0), {"each": Each([1.0, 0.5, 0.25])}, on_device=on_device
    )
    loss = torch.stack([w.sum() for w in weights]).sum()
    optimizer.observe(loss)
    with optimizer.in_backward():
        loss.backward()
    optimizer.step()
    assert [float(w[0].detach()) for w in weights] == [0.0, 0.5, 0.75]


def test_a_base_that_breaks_off_leaves_it_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    student, calls = Student(host, "adamw", InBackward), []
    alone = backward.step_alone

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        alone(*args)

    monkeypatch.setattr(backward, "step_alone", full)
    with pytest.raises(torch.OutOfMemoryError):
        student.step(0)
    assert not student.optimizer.intact
    assert not any(p._post_accumulate_grad_hooks for p in student.model.parameters())


def test_a_step_without_its_backward_pass_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = InBackward(torch.optim.SGD([weight], lr=0.1), {"guard": Guard()})
    for wrong in ({}, {"loss": 1.0}, {"closure": lambda: 1.0}):
        with pytest.raises(ConfigError, match="observe the loss, then call backward"):
            optimizer.step(**wrong)


def test_a_grad_scaler_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = InBackward(torch.optim.SGD([weight], lr=0.1), {"guard": Guard()})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    loss = weight.sum()
    optimizer.observe(loss)
    with optimizer.in_backward():
        scaler.scale(loss).backward()
    with pytest.raises(ConfigError, match="GradScaler has to see all gradients"):
        scaler.step(optimizer)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_run_without_any_gate_records_its_losses(host: Host, in_backward: bool) -> None:
    """Or its history would be empty, and nobody would watch it."""
    chosen = resolve({"optimizer.name": "adamw", "optimizer.without": ("guard",)}, {}).optimizer
    weight, bare = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_optimizer(
        host, chosen, [{"params": [weight]}], lr=0.1, position=0.0, in_backward=in_backward
    )
    assert not optimizer.gates
    base = host.make("optimizers", chosen.name, [{"params": [bare]}], lr=0.1)
    for _ in range(3):
        loss = weight.square().sum()
        optimizer.observe(loss)
        with optimizer.in_backward() if isinstance(optimizer, InBackward) else nullcontext():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bare.grad = 2 * bare.detach()
        base.step()
    assert torch.equal(weight, bare)  # and does no more than that
    rows = optimizer.drain()
    assert [(r["step"], r["gradient"], r["step_size"]) for r in rows] == [
        (0, 1.0, 1.0), (1, 1.0, 1.0), (2, 1.0, 1.0)
    ]  # fmt: skip
    assert [r["loss"] for r in rows] == pytest.approx([3.0, 2.43, 1.92], abs=0.03)
    assert optimizer.summary() == {"steps": 3, "skipped": 0, "damping": 1.0, "gates": {}}
    optimizer.load_state_dict(unpack(*pack(optimizer.state_dict())))
    assert optimizer.summary()["steps"] == 3

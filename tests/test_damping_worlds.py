"""ARS in other people's training loops: schedulers, accelerate, the Trainer, scalers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from ars_kit_plugins import optimizers
from ars_kit_plugins.ars import ARS

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda s: 0.9**s),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.001, 0.01, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.01, total_steps=12),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.5, total_iters=2), schedules.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.9)]
    ),
}
BASES: dict[str, Callable[[torch.nn.Module], Any]] = {
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "adamw-loop": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "sgd-fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, fused=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "muon": lambda m: optimizers.muon(
        [
            {"params": [p], "role": "matrix" if p.ndim == 2 else "vector", "lr": 0.01,
             "weight_decay": 0.0}
            for p in m.parameters()
        ],
        lr=0.01,
    ),
}  # fmt: skip


def problem(seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    return model, torch.randn(64, 8), torch.randn(64, 4)


def losses_of(model: Any, x: Any, y: Any, optimizer: Any, steps: int, **told: Any) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        if told.get("loss", True):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        found.append(loss.item())
    return found


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_scheduler_of_torch_is_here() -> None:
    known = {
        name
        for name, kind in vars(schedules).items()
        if isinstance(kind, type) and issubclass(kind, schedules.LRScheduler)
    } - {"LRScheduler", "_LRScheduler", "SWALR", "_WarmupLR"}
    assert known <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_rates_they_would_set_the_base(name: str) -> None:
    plain, damped = problem(), problem()
    base = torch.optim.SGD(plain[0].parameters(), lr=0.01, momentum=0.9)
    wrapped = ARS(torch.optim.SGD(damped[0].parameters(), lr=0.01, momentum=0.9))
    pair = [(base, SCHEDULERS[name](base), plain), (wrapped, SCHEDULERS[name](wrapped), damped)]
    for _ in range(8):
        for optimizer, schedule, (model, x, y) in pair:
            losses_of(model, x, y, optimizer, 1, loss=False)
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert wrapped.param_groups[0]["lr"] == base.param_groups[0]["lr"]
    assert base.param_groups[0]["lr"] != 0.01 or name in {"ConstantLR", "LinearLR", "CyclicLR"}
    assert_same(plain[0], damped[0])


@pytest.mark.parametrize("base", BASES)
def test_told_no_loss_it_is_the_base_bit_for_bit(base: str) -> None:
    plain, damped = problem(), problem()
    losses_of(*plain, BASES[base](plain[0]), 6, loss=False)
    losses_of(*damped, ARS(BASES[base](damped[0])), 6, loss=False)
    assert_same(plain[0], damped[0])


@pytest.mark.parametrize("base", BASES)
def test_a_plain_loop_trains_and_resumes_exactly(base: str, tmp_path: Path) -> None:
    whole, first, second = problem(), problem(), problem(1)
    optimizer = ARS(BASES[base](whole[0]))
    found = losses_of(*whole, optimizer, 80)
    assert found[-1] < found[0]
    optimizer = ARS(BASES[base](first[0]))
    losses_of(*first, optimizer, 37)
    torch.save([first[0].state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second[0].load_state_dict(weights)
    resumed = ARS(BASES[base](second[0]))
    resumed.load_state_dict(state)
    assert losses_of(second[0], first[1], first[2], resumed, 43) == found[37:]
    assert_same(whole[0], second[0])


def test_a_compiled_model_trains_damped() -> None:
    # The graph is captured and differentiated ahead of time; the generated kernels are inductor's
    # affair and need a compiler.
    plain, compiled = problem(), problem()
    model = torch.compile(compiled[0], backend="aot_eager")
    eager = losses_of(*plain, ARS(torch.optim.AdamW(plain[0].parameters())), 5)
    optimizer = ARS(torch.optim.AdamW(compiled[0].parameters()))
    assert losses_of(model, compiled[1], compiled[2], optimizer, 5) == pytest.approx(eager)
    assert optimizer.summary()["steps"] == 5


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_of_the_base_is_driven_as_the_plain_one() -> None:
    """The base's step is one graph; a learning rate in a tensor spares it a new one each step."""
    from torch._dynamo.utils import counters

    plain, compiled = problem(), problem()
    eager = losses_of(*plain, ARS(torch.optim.AdamW(plain[0].parameters(), lr=0.01)), 20)
    base = torch.optim.AdamW(compiled[0].parameters(), lr=torch.tensor(0.01))
    base.step = torch.compile(base.step, backend="aot_eager")  # type: ignore[method-assign]
    counters.clear()
    assert losses_of(*compiled, ARS(base), 20) == pytest.approx(eager, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_inside_a_compiled_training_step_ars_stays_itself() -> None:
    from torch._dynamo.utils import counters

    def whole(model: Any, x: Any, y: Any, optimizer: ARS) -> torch.Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        return loss

    found = []
    for function in (whole, torch.compile(whole, backend="aot_eager")):
        model, x, y = problem()
        optimizer = ARS(torch.optim.AdamW(model.parameters(), lr=0.01))
        counters.clear()
        losses = [
            float(function(model, factor * x, factor * y, optimizer).detach())
            for factor in (30.0 if step in (20, 21) else 1.0 for step in range(30))
        ]
        found.append((losses, repr(optimizer.drain())))
        assert optimizer.summary()["damping"] < 1
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2, "its steps were traced"


def test_a_scaler_s_gradients_are_unscaled_before_the_gates_see_them() -> None:
    model, x, y = problem()
    optimizer = ARS(torch.optim.SGD(model.parameters(), lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    twin = copy.deepcopy(model)
    plain = ARS(torch.optim.SGD(twin.parameters(), lr=0.01))
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer, loss=loss)
        scaler.update()
    losses_of(twin, x, y, plain, 5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # A gradient that overflowed is the scaler's to skip; the optimizer is not even asked.
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer, loss=loss)
    assert optimizer.summary()["steps"] == 5


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Let no test see the precision that another chose: it is the process's."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.filterwarnings("ignore")
def test_accelerate_with_accumulation(fresh_accelerate: None) -> None:
    from accelerate import Accelerator

    model, x, y = problem()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner = ARS(torch.optim.AdamW(model.parameters(), lr=0.01))
    wrapped, optimizer = accelerator.prepare(model, inner)
    for micro in range(12):
        with accelerator.accumulate(wrapped):
            half = slice(32 * (micro % 2), 32 * (micro % 2) + 32)
            loss = (wrapped(x[half]) - y[half]).square().mean()
            accelerator.backward(loss)
            inner.observe(loss / 2)
            optimizer.step()
            optimizer.zero_grad()
    rows = inner.drain()
    assert len(rows) == 6
    twin, x, y = problem()
    plain = ARS(torch.optim.AdamW(twin.parameters(), lr=0.01))
    assert [r["loss"] for r in rows] == pytest.approx(losses_of(twin, x, y, plain, 6), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_saves_and_resumes_exactly(
    precision: str, tmp_path: Path, fresh_accelerate: None
) -> None:
    from accelerate import Accelerator

    def begun(seed: int) -> tuple[Any, ...]:
        model, x, y = problem(seed)
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        inner = ARS(torch.optim.AdamW(model.parameters(), lr=0.01))
        schedule = schedules.ExponentialLR(inner, 0.99)
        return accelerator, inner, x, y, *accelerator.prepare(model, inner, schedule)

    def go(run: tuple[Any, ...], steps: range) -> None:
        accelerator, inner, x, y, model, optimizer, schedule = run
        for step in steps:
            for half in (slice(0, 32), slice(32, 64)):
                bad = 30.0 if step == 30 else 1.0
                with accelerator.accumulate(model):
                    loss = (model(bad * x[half]).float() - bad * y[half]).square().mean()
                    accelerator.backward(loss)
                    inner.observe(loss / 2)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    whole, first, again = begun(0), begun(0), begun(0)
    go(whole, range(40))
    go(first, range(20))
    first[0].save_state(str(tmp_path))
    again[0].load_state(str(tmp_path))
    go(again, range(20, 40))
    assert_same(whole[4], again[4])
    rows = whole[1].drain()
    assert len(rows) == 40
    assert rows[30]["surprise"] < 0.1
    assert repr(again[1].drain()) == repr(rows[20:])


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_trains_and_resumes(tmp_path: Path, fresh_accelerate: None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(32, (32, 8), generator=rng).tolist()
    data = [{"input_ids": r, "labels": r} for r in rows]

    class Told(Trainer):
        """Hands each micro-batch's share of the loss on; it is divided already."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            ars.observe(loss)
            return loss

    def trainer(steps: int) -> tuple[Told, ARS]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = ARS(torch.optim.AdamW(model.parameters(), lr=0.01))
        schedule = schedules.LambdaLR(optimizer, lambda s: 0.99**s)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=4, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Told(model, args, train_dataset=data, optimizers=(optimizer, schedule)), optimizer

    whole, ars = trainer(8)
    whole.train()
    rows_seen = ars.drain()
    assert len(rows_seen) == 8
    assert rows_seen[-1]["loss"] < rows_seen[0]["loss"]
    again, ars = trainer(8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [r["step"] for r in ars.drain()] == [4, 5, 6, 7]
    assert_same(whole.model, again.model)

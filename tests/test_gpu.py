"""What only a GPU can show: no step waits for the host, and folding changes nothing.

Run where there is one: ``python -m pytest -q -m gpu tests/test_gpu.py``.
"""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from test_damping_fold import FOLDING, gradient, loss_at, weight

from ars_kit.damping import DampedOptimizer
from ars_kit.host import Host
from ars_kit.shapes import embedded_config
from ars_kit.testing import check_gate
from ars_kit_plugins.ars import ARS
from ars_kit_plugins.gating import ClipGate, Guard
from ars_kit_plugins.skipping import SkipStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@contextmanager
def waiting_for_nothing() -> Iterator[None]:
    """Make anything raise that makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.LayerNorm(256), torch.nn.Linear(256, 16)
    ).cuda()
    return model, torch.randn(64, 64, device="cuda"), torch.randn(64, 16, device="cuda")


def spoilt(step: int) -> float:
    """What the targets are multiplied by: now and then too much, once no number at all."""
    return {30: 30.0, 31: 30.0, 40: math.inf}.get(step, 1.0)


def train(model: Any, x: Any, y: Any, optimizer: ARS, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = (model(x) - y * spoilt(step)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def every_gate(base: torch.optim.Optimizer, **more: Any) -> ARS:
    gates = {"skip": SkipStep(limit=50, norm=True), "clip": ClipGate(limit=1.0)}
    return ARS(base, gates=gates, jitter=0.05, **more)


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(1e-3, device="cuda"), fused=True
    ),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("base", BASES)
def test_a_whole_training_step_waits_for_nothing(base: str) -> None:
    """From the first step on, through surprises, a skip, and judgements of the Entropy Guard."""
    model, x, y = problem()
    optimizer = every_gate(BASES[base](model.parameters()))
    (model(x) - y).square().mean().backward()  # libraries set themselves up
    with waiting_for_nothing():
        train(model, x, y, optimizer, range(150))
    rows = optimizer.drain()
    assert len(rows) == 150
    assert rows[30]["surprise"] < 1
    assert rows[40]["skipped"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_watch_is_awake() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_for_nothing():
        torch.ones((), device="cuda").item()


def test_micro_batches_and_closures_wait_for_nothing() -> None:
    model, x, y = problem()
    optimizer = every_gate(BASES["adamw"](model.parameters()))
    (model(x) - y).square().mean().backward()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    with waiting_for_nothing():
        for _ in range(5):
            optimizer.zero_grad()
            for half in (slice(0, 32), slice(32, 64)):
                loss = (model(x[half]) - y[half]).square().mean() / 2
                loss.backward()
                optimizer.observe(loss)
            optimizer.step()
            optimizer.step(closure)
    assert optimizer.summary()["steps"] == 10


def test_a_scaled_fp16_step_waits_for_nothing() -> None:
    model, x, y = problem()
    optimizer = every_gate(BASES["adamw"](model.parameters()))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            out = model(x)
        loss = (out.float() - y * factor).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss)
        scaler.update()

    step(1.0)
    with waiting_for_nothing():
        for i in range(50):
            step(spoilt(i))
    assert optimizer.summary()["skipped"] >= 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", ["foreach", "loop", "adafactor"])
def test_a_base_that_cannot_fold_waits_once_more_than_by_itself(kind: str) -> None:
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "loop": lambda p: torch.optim.AdamW(p, foreach=False),
        "adafactor": torch.optim.Adafactor,
    }

    def waits(wrapped: bool) -> int:
        model, x, y = problem()
        base = makers[kind](model.parameters())
        optimizer: Any = ARS(base) if wrapped else base
        for _ in range(2):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step(loss=loss) if wrapped else optimizer.step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                optimizer.step(loss=loss) if wrapped else optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(w.message) for w in seen)

    assert waits(wrapped=True) == waits(wrapped=False) + 1


def on_cuda(base: str, **options: Any) -> tuple[torch.nn.Parameter, DampedOptimizer]:
    p = torch.nn.Parameter(weight().data.cuda())
    return p, ARS(FOLDING[base]([p]), **options)


@pytest.mark.parametrize("base", FOLDING)
def test_folded_or_read_the_factors_do_the_same(base: str) -> None:
    found = []
    for fold in (False, True):
        p, optimizer = on_cuda(base, fold=fold)
        for step in range(160):
            p.grad = gradient(step).cuda()
            optimizer.step(loss=torch.tensor(loss_at(step), device="cuda"))
        summary = optimizer.summary()
        assert summary["skipped"] == 1
        assert summary["gates"]["surprise"] < 1
        found.append(p)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", FOLDING)
def test_undamped_it_is_the_base_bit_for_bit(base: str) -> None:
    ours, plain = (torch.nn.Parameter(weight().data.cuda()) for _ in range(2))
    optimizer = DampedOptimizer(FOLDING[base]([ours]), {"guard": Guard()})
    bare = FOLDING[base]([plain])
    for step in range(10):
        ours.grad, plain.grad = gradient(step).cuda(), gradient(step).cuda()
        optimizer.step(loss=torch.tensor(1.0, device="cuda"))
        bare.step()
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("base", FOLDING)
def test_a_first_step_that_is_skipped_leaves_no_trace(base: str) -> None:
    late, plain = (torch.nn.Parameter(weight().data.cuda()) for _ in range(2))
    optimizer = DampedOptimizer(FOLDING[base]([late]), {"guard": Guard()})
    late.grad = torch.full_like(late, math.nan)
    optimizer.step(loss=torch.tensor(1.0, device="cuda"))
    bare = FOLDING[base]([plain])
    for step in range(3):
        late.grad, plain.grad = gradient(step).cuda(), gradient(step).cuda()
        optimizer.step(loss=torch.tensor(1.0, device="cuda"))
        bare.step()
    torch.testing.assert_close(late, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
def test_a_state_read_on_the_host_resumes_exactly(base: str) -> None:
    whole = problem()
    optimizer = every_gate(BASES[base](whole[0].parameters()))
    train(*whole, optimizer, range(35))
    file = io.BytesIO()
    torch.save([whole[0].state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, map_location="cpu", weights_only=True)
    again = problem()
    again[0].load_state_dict(weights)
    resumed = every_gate(BASES[base](again[0].parameters()))
    resumed.load_state_dict(copy.deepcopy(state))
    optimizer.drain()
    train(*whole, optimizer, range(35, 80))
    train(*again, resumed, range(35, 80))
    assert repr(optimizer.drain()) == repr(resumed.drain())
    for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_on_two_kinds_of_memory_are_damped_together() -> None:
    """Part of the model on the host, part on the device, as an offloaded one has it."""
    near, far = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4).cuda())
    for first, second in ((near, far), (far, near)):
        base = torch.optim.SGD([first, second], lr=0.1)
        optimizer = ARS(base)
        for step in range(40):
            near.grad = torch.ones(4)
            far.grad = torch.ones(4, device="cuda")
            optimizer.step(loss=torch.tensor(9.0 if step == 30 else 1.0, device="cuda"))
        assert optimizer.drain()[30]["surprise"] < 0.1
    torch.testing.assert_close(near.data, far.data.cpu())


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_model_and_a_compiled_base_train_damped() -> None:
    eager, compiled = problem(), problem()
    plain = ARS(torch.optim.AdamW(eager[0].parameters(), lr=1e-3))
    train(*eager, plain, range(40))
    lr = torch.tensor(1e-3, device="cuda")
    base = torch.optim.AdamW(compiled[0].parameters(), lr=lr, capturable=True)
    base.step = torch.compile(base.step)  # type: ignore[method-assign]
    optimizer = ARS(base)
    train(torch.compile(compiled[0]), *compiled[1:], optimizer, range(40))
    wanted, found = plain.drain(), optimizer.drain()
    assert found[30]["surprise"] < 1
    for a, b in zip(wanted[:30], found[:30], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_a_sharded_model_folds_as_a_whole_one(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = problem()
    plain = ARS(BASES["adamw"](whole[0].parameters()))
    train(*whole, plain, range(60))
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x, y = problem()
        fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        optimizer = ARS(BASES["adamw"](model.parameters()))
        train(model, x, y, optimizer, range(60))
        found = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
        for a, b in zip(whole[0].parameters(), found, strict=True):
            torch.testing.assert_close(a.data, b, rtol=1e-4, atol=1e-5)
        assert optimizer.drain()[30]["surprise"] < 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("norm", [False, True])
def test_the_skip_gate_waits_for_nothing(*, norm: bool) -> None:
    check_gate(lambda: SkipStep(norm=norm), steps=3000)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_a_step_of_a_run_waits_for_nothing(
    text_folder: Path, tmp_path: Path, *, compiling: bool, apart: bool
) -> None:
    """The training loop itself, with a model of transformers and the data on the host."""
    from accelerate import Accelerator

    from ars_kit.compiling import compiled
    from ars_kit.host import Host
    from ars_kit.models import build, parameter_groups
    from ars_kit.optim import build_optimizer
    from ars_kit.plan import plan_run
    from ars_kit.resolving import resolve
    from ars_kit.store import RunFolder
    from ars_kit.tokens import Batches
    from ars_kit.train import remember_peaks, train_step
    from ars_kit.trainee import Stop, Trainee

    flags = {"family.members": "d4", "train.device": "cuda", "train.accumulation": 2,
             "data.document_mask": apart}  # fmt: skip
    host, settings = Host.installed(), resolve(flags, {}, None)
    member = plan_run(settings, host).members[0]
    model = build(member.config, seed=0).cuda()
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, lr_width=32, lr_vectors=1e-3)
    optimizer = build_optimizer(host, settings.optimizer, groups, lr=1e-3, position=0.0)
    remember_peaks(optimizer)
    stream = torch.randint(0, 300, (20_000,)).numpy().astype("uint16")
    job = Trainee(
        plan=member, settings=settings, model=model, optimizer=optimizer,
        batches=Batches(
            stream, sequence_length=128, batch_size=16, seed=0, ends=np.arange(97, 20_000, 97)
        ),
        accelerator=Accelerator(), folder=RunFolder(tmp_path), stop=Stop(), warmup=5,
        watcher=None,  # type: ignore[arg-type]
    )  # fmt: skip
    wrapped = job.accelerator.prepare(model).train()
    with compiled(model) if compiling else nullcontext():
        train_step(job, wrapped, 0)
        with waiting_for_nothing():
            for step in range(1, 20):
                train_step(job, wrapped, step)
    assert len(optimizer.drain()) == 20


def test_a_family_trains_on_the_device(tiny: list[str], arskit: Cli, tmp_path: Path) -> None:
    done = arskit("run", *tiny, "--device", "cuda", "--gate", "skip", "--json")
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["members"]
    assert [m["model_id"] for m in members] == ["d2", "d3", "d4"]
    assert all(m["vram_usage_peak"] > 0 for m in members)
    assert members[2]["final_loss"] < members[0]["final_loss"]


@pytest.mark.parametrize("name", ["full", "lean", "tiny"])
def test_the_foreseen_peak_is_the_allocators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size at which what the allocator rounds up, and cuBLAS keeps, no longer shows."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import vram

    from ars_kit.memory import RECIPES

    if name != "full":
        pytest.importorskip("torchao")
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = embedded_config(8, vocab_size=32_000, context=1024, sizes={**sizes, "head_dim": 64})
    host = Host.installed()
    foreseen = vram.foresee(config, RECIPES[name], (4, 1024), "cuda", host)["peak"]
    measured = vram.measure(config, RECIPES[name], (4, 1024), "cuda", host)
    assert foreseen == pytest.approx(measured, rel=0.1)

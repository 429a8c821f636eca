"""ARS in Lightning: automatic and manual optimization, accumulation, fp16, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ars_kit_plugins.ars import ARS

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES, MICRO = 16, 8


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches, the last but one of them bad."""
    rng = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(MICRO, 8, generator=rng), torch.randn(MICRO, 4, generator=rng))
        for _ in range(BATCHES)
    ]
    batches[-2][1].mul_(10)
    return batches


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def base_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def module(how: str, base: Any = base_of) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.automatic_optimization = how != "manual"

        def configure_optimizers(self) -> Any:
            self.ars = ARS(base(self.net))
            schedule = torch.optim.lr_scheduler.ExponentialLR(self.ars, 0.99)
            return {"optimizer": self.ars, "lr_scheduler": {"scheduler": schedule}}

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            loss = (self.net(x) - y).square().mean()
            optimizer = self.optimizers()
            assert isinstance(optimizer, ARS)
            assert isinstance(optimizer, torch.optim.Optimizer)
            if how == "observed":
                optimizer.observe(loss / self.trainer.accumulate_grad_batches)
            if how == "manual":
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step(loss=loss)
            return loss

        def on_train_epoch_end(self) -> None:
            if how == "manual":
                self.lr_schedulers().step()

    return Module()


def fit(model: Any, epochs: int = 3, *, start: Path | None = None, **options: Any) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data(), batch_size=None)
    trainer.fit(model, loader, ckpt_path=start and str(start))
    return trainer


def by_hand(accumulation: int = 1, epochs: int = 3) -> tuple[torch.nn.Module, ARS]:
    model = network()
    optimizer = ARS(base_of(model))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(epochs):
        for index, (x, y) in enumerate(data()):
            loss = (model(x) - y).square().mean() / accumulation
            loss.backward()
            optimizer.observe(loss)
            if (index + 1) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    return model, optimizer


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["automatic", "observed", "manual"])
def test_it_trains_as_a_loop_by_hand_does(how: str) -> None:
    ours = module(how)
    fit(ours)
    model, optimizer = by_hand()
    assert_same(ours.net, model)
    found = ours.ars.drain()
    assert len(found) == 3 * BATCHES
    assert repr(found) == repr(optimizer.drain())
    assert optimizer.summary()["damping"] < 1, "nothing was damped: the test says nothing"


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_are_summed_where_they_are_told(accumulation: int) -> None:
    ours = module("observed")
    fit(ours, accumulate_grad_batches=accumulation)
    model, optimizer = by_hand(accumulation)
    found, wanted = ours.ars.drain(), optimizer.drain()
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted])
    for a, b in zip(ours.net.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_recorded_is_seen_through_lightning_s_own_wrapper() -> None:
    ours = module("manual")
    trainer = fit(ours, 1)
    proxy = ours.optimizers()
    assert proxy is not ours.ars
    assert proxy.summary() == ours.ars.summary()
    assert proxy.summary()["steps"] == trainer.global_step == BATCHES
    assert len(proxy.drain()) == BATCHES
    assert ours.ars.drain() == []


@pytest.mark.parametrize("how", ["automatic", "manual"])
def test_a_checkpoint_resumes_exactly(how: str, tmp_path: Path) -> None:
    whole = module(how)
    fit(whole, 4)
    first = module(how)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")
    again = module(how)
    fit(again, 4, start=tmp_path / "two.ckpt")
    assert_same(whole.net, again.net)
    assert again.ars.summary() == whole.ars.summary()
    rows = again.ars.drain()
    assert [row["step"] for row in rows] == list(range(2 * BATCHES, 4 * BATCHES))
    assert repr(rows) == repr(whole.ars.drain()[2 * BATCHES :])


def test_fp16_with_a_scaler_is_told_by_observe() -> None:
    from pytorch_lightning.plugins import MixedPrecision

    def base(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows at first
    ours = module("observed", base)
    fit(ours, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    lost = round(24 - math.log2(scaler.get_scale()))
    assert lost > 0, "nothing overflowed: the test says nothing"
    rows = ours.ars.drain()
    assert len(rows) == 3 * BATCHES
    assert sum(row["skipped"] for row in rows) == lost
    first = next(row for row in rows if not row["skipped"])
    x, y = data()[first["step"]]
    wanted = (network()(x) - y).square().mean().item()
    assert first["loss"] == pytest.approx(wanted, rel=0.01), "a lost step left its loss behind"


def test_bf16_mixed_precision_trains_damped() -> None:
    ours = module("automatic")
    fit(ours, precision="bf16-mixed")
    rows = ours.ars.drain()
    assert sum(r["loss"] for r in rows[-16:]) < sum(r["loss"] for r in rows[:16])
    assert ours.ars.summary()["damping"] < 1

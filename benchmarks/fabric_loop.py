"""A pretraining loop over Lightning Fabric, in the style of litgpt's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning_fabric import Fabric
from loops import LOG_EVERY, Loop, Windows, factor_of, groups_of, wait
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.aggregation import RunningMean

from ars_kit.models import build
from ars_kit.plan import RunPlan
from ars_kit.tokens import Batches


def fabric_loop(plan: RunPlan, batches: Batches, steps: int, *, clip: float) -> Loop:
    """One step: forward, backward, clipping, optimizer, a running mean of the loss.

    What Fabric does there is its own: moving the batch, precision, clipping, its wrappers.
    """
    device, train = torch.device(plan.device), plan.settings.train
    precision: Any = "bf16-mixed" if plan.precision == "bf16" else "32-true"
    fabric = Fabric(accelerator=device.type, devices=1, precision=precision)
    made: Any = build(plan.members[0].config, seed=0).train()
    forward = torch.compile(made) if train.compile else made
    groups = groups_of(plan, made)
    plain = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95), fused=True)
    model, optimizer = fabric.setup(forward, plain)
    peaks = [group["lr"] for group in optimizer.param_groups]
    with warnings.catch_warnings():
        # It would have workers prepare sequences, which here are slices of an array.
        warnings.simplefilter("ignore")
        data: Any = fabric.setup_dataloaders(
            DataLoader(Windows(batches, (steps + 1) * train.batch_size), train.batch_size)
        )
    feed = iter(data)
    running = RunningMean(window=LOG_EVERY, sync_on_compute=False).to(fabric.device)

    def one(step: int) -> None:
        factor = factor_of(plan, step, steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = next(feed)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        fabric.backward(loss)
        running.update(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()

    def block(first: int, count: int) -> None:
        for step in range(first, first + count):
            one(step)
            if (step + 1) % LOG_EVERY == 0:
                running.compute().item()
        wait(device)

    return Loop(block, made)

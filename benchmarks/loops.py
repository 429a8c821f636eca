"""Loops that train one model: a bare one, arskit's, and the Trainer of transformers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from ars_kit.compiling import compiled
from ars_kit.host import Host
from ars_kit.keeping import log
from ars_kit.measure import Meter
from ars_kit.models import build, parameter_groups
from ars_kit.optim import build_optimizer
from ars_kit.plan import RunPlan
from ars_kit.ranks import make_accelerator, wrapped
from ars_kit.schedule import lr_factor
from ars_kit.store import RunFolder
from ars_kit.tokens import Batches
from ars_kit.train import remember_peaks, train_step
from ars_kit.trainee import Stop, Trainee

LOG_EVERY = 10
Block = Callable[[int, int], None]


@dataclass(slots=True)
class Loop:
    """One way to train: ``block(first, count)`` does that many steps."""

    block: Block
    model: Any


def alone(loop: Loop, thread: ThreadPoolExecutor | None = None) -> Loop:
    """Return the loop in a thread of its own, as the Trainer's is, or in one that is given.

    A C library hands threads memory from pools of their own, and what is given back to the system
    after each step, to be cleared when it is asked for again, differs between the first and others.
    """
    own = thread or ThreadPoolExecutor(max_workers=1)
    return Loop(lambda first, count: own.submit(loop.block, first, count).result(), loop.model)


class Silent:
    """Looks on and says nothing."""

    def steps(self, member: str, done: int, rows: list[dict[str, Any]], meter: Meter) -> None:
        """Hear of steps."""


def bare_loop(
    plan: RunPlan,
    batches: Batches,
    steps: int,
    *,
    clip: float | None = None,
    log_every: int = LOG_EVERY,
) -> Loop:
    """The loop that anybody would write, one function a step; every 1, it reads as nanochat's."""
    device, train = torch.device(plan.device), plan.settings.train
    model: Any = build(plan.members[0].config, seed=0).train().to(plan.device)
    forward = torch.compile(model) if train.compile else model
    groups = groups_of(plan, model)
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]

    def one(step: int) -> Any:
        factor = factor_of(plan, step, steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        window = torch.from_numpy(batches.batch(step)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            logits = forward(input_ids=window[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def block(first: int, count: int) -> None:
        for step in range(first, first + count):
            loss = one(step)
            if (step + 1) % log_every == 0:
                loss.item()
        wait(device)

    return Loop(block, model)


def our_job(plan: RunPlan, batches: Batches, folder: RunFolder) -> Trainee:
    """Return what ``arskit run`` trains a member with."""
    settings, member, host = plan.settings, plan.members[0], Host.installed()
    model: Any = build(member.config, seed=0).train().to(plan.device)
    optimizer = build_optimizer(
        host, settings.optimizer, groups_of(plan, model), lr=settings.train.lr, position=0.0
    )
    remember_peaks(optimizer)
    return Trainee(
        plan=member,
        settings=settings,
        model=model,
        optimizer=optimizer,
        batches=batches,
        accelerator=make_accelerator(plan),
        folder=folder,
        watcher=Silent(),
        stop=Stop(),
        warmup=settings.train.warmup_steps,
    )


def our_loop(job: Trainee, stack: ExitStack, *, compiling: bool) -> Loop:
    """The product's own, without the saving."""
    if compiling:
        stack.enter_context(compiled(job.model))
    model = wrapped(job.accelerator, job.model)
    job.meter.start(job.accelerator.device)

    def block(first: int, count: int) -> None:
        for step in range(first, first + count):
            train_step(job, model, step)
            if (step + 1) % LOG_EVERY == 0:
                log(job, step + 1)
        wait(job.accelerator.device)

    return Loop(block, job.model)


class Turns(TrainerCallback):
    """Holds the Trainer, which runs in a thread of its own, between its turns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left = 0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait until the step is asked for."""
        self.go.acquire()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Give the turn back after its last step."""
        self.left -= 1
        if not self.left:
            wait(self.device)
            self.done.release()


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The batches, sequence by sequence, with targets where they are."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        """Return how many there are."""
        return self.count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Return a sequence."""
        window = torch.from_numpy(self.batches.sequence(number).astype(np.int64))
        inputs, targets = window[:-1], window[1:]
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def trainer_loop(
    plan: RunPlan, batches: Batches, steps: int, home: Path, *, clip: float = 0.0
) -> Loop:
    """The Trainer, with the optimizer and the schedule of the bare loop; as it comes, it clips."""
    device, train = torch.device(plan.device), plan.settings.train
    model: Any = build(plan.members[0].config, seed=0).train().to(plan.device)
    optimizer = torch.optim.AdamW(
        groups_of(plan, model), lr=train.lr, betas=(0.9, 0.95), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: factor_of(plan, s, steps))
    turns = Turns(device)
    arguments = TrainingArguments(
        output_dir=str(home),
        per_device_train_batch_size=train.batch_size,
        max_steps=steps,
        max_grad_norm=clip,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,  # or the targets would be shifted once more
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=plan.precision == "bf16",
        torch_compile=train.compile,
        log_level="error",
    )
    data = Windows(batches, (steps + 1) * train.batch_size)
    trainer = Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[turns]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    thread = threading.Thread(target=trainer.train, daemon=True)

    def block(_: int, count: int) -> None:
        turns.left = count
        turns.go.release(count)
        if thread.ident is None:
            thread.start()
        turns.done.acquire()

    return Loop(block, model)


def clock_of(device: str, threads: int) -> Callable[[], float]:
    """Return the process's own time where it is one thread of a CPU, else the wall's."""
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def timed(
    loops: Mapping[str, Loop], rounds: int, block: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return each loop's seconds a step, round by round; the first round warms up.

    They take turns step by step: what disturbs one for a while disturbs the others too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(rounds + 1):
        spent = dict.fromkeys(names, 0.0)
        for step in range(number * block, (number + 1) * block):
            turn = step % len(names)
            for name in names[turn:] + names[:turn]:  # nobody always runs on a warm cache
                begin = clock()
                loops[name].block(step, 1)
                spent[name] += clock() - begin
        if number:
            for name in names:
                seconds[name].append(spent[name] / block)
    return seconds


def groups_of(plan: RunPlan, model: Any) -> list[dict[str, Any]]:
    """Return the parameter groups that every loop gives its optimizer."""
    train = plan.settings.train
    return parameter_groups(
        model,
        lr=train.lr,
        weight_decay=train.weight_decay,
        lr_width=train.lr_width,
        lr_vectors=train.lr_vectors,
    )


def factor_of(plan: RunPlan, step: int, steps: int) -> float:
    """Return what the schedule makes of the learning rate at a step."""
    train = plan.settings.train
    return lr_factor(
        step,
        steps=steps,
        schedule=train.schedule,
        warmup=train.warmup_steps,
        decay_fraction=train.decay_fraction,
    )


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

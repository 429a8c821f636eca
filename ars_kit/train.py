"""One member's training loop, on accelerate."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ars_kit.backward import InBackward
from ars_kit.compiling import compiled
from ars_kit.errors import ArsKitError, Interrupted, PluginError, Preempted
from ars_kit.keeping import go_back, judge_heldout, keep, log, resume, save
from ars_kit.ranks import wrapped as wrapped_model
from ars_kit.schedule import lr_factor
from ars_kit.teaching import follow_hints
from ars_kit.trainee import Trainee, what_is_kept

if TYPE_CHECKING:
    from ars_kit.damping import DampedOptimizer


def train_member(job: Trainee) -> None:
    """Train ``job.model`` in place from its newest state, or from its birth.

    Leaves the final training state committed; the caller commits the member.

    Raises:
        DivergedError: too many steps in a row were skipped, or it was unstable for too long.
        PluginError: a plugin broke its promise; the state before that step is saved, or the
            newest one stays where the step was only found out later.
        Preempted: SIGTERM came; the state is saved. :class:`Interrupted` for SIGINT.
        ArsKitError: the device ran out of memory.
    """
    done = resume(job)
    if done >= job.plan.steps:
        return
    # A step that runs out of memory within the backward pass leaves parameters of two kinds.
    if done == 0 and (job.recovery.watch is not None or isinstance(job.optimizer, InBackward)):
        save(job, 0)
    with compiled(job.model) if job.settings.train.compile else nullcontext():
        _train_from(job, done)


def _train_from(job: Trainee, done: int) -> None:
    """Train from after ``done`` steps to the end, or until somebody asks to stop."""
    plan, run = job.plan, job.settings.run
    wrapped = wrapped_model(job.accelerator, job.model)
    wrapped.train()
    job.meter.start(job.accelerator.device)
    if done == 0:
        judge_heldout(job, done)
    while done < plan.steps:
        with what_breaks(job, done):
            if train_step(job, wrapped, done):
                done = undo(job, done)
                continue
        done += 1
        asked = _asked_to_stop(job, done)
        saving = done % run.save_every == 0 or done == plan.steps or asked
        if saving or done == job.branch or done % run.log_every == 0:
            log(job, done)  # before a state is kept: a step that broke a promise must not be in it
        if job.recovery.found is not None:
            done = go_back(job, job.recovery.found)
        else:
            keep(job, done, saving=saving)
        if asked and done < plan.steps:
            kind = Interrupted if job.stop.signal == signal.SIGINT else Preempted
            raise kind(
                f"stopped {plan.name} after step {done} of {plan.steps}, state saved; "
                "run the same command again to go on"
            )


def train_step(job: Trainee, wrapped: Any, step: int) -> bool:
    """Do one optimizer step. Nothing in here waits for the device.

    Returns:
        Whether memory ran out once parameters had been stepped: the step cannot be repeated.
    """
    train = job.settings.train
    factor = lr_factor(
        step,
        steps=job.plan.steps,
        schedule=train.schedule,
        warmup=job.warmup,
        decay_fraction=job.cooling,
        start=job.start_lr,
    )
    set_rates(job.optimizer, factor)
    follow_hints(job.optimizer, step)
    place = step + job.recovery.passed_over
    while not _fits(job, wrapped, step, place):
        if not job.optimizer.intact:
            return True
        halve(job, step)
    job.optimizer.step()
    job.optimizer.zero_grad()
    job.feed.prepare(place + 1)
    if job.teaching.on_step is not None:
        job.optimizer.intact = False  # if it breaks off, weights are between two steps
        # Every process does it to its own copy of the weights.
        job.meter.loss_flops += job.teaching.after(step) * job.accelerator.num_processes
        job.optimizer.intact = True
    job.meter.tokens += train.batch_size * job.settings.data.sequence_length
    return False


def _fits(job: Trainee, wrapped: Any, step: int, place: int) -> bool:
    """Leave a step's gradients, or nothing where they need more memory than the device has.

    Raises:
        torch.OutOfMemoryError: they do, and the batch cannot be read in smaller parts.
    """
    accelerator, parts, spent = job.accelerator, job.accumulation, 0.0
    # Random draws (dropout) are a function of the step, so that resuming replays none of them.
    torch.manual_seed((job.settings.family.seed * 1_000_003 + job.plan.start + step) % 2**63)
    try:
        for micro, (window, positions) in enumerate(job.feed.take(place), start=1):
            last = micro == parts
            with nullcontext() if last else accelerator.no_sync(wrapped):
                logits, loss = job.loss(wrapped, window, positions)
                objective, flops = job.teaching.objective(step, window, logits, loss, positions)
                # The gates and the history see the cross-entropy, whatever else is minimised.
                job.optimizer.observe(loss / parts)
                if last:
                    job.optimizer.send()
                with _stepping(job, last=last):
                    accelerator.backward(objective / parts)
            spent += flops * accelerator.num_processes
    except torch.OutOfMemoryError:
        if finer(job) is None:
            raise
        return False  # what the attempt holds is let go with the error
    job.meter.loss_flops += spent
    return True


def _stepping(job: Trainee, *, last: bool) -> AbstractContextManager[None]:
    """Return what the last backward pass of a step is done in."""
    optimizer = job.optimizer
    return optimizer.in_backward() if last and isinstance(optimizer, InBackward) else nullcontext()


def finer(job: Trainee) -> int | None:
    """Return the micro-batches of the next finer division of a batch; None where there is none.

    Several processes would have to agree on it in the middle of a step: there it is None as well.
    """
    if job.accelerator.num_processes > 1:
        return None
    sequences = job.settings.train.batch_size // job.accumulation
    factor = next((n for n in range(2, sequences + 1) if sequences % n == 0), None)
    return None if factor is None else job.accumulation * factor


def halve(job: Trainee, step: int) -> None:
    """Read batches in smaller parts from this step on, which is begun anew.

    A step has the same sequences as before, and the same mean loss.
    """
    parts = finer(job)
    assert parts is not None  # noqa: S101 -- where there is none the error went on
    job.optimizer.forget()
    _divide(job, parts, f"ran out of memory at step {step}; goes on")


def undo(job: Trainee, step: int) -> int:
    """Go back to the newest state, whose parameters are all of one step; returns its step.

    Batches are read in smaller parts from there on. The state is kept anew with that, so that a
    run that is killed does not come to the same place again.
    """
    parts = finer(job)
    assert parts is not None  # noqa: S101 -- where there is none the error went on
    job.optimizer.drain()  # what was recorded since is done again
    job.optimizer.forget()
    job.meter.pause(job.accelerator.device)
    meter = job.meter.state_dict()  # what is undone has cost its time and tokens all the same
    back = resume(job)
    job.optimizer.intact = True
    job.meter.load_state_dict(meter)
    _divide(
        job,
        parts,
        f"ran out of memory in the middle of step {step}, when some parameters had been stepped; "
        f"goes on from the state after step {back}",
    )
    save(job, back)
    return back


def _divide(job: Trainee, parts: int, what: str) -> None:
    """Read batches in so many parts, and say so."""
    job.split(parts)
    device = job.accelerator.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # pieces of the larger size are of no use to the smaller one
    sequences = job.settings.train.batch_size // parts
    job.watcher.aside(
        f"{job.plan.name}: {device} {what} with --accumulation {parts}, {sequences} "
        f"sequence{'s' * (sequences > 1)} at a time"
    )


@contextmanager
def what_breaks(job: Trainee, step: int) -> Iterator[None]:
    """Say what to do about a step that a plugin broke or that did not fit, and lose nothing."""
    try:
        yield
    except PluginError as error:
        if job.optimizer.intact and step > job.saved:
            log(job, step)
            save(job, step, together=False)  # other ranks may have taken the step
        raise PluginError(f"{error}; {what_is_kept(job)}") from error
    except torch.OutOfMemoryError as error:
        # One process has divided the batch already, as finely as it can.
        divide = "raise --accumulation, or " if job.accelerator.num_processes > 1 else ""
        least = isinstance(job.optimizer, InBackward)
        lean = "" if least else ", or take --memory lean"
        raise ArsKitError(
            f"{job.accelerator.device} ran out of memory at step {step} of {job.plan.name}: "
            f"{divide}lower --batch-size or --sequence-length{lean}; "
            f"{what_is_kept(job)}"
        ) from error


def set_rates(optimizer: DampedOptimizer, factor: float) -> None:
    """Set each group's learning rate to ``factor`` of its peak, in place where it is a tensor."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def remember_peaks(optimizer: DampedOptimizer) -> None:
    """Note each group's peak learning rate, once the optimizer is made."""
    for group in optimizer.param_groups:
        group["peak_lr"] = float(group["lr"])


def _asked_to_stop(job: Trainee, done: int) -> bool:
    """Whether to end after this step; ranks agree, and only where they read the device anyway."""
    if job.accelerator.num_processes == 1:
        return job.stop.signal is not None
    if done % job.settings.run.log_every:
        return False
    flag = torch.tensor(float(job.stop.signal or 0), device=job.accelerator.device)
    highest = float(job.accelerator.gather(flag.reshape(1)).max())
    job.stop.signal = int(highest) or None
    return job.stop.signal is not None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, for plugins that draw from the global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- the global generator is the point
    torch.manual_seed(seed)

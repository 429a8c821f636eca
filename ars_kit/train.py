"""One member's training loop, on accelerate."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ars_kit.compiling import compiled, eagerly
from ars_kit.errors import ArsKitError, DivergedError, Interrupted, PluginError, Preempted
from ars_kit.feed import Feed
from ars_kit.measure import Meter
from ars_kit.memory import whole_loss
from ars_kit.models import set_weights, trained_weights, weights_of
from ars_kit.ranks import wrapped as wrapped_model
from ars_kit.recovery import Recovery
from ars_kit.schedule import lr_factor
from ars_kit.sharding import all_finite, dealt_state, dealt_weights, gathered, is_sharded
from ars_kit.state import pack
from ars_kit.states import CURVE
from ars_kit.teaching import Teaching, follow_hints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.curve import Curve
    from ars_kit.damping import DampedOptimizer
    from ars_kit.instability import Instability
    from ars_kit.members import MemberPlan
    from ars_kit.settings import Settings
    from ars_kit.store import RunFolder
    from ars_kit.tokens import Batches
    from ars_kit.watching import Watcher


@dataclass(slots=True)
class Stop:
    """Whether the user or the machine asked the run to end."""

    signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one ends the process at once."""
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: FrameType | None) -> None:
            self.signal = number
            for s in before:
                signal.signal(s, signal.SIG_DFL)

        for s in before:
            signal.signal(s, note)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


@dataclass(slots=True)
class Trainee:
    """Everything the loop needs of one member.

    Attributes:
        warmup: optimizer steps in which the learning rate climbs from ``start_lr`` of its peak.
        decay_fraction: share of the steps in which it falls; None for the run's.
        branch: steps after which the state is also kept for an heir; None where no heir wants it.
        curve: when the held-out text is judged along the way; None for never.
        loss: of the wrapped model on a window and positions in it: logits, or None, and the mean
            cross-entropy.
        accumulation: micro-batches of a step: more than the run's once memory ran out.
    """

    plan: MemberPlan
    settings: Settings
    model: PreTrainedModel
    optimizer: DampedOptimizer
    batches: Batches
    accelerator: Accelerator
    folder: RunFolder
    watcher: Watcher
    stop: Stop
    warmup: int
    recovery: Recovery = field(default_factory=Recovery)
    teaching: Teaching = field(default_factory=Teaching)
    start_lr: float = 0.0
    decay_fraction: float | None = None
    branch: int | None = None
    curve: Curve | None = None
    loss: Callable[[Any, Tensor, Tensor | None], tuple[Tensor | None, Tensor]] = whole_loss
    meter: Meter = field(default_factory=Meter)
    bad_in_a_row: int = 0
    saved: int = 0  # steps after which the newest training state was kept
    accumulation: int = 0
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        self.split(max(self.accumulation, self.settings.train.accumulation))

    def split(self, parts: int) -> None:
        """Have each step read its batch in so many micro-batches."""
        device, apart = self.accelerator.device, self.settings.data.document_mask
        self.accumulation = parts
        self.feed = Feed(self.batches, parts, device, apart=apart)


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
    if job.recovery.watch is not None and done == 0:
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
            train_step(job, wrapped, done)
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


def train_step(job: Trainee, wrapped: Any, step: int) -> None:
    """Do one optimizer step. Nothing in here waits for the device."""
    train = job.settings.train
    factor = lr_factor(
        step,
        steps=job.plan.steps,
        schedule=train.schedule,
        warmup=job.warmup,
        decay_fraction=train.decay_fraction if job.decay_fraction is None else job.decay_fraction,
        start=job.start_lr,
    )
    set_rates(job.optimizer, factor)
    follow_hints(job.optimizer, step)
    place = step + job.recovery.passed_over
    while not _fits(job, wrapped, step, place):
        halve(job, step)
    job.optimizer.step()
    job.optimizer.zero_grad()
    job.feed.prepare(place + 1)
    if job.teaching.on_step is not None:
        job.optimizer.intact = False  # if it breaks off, weights are between two steps
        job.meter.loss_flops += job.teaching.after(step)
        job.optimizer.intact = True
    job.meter.tokens += train.batch_size * job.settings.data.sequence_length


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
                accelerator.backward(objective / parts)
            spent += flops * accelerator.num_processes
    except torch.OutOfMemoryError:
        if finer(job) is None:
            raise
        return False  # what the attempt holds is let go with the error
    job.meter.loss_flops += spent
    return True


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
    job.split(parts)
    if job.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # pieces of the larger size are of no use to the smaller one
    sequences = job.settings.train.batch_size // parts
    job.watcher.aside(
        f"{job.plan.name}: {job.accelerator.device} ran out of memory at step {step}; goes on with "
        f"--accumulation {parts}, {sequences} sequence{'s' * (sequences > 1)} at a time"
    )


def keep(job: Trainee, done: int, *, saving: bool) -> None:
    """Keep what is to be kept after ``done`` steps; a state never lacks its curve's points."""
    if done == job.branch:
        save(job, done, name=branch_of(job.plan.name))
    judge_heldout(job, done)
    if saving:
        save(job, done)


def judge_heldout(job: Trainee, done: int) -> None:
    """Add a point to the held-out curve where one is due; the meter stands still meanwhile."""
    curve, name, device = job.curve, job.plan.name, job.accelerator.device
    if curve is None or not curve.due(done, job.plan.steps):
        return
    job.meter.pause(device)
    main = job.accelerator.is_main_process
    judged: dict[str, Any] = {}
    if main or is_sharded(job.model):  # nobody computes with a part of the weights alone
        with eagerly(wanted=job.settings.train.compile):
            judged = curve.point(job.model, device)
    if main:
        spent = {
            "step": done,
            "tokens": job.meter.tokens,
            "seconds": job.meter.seconds,
            "flops": job.plan.flops / job.plan.tokens * job.meter.tokens + job.meter.loss_flops,
        }
        if done == 0:  # a start that was cut short may have left its first point
            job.folder.states(name).cut(0, name=CURVE)
        point = spent | judged
        job.folder.states(name).append([point], name=CURVE)
        job.watcher.judged(name, point)
    job.accelerator.wait_for_everyone()
    job.meter.start(device)


@contextmanager
def what_breaks(job: Trainee, step: int) -> Iterator[None]:
    """Say what to do about a step that a plugin broke or that did not fit, and lose nothing."""
    try:
        yield
    except PluginError as error:
        if job.optimizer.intact and step > job.saved:
            log(job, step)
            save(job, step, together=False)  # other ranks may have taken the step
        raise PluginError(f"{error}; {_what_is_kept(job)}") from error
    except torch.OutOfMemoryError as error:
        raise ArsKitError(
            f"{job.accelerator.device} ran out of memory at step {step} of {job.plan.name}: lower "
            f"--batch-size or --sequence-length, or take --memory lean; {_what_is_kept(job)}"
        ) from error


def _what_is_kept(job: Trainee) -> str:
    kept = f"the state after {job.saved} steps is kept" if job.saved else "nothing was kept yet"
    return f"{kept}. Once it is mended, run the same command again to go on with {job.plan.name}"


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


def resume(job: Trainee) -> int:
    """Load the newest training state, if there is one; returns the next step."""
    found = job.folder.states(job.plan.name).load()
    step, tree = found or (0, None)
    job.saved = step
    if tree is not None:
        state = tree["optimizer"]
        if is_sharded(job.model):
            tree["weights"] = dealt_weights(tree["weights"], job.model)
            state = dealt_state(state, job.optimizer)
        set_weights(job.model, tree["weights"], trained=True)
        try:
            job.optimizer.load_state_dict(state)
        except PluginError as error:
            raise PluginError(f"{error}; {_what_is_kept(job)}") from error
        job.meter.load_state_dict(tree["meter"])
        job.bad_in_a_row = tree["bad_in_a_row"]
        job.recovery.load_state_dict(tree["recovery"])
        job.split(tree.get("accumulation", job.accumulation))
    if job.recovery.watch is not None and job.recovery.anchor is None:
        job.recovery.anchor = step
    if job.accelerator.is_main_process:
        job.folder.states(job.plan.name).cut(step)
        job.folder.states(job.plan.name).cut(step + 1, name=CURVE)
    job.accelerator.wait_for_everyone()
    return step


def branch_of(member: str) -> str:
    """Return the name under which a member's state lies before its learning rate fell."""
    return f"{member}.stable"


def save(job: Trainee, step: int, *, together: bool = True, name: str | None = None) -> None:
    """Commit the training state after ``step`` steps, whole whoever holds it; one process writes.

    Args:
        job: what is trained.
        step: steps done.
        together: wait for the other processes. Without them a sharded state cannot be kept.
        name: under which it is kept; the member's own if left out.

    Raises:
        DivergedError: a weight is not finite; the state before stays.
        PluginError: a plugin's own state cannot be saved.
    """
    if not together and is_sharded(job.model):
        return
    job.meter.pause(job.accelerator.device)
    _require_finite(job)
    main = job.accelerator.is_main_process
    weights = gathered(trained_weights(job.model), keep=main)
    optimizer = gathered(job.optimizer.state_dict(), keep=main)
    regular = step % job.settings.run.save_every == 0 or step == job.plan.steps
    keep = job.recovery.keep(step, regular=regular) if name is None else []
    if main:
        tree = {
            "weights": weights,
            "optimizer": optimizer,
            "meter": job.meter.state_dict(),
            "bad_in_a_row": job.bad_in_a_row,
            "recovery": job.recovery.state_dict(),
            "accumulation": job.accumulation,
        }
        try:
            job.folder.states(name or job.plan.name).save(tree, step=step, keep=keep)
        except TypeError as error:
            raise PluginError(f"{_culprit(job, tree)}; {_what_is_kept(job)}") from error
    if name is None:
        job.saved = step
    if together:
        job.accelerator.wait_for_everyone()
    job.meter.start(job.accelerator.device)


def _culprit(job: Trainee, tree: dict[str, Any]) -> str:
    """Say whose state it is that cannot be packed."""
    for name, state in tree["optimizer"]["damping"]["gates"].items():
        try:
            pack(state)
        except TypeError as error:
            return f"{job.optimizer.called(name)} has a state that cannot be saved: its {error}"
    return f"{job.optimizer.called(None)} has a state that cannot be saved"


def _require_finite(job: Trainee) -> None:
    bad = [name for name, w in weights_of(job.model).items() if not all_finite(w)]
    if bad:
        raise DivergedError(
            f"{job.plan.name} diverged: {bad[0]} holds values that are not finite; they are not "
            "kept. Lower train.lr, or keep the guard gate"
        )


def go_back(job: Trainee, found: Instability) -> int:
    """Go on from the state before an instability, past the batches since; returns its step.

    Raises:
        DivergedError: that is not wanted, or not again. The state from before is the newest.
    """
    name, recovery = job.plan.name, job.recovery
    job.meter.pause(job.accelerator.device)
    step = next(s for s in job.folder.states(name).steps() if s >= (recovery.anchor or 0))
    again = len(recovery.events) < recovery.most
    if job.accelerator.is_main_process:
        job.folder.states(name).return_to(step)
    if again and job.accelerator.is_main_process:
        _, tree = job.folder.states(name).load(step=step) or (step, {})
        recovery.load_state_dict(tree["recovery"])
        event = recovery.undo(found, step)
        # What was undone has cost its time and its tokens all the same.
        tree |= {"recovery": recovery.state_dict(), "meter": job.meter.state_dict()}
        job.folder.states(name).save(tree, step=step, keep=[step])
        job.watcher.went_back(name, event)
    job.accelerator.wait_for_everyone()
    if not again:
        raise DivergedError(
            f"{name} is unstable: {found}. It has gone back {len(recovery.events)} times; the "
            f"state after step {step}, from before, is kept. Run again with train.on_instability "
            "set to rollback to leave out the batches behind it (train.max_rollbacks times), or to "
            "ignore to go on regardless; or start anew with a lower train.lr"
        )
    resume(job)
    job.meter.start(job.accelerator.device)
    return step


def log(job: Trainee, done: int) -> None:
    """Read what the device recorded since the last time, once for many steps."""
    try:
        rows = job.optimizer.drain()
    except PluginError as error:
        raise PluginError(f"{error}; {_what_is_kept(job)}") from error
    for row in rows:
        bad = row["skipped"] or not math.isfinite(row["loss"])
        job.bad_in_a_row = job.bad_in_a_row + 1 if bad else 0
        if job.bad_in_a_row >= job.settings.train.max_skipped:
            raise DivergedError(
                f"{job.plan.name} diverged: {job.bad_in_a_row} steps in a row up to step "
                f"{row['step']} were skipped, as a loss or gradient that is not finite is. Lower "
                "train.lr; nothing of it was committed"
            )
    # While the rate climbs, a loss that rises says nothing.
    job.recovery.look(row for row in rows if row["step"] >= job.warmup)
    if job.accelerator.is_main_process:
        for row in rows:
            if events := job.recovery.events_at(row["step"]):
                row["went_back"] = events
        job.folder.states(job.plan.name).append([_plain(row) for row in rows])
        job.watcher.steps(job.plan.name, done, rows, job.meter)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Make a row valid JSON: a loss that is not a number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


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

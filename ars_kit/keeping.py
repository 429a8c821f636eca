"""What of a member in training is kept: its states, its history, its held-out curve."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ars_kit.backward import DROPPED
from ars_kit.compiling import eagerly
from ars_kit.errors import DivergedError, PluginError
from ars_kit.models import set_weights, trained_weights, weights_of
from ars_kit.schedule import climbing
from ars_kit.sharding import all_finite, dealt_state, dealt_weights, is_sharded, write_parts
from ars_kit.state import pack
from ars_kit.states import CURVE
from ars_kit.trainee import Trainee, branch_of, what_is_kept

if TYPE_CHECKING:
    from ars_kit.instability import Instability


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


def resume(job: Trainee) -> int:
    """Load the newest training state, if there is one; returns the next step."""
    step, tree = _loaded(job) or (0, None)
    job.saved = step
    if tree is not None:
        set_weights(job.model, tree["weights"], trained=True)
        try:
            job.optimizer.load_state_dict(tree["optimizer"])
        except PluginError as error:
            raise PluginError(f"{error}; {what_is_kept(job)}") from error
        job.meter.load_state_dict(tree["meter"])
        job.bad_in_a_row = tree["bad_in_a_row"]
        job.recovery.load_state_dict(tree["recovery"])
        job.split(tree.get("accumulation", job.accumulation))
    if job.recovery.watch is not None and job.recovery.anchor is None:
        job.recovery.anchor = step
    if job.accelerator.is_main_process:
        states = job.folder.states(job.plan.name)
        states.prune(job.recovery.keep(step, regular=False))
        states.cut(step)
        states.cut(step + 1, name=CURVE)
    job.accelerator.wait_for_everyone()
    return step


def _loaded(job: Trainee, step: int | None = None) -> tuple[int, Any] | None:
    """Return a training state, of a sharded member only this process's part; all must call this."""

    def allot(tree: Any) -> Any:
        weights = dealt_weights(tree["weights"], job.model)
        return {
            **tree,
            "weights": weights,
            "optimizer": dealt_state(tree["optimizer"], job.optimizer),
        }

    states = job.folder.states(job.plan.name)
    return states.load(step=step, allot=allot if is_sharded(job.model) else None)


def save(job: Trainee, step: int, *, together: bool = True, name: str | None = None) -> None:
    """Commit the training state after ``step`` steps; of a sharded one every process its part.

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
    regular = step % job.settings.run.save_every == 0 or step == job.plan.steps
    keep = job.recovery.keep(step, regular=regular) if name is None else []
    tree = {
        "weights": trained_weights(job.model),
        "optimizer": job.optimizer.state_dict(),
        "meter": job.meter.state_dict(),
        "bad_in_a_row": job.bad_in_a_row,
        "recovery": job.recovery.state_dict(),
        "accumulation": job.accumulation,
    }
    try:
        _commit(job, tree, step, name or job.plan.name, keep)
    except TypeError as error:
        raise PluginError(f"{_culprit(job, tree)}; {what_is_kept(job)}") from error
    if name is None:
        job.saved = step
    if together:
        job.accelerator.wait_for_everyone()
    job.meter.start(job.accelerator.device)


def _commit(job: Trainee, tree: Any, step: int, name: str, keep: Collection[int]) -> None:
    """Commit a state: the main process does, once all have written what they alone hold.

    Raises:
        TypeError: it holds what cannot be packed.
    """
    states, main = job.folder.states(name), job.accelerator.is_main_process
    if is_sharded(job.model):
        wait = job.accelerator.wait_for_everyone
        with states.shared(step, main=main, wait=wait) as parts:
            write_parts(pack(tree)[0], parts)
            if main:
                states.save(tree, step=step, keep=keep, parts=parts)
    elif main:
        states.save(tree, step=step, keep=keep)


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
    job.accelerator.wait_for_everyone()
    if again:
        _, tree = _loaded(job, step) or (step, {})
        recovery.load_state_dict(tree["recovery"])
        event = recovery.undo(found, step)
        # What was undone has cost its time and its tokens all the same.
        tree |= {"recovery": recovery.state_dict(), "meter": job.meter.state_dict()}
        _commit(job, tree, step, name, [step])
        if job.accelerator.is_main_process:
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
        raise PluginError(f"{error}; {what_is_kept(job)}") from error
    for row in rows:
        bad = row["skipped"] or not math.isfinite(row["loss"]) or row.get(DROPPED, 0) > 0
        job.bad_in_a_row = job.bad_in_a_row + 1 if bad else 0
        if job.bad_in_a_row >= job.settings.train.max_skipped:
            raise DivergedError(
                f"{job.plan.name} diverged: {job.bad_in_a_row} steps in a row up to step "
                f"{row['step']} were skipped, as a loss or gradient that is not finite is. Lower "
                "train.lr; nothing of it was committed"
            )
    # While the rate climbs, a loss that rises says nothing.
    climbs = climbing(job.plan.steps, job.warmup)
    job.recovery.look(row for row in rows if row["step"] >= climbs)
    if job.accelerator.is_main_process:
        for row in rows:
            if events := job.recovery.events_at(row["step"]):
                row["went_back"] = events
        job.folder.states(job.plan.name).append([_plain(row) for row in rows])
        job.watcher.steps(job.plan.name, done, rows, job.meter)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Make a row valid JSON: a loss that is not a number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

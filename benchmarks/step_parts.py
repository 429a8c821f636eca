"""Where a step of arskit's loop spends its time: a clock around each part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from loops import wait

from ars_kit.keeping import log
from ars_kit.ranks import wrapped
from ars_kit.train import train_step
from ars_kit.trainee import Trainee


@dataclass(slots=True)
class Watch:
    """Sums up what each part of a step takes."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with a clock around it."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            begin = time.perf_counter()
            found = call(*args, **kwargs)
            wait(self.device)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
            return found

        return timed


def breakdown(job: Trainee, first: int, count: int) -> dict[str, float]:
    """Return the share of each part in the time of some steps of arskit's loop."""
    watch = Watch(job.accelerator.device)
    model = watch.around("forward", wrapped(job.accelerator, job.model))
    with _clocked(job, watch):
        wait(watch.device)
        begin = time.perf_counter()
        for step in range(first, first + count):
            train_step(job, model, step)
        watch.around("reading what was recorded", log)(job, first + count)
        whole = time.perf_counter() - begin
    found = {part: s / whole for part, s in watch.seconds.items()}
    found["gates"] = found["step"] - found.pop("base optimizer") if "step" in found else 0.0
    base = found.pop("step", 0.0) - found["gates"]
    return {**found, "base optimizer": base, "rest": 1 - sum(found.values()) - base}


@contextmanager
def _clocked(job: Trainee, watch: Watch) -> Iterator[None]:
    """Put a clock around the parts of a step that are methods of what the loop is given."""
    places = [
        (job.feed, "take", "batches"),
        (job.accelerator, "backward", "backward"),
        (job.optimizer, "step", "step"),
        (job.optimizer.base, "step", "base optimizer"),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, watch.around(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, plain in kept:
            setattr(owner, name, plain)

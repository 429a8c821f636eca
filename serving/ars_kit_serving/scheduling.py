"""Sequences over an engine's slots: whoever waits is let in as soon as one is free.

This is continuous batching (Yu et al., Orca, OSDI 2022) at its plainest: one thread takes every
sequence a token further at a time, and between two tokens sequences come and go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ars_kit.spec import Engine
from ars_kit_serving.failures import engine_dead
from ars_kit_serving.logs import LOGGER
from ars_kit_serving.sampling import Drawn, Sampler

Finish = Literal["stop", "length"]


class QueueFullError(Exception):
    """More sequences wait than may."""


@dataclass(frozen=True, slots=True)
class Step:
    """What became of a sequence in one step.

    Attributes:
        drawn: its next token; None where it failed.
        finish: why this was its last token, or None.
        error: why it failed.
    """

    drawn: Drawn | None
    finish: Finish | None = None
    error: BaseException | None = None


Deliver = Callable[[Sequence[tuple["Job", Step]]], None]
"""Takes what came of one round for the jobs of one caller."""


@dataclass(eq=False, slots=True)
class Job:
    """A sequence to be continued.

    Attributes:
        prompt: token ids, at least one.
        sampler: draws its tokens.
        limit: tokens it may get.
        ends: ids that end it.
        deliver: called from the scheduler's thread with each round's steps.
        cancelled: nobody waits for it any more.
    """

    prompt: Sequence[int]
    sampler: Sampler
    limit: int
    ends: Collection[int]
    deliver: Deliver
    cancelled: bool = False
    made: int = 0
    last: int = -1


class Scheduler:
    """Works an engine in a thread of its own.

    Args:
        engine: is closed with it.
        queue: sequences that may wait.
    """

    def __init__(self, engine: Engine, *, queue: int) -> None:
        self.engine = engine
        self.queue = queue
        self.waiting: deque[Job] = deque()
        self.active: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._made: list[tuple[Job, Step]] = []  # and not handed out yet
        self._thread = threading.Thread(target=self._work, name="arskit-engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs on, all or none.

        Raises:
            QueueFullError: they would have to wait behind too many.
        """
        with self._changed:
            if self._ended:
                _hand_out([(job, Step(None, error=engine_dead())) for job in jobs])
                return
            free = self.engine.slots - len(self.active)
            if len(self.waiting) + len(jobs) > self.queue + free or self._closing:
                raise QueueFullError
            self.waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs; what is done already is unaffected."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def count_waiting(self) -> int:
        """Return the sequences in the queue."""
        return len(self.waiting)

    def count_active(self) -> int:
        """Return the sequences in the engine."""
        return len(self.active)

    def complaint(self) -> str | None:
        """Return why nothing can be answered any more, or None."""
        return "the engine's thread has ended; the log has the reason" if self._ended else None

    def close(self) -> None:
        """Stop after the token in progress, and close the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.engine.close()

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:  # noqa: BLE001 -- nobody else would hear of it
            # An engine that cannot even release a sequence: what it computes next may be wrong.
            LOGGER.critical("an engine has ended", exc_info=True)
            with self._changed:
                self._ended = True
                lost = [*self.active.values(), *self.waiting]
                self.active.clear()
                self.waiting.clear()
            _hand_out(self._made + [(job, Step(None, error=engine_dead())) for job in lost])

    def _turn(self) -> bool:
        """Let in who waits, and take everyone a token further; returns whether to go on."""
        with self._changed:
            while not (self.waiting or self.active or self._closing):
                self._changed.wait()
            if self._closing:
                return False
            self._drop_cancelled()
            entering = self._let_in()
        for slot, job in entering:
            self._made.append((job, self._begin(slot, job)))
        self._hand_out_made()
        self._made.extend(self._round())
        self._hand_out_made()
        return True

    def _hand_out_made(self) -> None:
        made, self._made = self._made, []
        _hand_out(made)

    def _drop_cancelled(self) -> None:
        for slot in [s for s, job in self.active.items() if job.cancelled]:
            self._leave(slot)
        if any(job.cancelled for job in self.waiting):
            self.waiting = deque(job for job in self.waiting if not job.cancelled)

    def _let_in(self) -> list[tuple[int, Job]]:
        free = [slot for slot in range(self.engine.slots) if slot not in self.active]
        entering = []
        while self.waiting and free:
            slot = free.pop(0)
            self.active[slot] = self.waiting.popleft()
            entering.append((slot, self.active[slot]))
        return entering

    def _begin(self, slot: int, job: Job) -> Step:
        try:
            logits = self.engine.prefill(slot, job.prompt)
        except BaseException as error:  # noqa: BLE001 -- an engine's own; the others go on
            self._leave(slot)
            return Step(None, error=error)
        return self._advance(slot, job, logits)

    def _round(self) -> Iterator[tuple[Job, Step]]:
        jobs = dict(self.active)
        if not jobs:
            return
        try:
            logits = self.engine.decode({slot: job.last for slot, job in jobs.items()})
            rows = list(zip(jobs.items(), logits, strict=True))
        except BaseException as error:  # noqa: BLE001 -- an engine's own; those who wait go on
            for slot, job in jobs.items():
                self._leave(slot)
                yield job, Step(None, error=error)
            return
        for (slot, job), row in rows:
            yield job, self._advance(slot, job, row)

    def _advance(self, slot: int, job: Job, logits: object) -> Step:
        try:
            drawn = job.sampler.draw(logits)  # type: ignore[arg-type] # the engine's promise
        except BaseException as error:  # noqa: BLE001 -- one answer's grammar, which is Rust's and
            # may panic, past Exception; the others go on
            self._leave(slot)
            return Step(None, error=error)
        job.made += 1
        job.last = drawn.token
        finish: Finish | None = None
        if drawn.token in job.ends:
            finish = "stop"
        elif job.made >= job.limit:
            finish = "length"
        if finish:
            self._leave(slot)
        return Step(drawn, finish)

    def _leave(self, slot: int) -> None:
        self.engine.release(slot)
        del self.active[slot]


def _hand_out(steps: Sequence[tuple[Job, Step]]) -> None:
    """Deliver a round, one call for each caller: waking a caller is what costs."""
    callers: dict[Deliver, list[tuple[Job, Step]]] = {}
    for job, step in steps:
        callers.setdefault(job.deliver, []).append((job, step))
    for deliver, own in callers.items():
        deliver(own)

"""Sequences handed on to an engine that batches and draws by itself, as another server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol, runtime_checkable

from ars_kit_serving.scheduling import Job, QueueFullError, Step


@runtime_checkable
class Relayed(Protocol):
    """An engine that draws tokens itself.

    How is in ``job.sampler``: ``how`` is the request's :class:`~ars_kit_serving.sampling.Sampling`,
    ``choice`` the answer's number in its request, and ``constraint``, if it is not None,
    has the JSON schema that the answer must keep to.

    Attributes:
        context: tokens that a sequence may have.
        slots: sequences it works on at once.
    """

    context: int
    slots: int

    def steps(self, job: Job) -> AsyncGenerator[Sequence[Step], None]:
        """Yield what comes of a job, the last step with its finish; closing it frees the work."""
        ...

    def complaint(self) -> str | None:
        """Return why nothing can be answered any more, or None."""
        ...

    async def disconnect(self) -> None:
        """Close connections; nothing is at work any more."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Relay:
    """Stands where a :class:`~ars_kit_serving.scheduling.Scheduler` does, in the server's own loop.

    Only :meth:`close` may be called outside of that loop. A thread and a loop of its own would cost
    every token two wake-ups.

    Args:
        engine: is closed with it.
        queue: sequences that may wait.
    """

    def __init__(self, engine: Relayed, *, queue: int) -> None:
        self.engine, self.queue = engine, queue
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._active = 0
        self._slots = asyncio.Semaphore(engine.slots)
        self._closing = False

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs on, all or none.

        Raises:
            QueueFullError: they would have to wait behind too many.
        """
        if len(self._tasks) + len(jobs) > self.queue + self.engine.slots or self._closing:
            raise QueueFullError
        for job in jobs:
            self._tasks[job] = asyncio.get_running_loop().create_task(self._work(job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs; what is done already is unaffected."""
        for job in jobs:
            if task := self._tasks.pop(job, None):
                task.cancel()

    def count_waiting(self) -> int:
        """Return the sequences in the queue."""
        return max(0, len(self._tasks) - self._active)

    def count_active(self) -> int:
        """Return the sequences in the engine."""
        return self._active

    def complaint(self) -> str | None:
        """Return why nothing can be answered any more, or None."""
        return self.engine.complaint()

    async def end(self) -> None:
        """Drop what is at work, and the connections; nothing is taken on afterwards."""
        self._closing = True
        tasks = list(self._tasks.values())
        self.cancel(list(self._tasks))
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.engine.disconnect()

    def close(self) -> None:
        """Close the engine."""
        self._closing = True
        self.engine.close()

    async def _work(self, job: Job) -> None:
        try:
            async with self._slots:
                self._active += 1
                try:
                    async with aclosing(self.engine.steps(job)) as rounds:
                        async for steps in rounds:
                            job.deliver([(job, step) for step in steps])
                except Exception as error:  # noqa: BLE001 -- an engine's own; the others go on
                    job.deliver([(job, Step(None, error=error))])
                finally:
                    self._active -= 1
        finally:
            self._tasks.pop(job, None)

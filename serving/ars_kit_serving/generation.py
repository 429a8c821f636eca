"""One request at work: its sequences in the scheduler, its answers as they grow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from ars_kit_serving.answers import Answer
from ars_kit_serving.constraints import Constraint, SchemaError
from ars_kit_serving.failures import ApiError, bad_schema, too_slow
from ars_kit_serving.logs import LOGGER
from ars_kit_serving.measures import Measures
from ars_kit_serving.relaying import Relay
from ars_kit_serving.sampling import Sampler, Sampling
from ars_kit_serving.scheduling import Job, QueueFullError, Scheduler, Step
from ars_kit_serving.text import TextStream
from ars_kit_serving.tokenizing import ServedTokenizer

RETRY_AFTER = "1"
"""Seconds to wait before a full queue is tried again."""


BEFORE = 5
"""Tokens of a prompt that the text after it is decoded with, as vLLM has it."""


@dataclass(frozen=True, slots=True)
class Model:
    """A served model.

    Attributes:
        name: what clients call it.
        tokenizer: its own.
        scheduler: works its engine.
        vocabulary: ids below this are its tokens.
        created: seconds since the epoch.
    """

    name: str
    tokenizer: ServedTokenizer
    scheduler: Scheduler | Relay
    vocabulary: int
    created: int


@dataclass(frozen=True, slots=True)
class Order:
    """What a request asks of a model.

    Attributes:
        prompts: token ids of each.
        choices: answers to each prompt.
        sampling: how tokens are drawn.
        stops: strings that end an answer.
        limits: tokens that an answer may have, by prompt.
        seconds: until it is given up.
        begun: when it came, as :func:`time.monotonic` has it.
        constraint: that every answer begins with; None for any text.
        goes_on: whether an answer's text is that of its prompt continued, as a completion's is,
            or one of its own.
    """

    prompts: Sequence[Sequence[int]]
    choices: int
    sampling: Sampling
    stops: Sequence[str]
    limits: Sequence[int]
    seconds: float
    begun: float
    constraint: Constraint | None = None
    goes_on: bool = False


class Generation:
    """An order in progress; to be made in the event loop that its answers are awaited in.

    Args:
        model: that it is given to.
        order: what is asked.
        measures: what is counted.
        facts: for the log, filled in when it has ended.
    """

    def __init__(
        self, model: Model, order: Order, measures: Measures, facts: dict[str, Any] | None = None
    ) -> None:
        self.model, self.order, self.measures = model, order, measures
        self.facts = {} if facts is None else facts
        self.answers = [
            Answer(index, TextStream(model.tokenizer.decode, order.stops, self._before(index)))
            for index in range(len(order.prompts) * order.choices)
        ]
        self._steps: asyncio.Queue[Sequence[tuple[Job, Step]] | None] = asyncio.Queue()
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._jobs = [
            Job(
                prompt=order.prompts[answer.index // order.choices],
                sampler=Sampler(
                    order.sampling, answer.index, order.constraint and order.constraint.copy()
                ),
                limit=order.limits[answer.index // order.choices],
                ends=model.tokenizer.ends,
                deliver=self._deliver,
            )
            for answer in self.answers
        ]
        self._begun = order.begun
        self._open = len(self._jobs)
        self._failed = False
        left = order.begun + order.seconds - time.monotonic()
        self._clock = self._loop.call_later(left, self._steps.put_nowait, None)

    def _before(self, index: int) -> Sequence[int]:
        order = self.order
        return order.prompts[index // order.choices][-BEFORE:] if order.goes_on else ()

    def _deliver(self, steps: Sequence[tuple[Job, Step]]) -> None:
        if threading.get_ident() == self._thread:  # a relay's: nobody has to be woken
            self._steps.put_nowait(steps)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._steps.put_nowait, steps)

    def start(self) -> None:
        """Hand the sequences to the scheduler.

        Raises:
            ApiError: too many wait already.
        """
        model = self.model
        try:
            model.scheduler.submit(self._jobs)
        except QueueFullError:
            self._clock.cancel()
            self._open = 0
            self.measures.refused.labels(model.name).inc()
            raise ApiError(
                429,
                "Too many requests are waiting; try again in a moment.",
                code="queue_full",
                headers={"retry-after": RETRY_AFTER},
            ) from None
        self.measures.prompt_tokens.labels(model.name).inc(sum(map(len, self.order.prompts)))

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return not self._open

    async def pieces(self) -> AsyncIterator[tuple[Answer, str]]:
        """Yield each answer whenever it has grown, with the text that became certain.

        Raises:
            ApiError: the time is up, or the engine failed.
        """
        answer_of = {id(job): a for job, a in zip(self._jobs, self.answers, strict=True)}
        first = True
        while self._open:
            steps = await self._steps.get()
            if steps is None:
                raise too_slow(self.order.seconds)
            if first and any(step.drawn for _, step in steps):
                first = False
                waited = time.monotonic() - self._begun
                self.measures.first_token.labels(self.model.name).observe(waited)
            for job, step in steps:
                answer = answer_of[id(job)]
                if answer.finish:  # by a stop string; the engine was a token ahead
                    continue
                yield answer, self._take(job, step, answer)
            # Behind a slow reader steps pile up, and taking them waits for nothing: let others in.
            await asyncio.sleep(0)

    def _take(self, job: Job, step: Step, answer: Answer) -> str:
        if step.drawn is None:
            raise self._failure(step.error)
        piece = answer.take(step.drawn, step.finish)
        if answer.finish:
            self._open -= 1
            if not step.finish:
                self.model.scheduler.cancel([job])
        return piece

    def _failure(self, error: BaseException | None) -> ApiError:
        """Return what a client is told of a sequence that failed."""
        self._failed = True
        if isinstance(error, SchemaError):  # a schema's own fault: asking again would end alike
            return bad_schema(error)
        LOGGER.error("the engine failed", exc_info=error)
        self.measures.failures.labels(self.model.name).inc()
        if isinstance(error, ApiError):
            return error
        return ApiError(500, "The engine failed on this request.", code="engine_error")

    def end(self) -> None:
        """Free what is still at work; to be called whatever happened."""
        self._clock.cancel()
        name, made = self.model.name, sum(a.tokens for a in self.answers)
        self.measures.tokens.labels(name).inc(made)
        asked = sum(map(len, self.order.prompts))
        self.facts |= {"model": name, "prompt_tokens": asked, "completion_tokens": made}
        if self._open:
            self._open = 0
            self.model.scheduler.cancel(self._jobs)
            if not self._failed:
                self.measures.cancellations.labels(name).inc()
        elif made:
            took = max(time.monotonic() - self._begun, 1e-6)
            self.measures.speed.labels(name).observe(made / took)

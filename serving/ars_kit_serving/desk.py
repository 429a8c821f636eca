"""What a request asks of which model: names found, prompts made tokens, limits kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ars_kit_serving.constraints import Constraint, SchemaError, constraint_of
from ars_kit_serving.failures import ApiError, bad_schema, no_model, too_long, too_slow
from ars_kit_serving.generation import Model, Order
from ars_kit_serving.measures import Measures
from ars_kit_serving.protocol import (
    DEFAULT_TOKENS,
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    refusal,
)
from ars_kit_serving.tokenizing import PromptError

SHORT = 1000
"""Characters of a text that becomes tokens in well under a millisecond."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What the routes share.

    Attributes:
        models: by name, in the order they are listed.
        measures: what is counted.
        seconds: that a request may take.
    """

    models: Mapping[str, Model]
    measures: Measures
    seconds: float

    def model(self, name: str) -> Model:
        """Return a served model.

        Raises:
            ApiError: there is none of that name.
        """
        if name not in self.models:
            raise no_model(name, list(self.models))
        return self.models[name]

    async def order(self, model: Model, request: CompletionRequest | ChatRequest) -> Order:
        """Turn a request into token ids and limits.

        Raises:
            ApiError: it cannot be honoured, or does not fit.
        """
        refused = refusal(request)
        if refused:
            what, why = refused
            raise ApiError(400, f"{what}: {why}.", param=what, code="unsupported")
        begun = time.monotonic()
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if _is_short(request):
                prompts, constraint = _prepared(model, request)
            else:  # in a thread: it takes a while, and others are being answered
                async with asyncio.timeout(self.seconds):
                    prompts, constraint = await asyncio.to_thread(_prepared, model, request)
        except TimeoutError:
            raise too_slow(self.seconds) from None
        except SchemaError as error:
            raise bad_schema(error) from error
        except PromptError as error:
            code = "context_length_exceeded" if error.long else "invalid_prompt"
            raise ApiError(400, f"{field}: {error}", param=field, code=code) from error
        known = [*(max(p) for p in prompts), *(request.logit_bias or {})]
        if max(known) >= model.vocabulary:
            raise ApiError(
                400,
                f"A token id is beyond the vocabulary, which ends at {model.vocabulary - 1}.",
                param=field if max(map(max, prompts)) >= model.vocabulary else "logit_bias",
                code="invalid_token",
            )
        scheduler = model.scheduler
        most = min(MAX_SEQUENCES, scheduler.queue + scheduler.engine.slots)
        if len(prompts) * request.choices > most:
            raise ApiError(400, f"{field}: prompts times n may be {most} at most.", param=field)
        return Order(
            prompts=prompts,
            choices=request.choices,
            sampling=request.sampling(_reported(request)),
            stops=request.stops,
            limits=[_limit(request, len(p), scheduler.engine.context, field) for p in prompts],
            seconds=self.seconds,
            begun=begun,
            constraint=constraint,
            goes_on=isinstance(request, CompletionRequest),
        )


def _is_short(request: CompletionRequest | ChatRequest) -> bool:
    """Whether making tokens of it takes less than handing it to a thread."""
    if isinstance(request, ChatRequest) or request.response_format:
        return False
    return not isinstance(request.prompt, list) and len(request.prompt or "") <= SHORT


def _prepared(
    model: Model, request: CompletionRequest | ChatRequest
) -> tuple[list[list[int]], Constraint | None]:
    """Return the prompts' tokens, and what the answers must keep to."""
    return _prompts(model, request), constraint_of(request.response_format, model.tokenizer)


def _prompts(model: Model, request: CompletionRequest | ChatRequest) -> list[list[int]]:
    tokenizer, most = model.tokenizer, model.scheduler.engine.context
    if isinstance(request, ChatRequest):
        return [tokenizer.chat([message.plain() for message in request.messages], most)]
    prompt: Any = request.prompt if request.prompt is not None else ""
    if isinstance(prompt, str):
        return [tokenizer.prompt(prompt, most)]
    if isinstance(prompt[0], int):
        return [prompt]
    return [tokenizer.prompt(one, most) if isinstance(one, str) else one for one in prompt]


def _reported(request: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def _limit(request: CompletionRequest | ChatRequest, prompt: int, context: int, field: str) -> int:
    """Return the tokens that an answer may have."""
    asked = request.max_tokens
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or asked
    room = context - prompt
    if room < (asked or 1):
        error = too_long(prompt, asked or 1, context)
        error.param = field
        raise error
    default = room if isinstance(request, ChatRequest) else min(DEFAULT_TOKENS, room)
    return asked or default

"""The application: OpenAI's routes over the served models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request
from openai.types import Completion
from openai.types import Model as ModelCard
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ars_kit import __version__
from ars_kit_serving.answers import ChatShape, CompletionShape, Shape, usage_of
from ars_kit_serving.chat import chat_page
from ars_kit_serving.constraints import Constraint, SchemaError, constraint_of
from ars_kit_serving.failures import (
    ApiError,
    bad_schema,
    handle_errors,
    no_model,
    too_long,
    too_slow,
)
from ars_kit_serving.generation import Generation, Model, Order
from ars_kit_serving.guard import Gate, Journal, Rules
from ars_kit_serving.measures import Measures
from ars_kit_serving.protocol import (
    DEFAULT_TOKENS,
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    refusal,
)
from ars_kit_serving.relaying import Relay
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


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which ends with them, however they end."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client has left."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.end()


async def _events(generation: Generation, shape: Shape, *, usage: bool) -> AsyncIterator[str]:
    try:
        opened: set[int] = set()
        told = ""
        async for answer, piece in generation.pieces():
            if answer.index not in opened:
                opened.add(answer.index)
                if (first := shape.first(answer, usage=usage)) is not None:
                    told += f"data: {first}\n\n"
            if piece or answer.finish:
                told += f"data: {shape.chunk(answer, piece, usage=usage)}\n\n"
            if told and not generation.done:  # the last goes with the end: a write costs much
                yield told
                told = ""
    except ApiError as error:  # the status was sent long ago
        generation.facts["error"] = error.code
        yield f"data: {error.body()}\n\n"
        return
    if usage:
        counted = usage_of(generation.order.prompts, generation.answers)
        told += f"data: {shape.last(counted)}\n\n"
    yield f"{told}data: [DONE]\n\n"


async def _whole(generation: Generation, shape: Shape, receive: Receive) -> Response:
    """Answer at once, or give up when the client leaves."""

    async def work() -> None:
        async for _ in generation.pieces():
            pass

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=499)  # nobody reads it; the log does
        await tasks[0]
    finally:
        generation.end()
        for task in tasks:
            task.cancel()
    usage = usage_of(generation.order.prompts, generation.answers)
    return Response(shape.full(generation.answers, usage), media_type="application/json")


async def _answer(
    desk: Desk, request: Request, body: CompletionRequest | ChatRequest, kind: type[Shape]
) -> Response:
    model = desk.model(body.model)
    order = await desk.order(model, body)
    facts = request.scope["state"]["facts"]
    facts["stream"] = bool(body.stream)
    generation = Generation(model, order, desk.measures, facts)
    generation.start()
    shape = kind(body.model, model.tokenizer, logprobs=order.sampling.logprobs is not None)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(generation, _events(generation, shape, usage=usage))
    return await _whole(generation, shape, request.receive)


def create_app(
    models: Mapping[str, Model], *, rules: Rules, seconds: float, measures: Measures | None = None
) -> FastAPI:
    """Return the application.

    Args:
        models: by the name that clients ask for.
        rules: who may ask, and how much.
        seconds: that a request may take.
        measures: what is counted; new ones by default.
    """
    desk = Desk(models, measures or Measures(), seconds)
    for name, model in models.items():
        desk.measures.waiting.labels(name).set_function(model.scheduler.count_waiting)
        desk.measures.active.labels(name).set_function(model.scheduler.count_active)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models.values():
            if isinstance(model.scheduler, Relay):
                await model.scheduler.end()

    app = FastAPI(
        title="arskit serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to http, with the whole prompt, behind a proxy that speaks TLS
        lifespan=lifespan,
    )
    app.state.desk = desk
    handle_errors(app)
    _add_routes(app)
    app.add_middleware(Gate, rules=rules)
    if rules.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Journal, measures=desk.measures)
    return app


async def _desk(request: Request) -> Desk:  # not async, it would be called in a thread
    desk: Desk = request.app.state.desk
    return desk


AtDesk = Annotated[Desk, Depends(_desk)]


def _add_routes(app: FastAPI) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        code: {"description": "An error, in OpenAI's form."}
        for code in (400, 401, 403, 404, 408, 413, 429)
    }

    page = chat_page()

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return page

    @app.get("/health", responses={503: {"description": "An engine has ended."}})
    async def health(desk: AtDesk) -> dict[str, str]:
        ended = [name for name, model in desk.models.items() if model.scheduler.complaint()]
        if ended:
            raise ApiError(503, f"The engine of {', '.join(ended)} has ended.", code="engine_dead")
        return {"status": "ok"}

    for path, answer in (("/", root), ("/health", health)):  # as probes and link checkers ask
        app.head(path, include_in_schema=False)(answer)

    @app.get("/metrics", response_class=Response, responses=errors)
    async def metrics(desk: AtDesk) -> Response:
        return Response(generate_latest(desk.measures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=errors)
    async def models(desk: AtDesk) -> JSONResponse:
        cards = [_card(model) for model in desk.models.values()]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name}", response_model=ModelCard, responses=errors)
    async def model(name: str, desk: AtDesk) -> JSONResponse:
        return JSONResponse(_card(desk.model(name)))

    @app.post("/v1/completions", response_model=Completion, responses=errors)
    async def completions(
        body: Annotated[CompletionRequest, Body()], request: Request, desk: AtDesk
    ) -> Response:
        return await _answer(desk, request, body, CompletionShape)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=errors)
    async def chat(
        body: Annotated[ChatRequest, Body()], request: Request, desk: AtDesk
    ) -> Response:
        return await _answer(desk, request, body, ChatShape)


def _card(model: Model) -> dict[str, Any]:
    card = ModelCard(id=model.name, created=model.created, object="model", owned_by="arskit")
    context = model.scheduler.engine.context
    return {**card.model_dump(exclude_unset=True), "max_model_len": context}

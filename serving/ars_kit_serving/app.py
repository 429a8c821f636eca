"""The application: OpenAI's routes over the served models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
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
from ars_kit_serving.desk import Desk
from ars_kit_serving.failures import ApiError, handle_errors
from ars_kit_serving.generation import Generation, Model
from ars_kit_serving.guard import Gate, Journal, Rules
from ars_kit_serving.measures import Measures
from ars_kit_serving.protocol import ChatRequest, CompletionRequest
from ars_kit_serving.relaying import Relay


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

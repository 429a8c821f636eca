"""Errors as OpenAI's clients know them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and how to mend it.
        code: the same in a word, for programs.
        param: the field of the request that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> str:
        """Return the JSON text, in ASCII: what a client sent comes back escaped."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": kinds.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error})

    def response(self) -> Response:
        """Return the answer."""
        return Response(self.body(), self.status, self.headers, "application/json")


def no_model(name: str, served: list[str]) -> ApiError:
    """Return the answer to a request for a model that is not served."""
    return ApiError(
        404,
        f"The model {name[:80]!r} does not exist. Served: {', '.join(served)}",
        code="model_not_found",
        param="model",
    )


def too_long(prompt: int, answer: int, context: int) -> ApiError:
    """Return the answer to a request that does not fit the context."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens. However, you requested "
        f"{prompt + answer} tokens ({prompt} in the prompt, {answer} in the completion).",
        code="context_length_exceeded",
        param="messages",
    )


def bad_schema(why: object) -> ApiError:
    """Return the answer to a request whose schema is none, or cannot be held."""
    return ApiError(400, f"response_format: {why}", param="response_format", code="invalid_schema")


def engine_dead() -> ApiError:
    """Return the answer where nothing can be computed any more."""
    return ApiError(
        503, "The engine has ended; the server must be started anew.", code="engine_dead"
    )


def too_slow(seconds: float) -> ApiError:
    """Return the answer to a request whose time is up; asking again would end alike."""
    return ApiError(
        408,
        f"The request was not done after {seconds:g} seconds; ask for fewer tokens, or stream.",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def handle_errors(app: FastAPI) -> None:
    """Make the application answer every error in this form."""

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.endswith(("/json", "+json")):  # as curl -d sends it, and then nothing is read
            return ApiError(
                400, "Send JSON, with Content-Type: application/json.", code="invalid_content_type"
            ).response()
        first = _telling(error.errors())
        path = [str(part) for part in first["loc"][1:]]
        name = path[0] if path and first["type"] != "json_invalid" else None
        message = first["msg"] if name is None else f"{name}: {first['msg']}"
        return ApiError(400, message, param=name, code="invalid_value").response()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        words = {404: f"Unknown request URL: {request.method} {request.url.path[:200]}"}
        message = words.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()


def _telling(errors: Sequence[Any]) -> dict[str, Any]:
    """Return what is wrong with the first field that is wrong.

    A field may be of several types, and then each has an error. A value is meant for the one that
    it is of.
    """
    field = errors[0]["loc"][:2]
    same = [e for e in errors if e["loc"][:2] == field]
    found: dict[str, Any] = next((e for e in same if not e["type"].endswith("_type")), same[0])
    return found

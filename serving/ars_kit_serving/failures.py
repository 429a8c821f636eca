"""Errors as OpenAI's clients know them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping

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


def too_slow(seconds: float) -> ApiError:
    """Return the answer to a request whose time is up; asking again would end alike."""
    return ApiError(
        408,
        f"The request was not done after {seconds:g} seconds; ask for fewer tokens, or stream.",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )

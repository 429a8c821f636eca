"""What clients may ask: the OpenAI requests that are served, with their limits.

Fields that are not named here are accepted and have no effect, as clients send many; those that
would change the answer and cannot be honoured are refused by :func:`refusal`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ars_kit_serving.sampling import Sampling

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_SEQUENCES = 64
"""Sequences that one request may ask for: prompts times choices."""

DEFAULT_TOKENS = 16
"""Tokens of a completion that names no limit, as OpenAI has it. A chat may fill the context."""

FORMS = ("text", "json_object", "json_schema")
"""Types of ``response_format``."""

Stop = Annotated[str, Field(min_length=1, max_length=512)]
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
"""Fails fast, as every list without a limit here: a body has room for many thousand errors."""

Finite = ConfigDict(allow_inf_nan=False, extra="ignore")


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = Finite
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of request have."""

    model_config = Finite
    model: str = Field(max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, logprobs: int | None) -> Sampling:
        """Return how to draw; ``logprobs`` as in :class:`Sampling`."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            logprobs=logprobs,
        )


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | None
    ) = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class Part(BaseModel):
    """A piece of a message; text alone is understood."""

    model_config = Finite
    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = Finite
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=64)

    def plain(self) -> dict[str, str]:
        """Return what a chat template reads."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None


def refusal(request: CompletionRequest | ChatRequest) -> tuple[str, str] | None:
    """Return the field of a request that cannot be honoured, and why; or None."""
    kind = (request.response_format or {}).get("type", "text")
    if kind not in FORMS:
        return "response_format", f"its type may be {', '.join(FORMS)}"
    if request.stream_options is not None and not request.stream:
        return "stream_options", "it is for streams; send stream: true with it"
    if isinstance(request, ChatRequest):
        refused: dict[str, tuple[object, str]] = {
            "tools": (request.tools or request.functions, "the served models call no tools"),
            "top_logprobs": (
                request.top_logprobs is not None and not request.logprobs,
                "it needs logprobs: true",
            ),
        }
    else:
        refused = {
            "echo": (request.echo, "it is not supported"),
            "suffix": (request.suffix, "it is not supported"),
            "best_of": (
                request.best_of not in (None, request.choices),
                "it is not supported; ask for n answers and choose among them",
            ),
        }
    return next(((name, why) for name, (asked, why) in refused.items() if asked), None)

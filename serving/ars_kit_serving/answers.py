"""Answers in the making, and the two shapes that OpenAI gives them, whole and in chunks."""

from __future__ import annotations

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic_core import to_json

from ars_kit_serving.sampling import Drawn
from ars_kit_serving.scheduling import Finish
from ars_kit_serving.text import BROKEN, TextStream
from ars_kit_serving.tokenizing import ServedTokenizer


@dataclass(slots=True)
class Answer:
    """One choice in the making.

    Attributes:
        index: its number.
        text: turns tokens into text.
        tokens: drawn so far, the one that ended it included.
        finish: why it ended, or None.
        whole: its text so far.
        drawn: tokens that no chunk has reported yet.
    """

    index: int
    text: TextStream
    tokens: int = 0
    finish: Finish | None = None
    whole: str = ""
    drawn: list[Drawn] = field(default_factory=list)

    def take(self, drawn: Drawn, finish: Finish | None) -> str:
        """Take a token; returns the text that became certain."""
        self.tokens += 1
        piece = ""
        if finish != "stop":  # the token that ends a text is no part of it
            self.drawn.append(drawn)
            piece = self.text.push(drawn.token)
        if finish:
            piece += self.text.finish()
        self.finish = "stop" if self.text.stopped else finish
        self.whole += piece
        return piece


class Shape(ABC):
    """Fills OpenAI's types; what is the same in all of an answer's chunks is made once.

    Args:
        model: the name that was asked for.
        tokenizer: names tokens in log-probabilities.
        logprobs: whether they are reported.
    """

    prefix = ""

    def __init__(self, model: str, tokenizer: ServedTokenizer, *, logprobs: bool) -> None:
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self.tokenizer, self.logprobs = tokenizer, logprobs

    @abstractmethod
    def first(self, answer: Answer, *, usage: bool) -> str | None:
        """Return the chunk that opens a choice's stream, or None."""

    @abstractmethod
    def chunk(self, answer: Answer, piece: str, *, usage: bool) -> str:
        """Return a chunk as JSON text; takes the answer's unreported tokens."""

    @abstractmethod
    def last(self, usage: CompletionUsage) -> str:
        """Return the chunk that counts the tokens."""

    @abstractmethod
    def full(self, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        """Return the whole answer as JSON text."""


class CompletionShape(Shape):
    """``text_completion``."""

    prefix = "cmpl-"

    def __init__(self, model: str, tokenizer: ServedTokenizer, *, logprobs: bool) -> None:
        super().__init__(model, tokenizer, logprobs=logprobs)
        self.head["object"] = "text_completion"
        self._places: dict[int, _Place] = {}

    def first(self, answer: Answer, *, usage: bool) -> str | None:  # noqa: ARG002 -- the other's
        """Return nothing: a completion's stream begins with its text."""
        return None

    def chunk(self, answer: Answer, piece: str, *, usage: bool) -> str:
        """Return a chunk with the text since the last."""
        more = {"usage": None} if usage else {}
        return _text({**self.head, "choices": [self._choice(answer, piece)], **more})

    def last(self, usage: CompletionUsage) -> str:
        """Return the chunk without choices."""
        return Completion(**self.head, choices=[], usage=usage).model_dump_json(exclude_unset=True)

    def full(self, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        """Return the whole answer."""
        choices = [CompletionChoice(**self._choice(a, a.whole)) for a in answers]
        return Completion(**self.head, choices=choices, usage=usage).model_dump_json(
            exclude_unset=True
        )

    def _choice(self, answer: Answer, text: str) -> dict[str, Any]:
        fields = {"index": answer.index, "text": text, "finish_reason": answer.finish}
        return {**fields, "logprobs": self._logprobs(answer)}

    def _logprobs(self, answer: Answer) -> Any:
        if not self.logprobs:
            return None
        drawn, answer.drawn = answer.drawn, []
        place = self._places.setdefault(answer.index, _Place(self.tokenizer))
        return {
            "tokens": [self._name(d.token) for d in drawn],
            "token_logprobs": [d.logprob for d in drawn],
            # The token that was drawn is always among them, as OpenAI has it.
            "top_logprobs": [
                {self._name(t): p for t, p in (*d.top, (d.token, d.logprob))} for d in drawn
            ],
            "text_offset": [place.before(d.token) for d in drawn],
        }

    def _name(self, token: int) -> str:
        """Return a token's text, or its bytes as OpenAI spells them: here tokens are keys."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Place:
    """Where in an answer's text its tokens begin; several may spell one character.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: ServedTokenizer) -> None:
        self._tokenizer, self._characters = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def before(self, token: int) -> int:
        """Return the characters before a token, and go on behind it."""
        raw, held = self._tokenizer.shown_bytes(token), self._decoder.getstate()[0]
        first = self._decoder.decode(raw[:1])
        lost = bool(held) and first.startswith(BROKEN)  # what was held is no character after all
        place = self._characters + lost
        self._characters += len(first) + len(self._decoder.decode(raw[1:]))
        return place


class ChatShape(Shape):
    """``chat.completion`` and ``chat.completion.chunk``."""

    prefix = "chatcmpl-"

    def first(self, answer: Answer, *, usage: bool) -> str | None:
        """Return the chunk that names the role."""
        more = {"usage": None} if usage else {}
        return self._chunk(answer, {"role": "assistant", "content": ""}, None, None, more)

    def chunk(self, answer: Answer, piece: str, *, usage: bool) -> str:
        """Return a chunk with the text since the last."""
        more = {"usage": None} if usage else {}
        delta = {"content": piece} if piece or not answer.finish else {}
        return self._chunk(answer, delta, answer.finish, self._logprobs(answer), more)

    def _chunk(self, answer: Answer, delta: Any, finish: Any, logprobs: Any, more: Any) -> str:
        choice: Any = {
            "index": answer.index, "delta": delta, "finish_reason": finish, "logprobs": logprobs,
        }  # fmt: skip
        return _text({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def last(self, usage: CompletionUsage) -> str:
        """Return the chunk without choices."""
        made = ChatCompletionChunk(
            **self.head,
            object="chat.completion.chunk",
            choices=[],
            usage=usage,
        )
        return made.model_dump_json(exclude_unset=True)

    def full(self, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        """Return the whole answer."""
        choices: list[Any] = [
            {
                "index": a.index,
                "message": {"role": "assistant", "content": a.whole, "refusal": None},
                "finish_reason": a.finish,
                "logprobs": self._logprobs(a),
            }
            for a in answers
        ]
        made = ChatCompletion(
            **self.head,
            object="chat.completion",
            choices=choices,
            usage=usage,
        )
        return made.model_dump_json(exclude_unset=True)

    def _logprobs(self, answer: Answer) -> Any:
        if not self.logprobs:
            return None
        drawn, answer.drawn = answer.drawn, []
        content = [
            {**self._named(d.token, d.logprob), "top_logprobs": [self._named(*t) for t in d.top]}
            for d in drawn
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token)
        text = self.tokenizer.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def _text(chunk: dict[str, Any]) -> str:
    """Return a chunk as JSON; filling OpenAI's types for each costs more than drawing its token."""
    return to_json(chunk).decode()


def usage_of(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> CompletionUsage:
    """Count tokens: each prompt once, however many answers it got; every drawn token."""
    asked, made = sum(len(p) for p in prompts), sum(a.tokens for a in answers)
    return CompletionUsage(prompt_tokens=asked, completion_tokens=made, total_tokens=asked + made)

"""Answers that must be JSON, or JSON of a schema: which tokens may come next (llguidance).

A grammar is made of the schema, and before each token is drawn those that would leave it are ruled
out, as in Geng et al., "Grammar-Constrained Decoding" (2305.13971).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from ars_kit_serving.tokenizing import ServedTokenizer

COMPACT: Any = {"whitespace_flexible": False}
"""No spaces but after commas and colons: a model that is unsure would fill its answer with them."""


class SchemaError(Exception):
    """No grammar can be made of what was asked for; says why."""


class Constraint:
    """Where an answer stands in its grammar.

    Args:
        matcher: at that place.
        ends: ids that end a text, of which one may come where the grammar is complete.
        schema: that the grammar was made of, for engines that draw by themselves.
    """

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], schema: Mapping[str, Any]) -> None:
        self._matcher, self._ends, self.schema = matcher, ends, schema

    def copy(self) -> Constraint:
        """Return one of its own for another answer."""
        return Constraint(self._matcher.deep_copy(), self._ends, self.schema)

    def allowed(self, vocabulary: int) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next, shape (vocabulary,).

        Raises:
            SchemaError: the grammar outgrew its limits.
        """
        allowed = np.zeros(vocabulary, np.bool_)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed[list(self._ends)] = True
            return allowed
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        shared = min(vocabulary, len(mask))
        allowed[:shared] = mask[:shared]
        return allowed

    def take(self, token: int) -> None:
        """Go on by a token.

        Raises:
            SchemaError: the grammar outgrew its limits.
        """
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SchemaError(_first_line(self._matcher.get_error()))


def constraint_of(
    wanted: Mapping[str, Any] | None, tokenizer: ServedTokenizer
) -> Constraint | None:
    """Return the constraint of a request's ``response_format``; None for plain text.

    Args:
        wanted: as OpenAI has it; of type text, json_object or json_schema.
        tokenizer: of the model.

    Raises:
        SchemaError: the schema is none, or asks for what cannot be held.
    """
    kind = (wanted or {}).get("type", "text")
    if wanted is None or kind == "text":
        return None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if not isinstance(schema, Mapping):
            raise SchemaError("json_schema.schema must be a JSON schema, an object")
    try:
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), defaults=COMPACT)
        matcher = LLMatcher(tokenizer.for_grammars, grammar, log_level=0)
    except ValueError as error:
        raise SchemaError(_first_line(str(error))) from error
    made = Constraint(matcher, frozenset(tokenizer.ends), schema)
    made._check()  # noqa: SLF001 -- its maker
    try:
        made.allowed(tokenizer.size)  # some find out no sooner
    except SchemaError as error:
        raise SchemaError(f"no answer can keep to the schema ({error})") from error
    return made


def _first_line(text: str) -> str:
    """Return a reason in one line; that of a regular expression stands below a drawing of it."""
    lines = text.strip().splitlines() or ["no reason given"]
    first = f"{lines[0]} {lines[-1]}" if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    return first[:300]

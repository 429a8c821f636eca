"""From logits to a token: temperature, nucleus, penalties, bias, and log-probabilities.

The same arithmetic for every engine, so that the same request means the same on each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

COLDEST = 1e-5
"""A temperature below this is taken for it: logits divided by much less are infinite."""

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: share of the probability that is drawn from (nucleus sampling, 1904.09751); 0 takes
            the most likely token.
        presence_penalty: taken off the logit of each token that the answer already has.
        frequency_penalty: the same, times how often it has it.
        logit_bias: added to the logits of tokens, by id.
        seed: of the draws; None for another one each time.
        logprobs: how many of the most likely tokens to report with each; None for no report.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    @cached_property
    def bias(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """``logit_bias`` as ids and values: it may name every token, and is added at each step."""
        count = len(self.logit_bias)
        tokens = np.fromiter(self.logit_bias.keys(), np.int64, count)
        return tokens, np.fromiter(self.logit_bias.values(), np.float64, count)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token.

    Attributes:
        token: its id.
        logprob: its log-probability under the model's own distribution at temperature 1, where it
            was asked for.
        top: the most likely ids and their log-probabilities, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """Which tokens may come next, such as those that keep to a grammar.

    Attributes:
        schema: the JSON schema that they keep to.
    """

    schema: Mapping[str, Any]

    def allowed(self, vocabulary: int) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next, at least one, shape (vocabulary,)."""

    def take(self, token: int) -> None:
        """Hear which token came."""


class Sampler:
    """Draws the tokens of one answer.

    Args:
        how: see :class:`Sampling`.
        choice: the answer's number among those to the same request; each draws on its own.
        constraint: of this answer alone; log-probabilities are the model's, without it.
    """

    def __init__(
        self, how: Sampling, choice: int = 0, constraint: Constraint | None = None
    ) -> None:
        self.how, self.choice = how, choice
        self.constraint = constraint
        self._seen: Counter[int] = Counter()

    @cached_property
    def _random(self) -> np.random.Generator:
        seed = self.how.seed  # made when it is used: it costs as much as a request's JSON
        return np.random.default_rng(None if seed is None else (seed % 2**64, self.choice))

    def draw(self, logits: Floats) -> Drawn:
        """Return the next token; logits have shape (vocabulary,).

        Raises:
            ArithmeticError: they are no numbers to choose by, as of weights that overflow.
        """
        how = self.how
        if not np.isfinite(logits.max()):  # argmax would take the first NaN, often the text's end
            raise ArithmeticError("the model's logits are not finite")
        scores = self._adjusted(logits)
        if self.constraint is not None:
            scores = np.where(self.constraint.allowed(len(scores)), scores, -np.inf)
        if how.temperature == 0:
            token = int(scores.argmax())
        else:
            warmth = max(how.temperature, COLDEST)
            token = self._pick(_softmax(scores.astype(np.float64) / warmth))
        self._seen[token] += 1
        if self.constraint is not None:
            self.constraint.take(token)
        if how.logprobs is None:
            return Drawn(token)
        logs = np.log(np.maximum(_softmax(logits.astype(np.float64)), 1e-300))
        best = np.argsort(-logs, kind="stable")[: how.logprobs]
        return Drawn(token, float(logs[token]), tuple((int(i), float(logs[i])) for i in best))

    def _adjusted(self, logits: Floats) -> Floats:
        how = self.how
        penalised = (how.presence_penalty or how.frequency_penalty) and self._seen
        if not (how.logit_bias or penalised):
            return logits
        scores = logits.astype(np.float64)
        if how.logit_bias:
            tokens, biases = how.bias
            scores[tokens] += biases
        if penalised:
            for token, count in self._seen.items():
                scores[token] -= how.presence_penalty + how.frequency_penalty * count
        return scores

    def _pick(self, chances: npt.NDArray[np.float64]) -> int:
        point = self._random.random()
        if self.how.top_p >= 1:
            place = np.searchsorted(np.cumsum(chances), point, side="right")
            return min(int(place), len(chances) - 1)
        order = np.argsort(-chances, kind="stable")
        heights = np.cumsum(chances[order])
        reach = int(np.searchsorted(heights, self.how.top_p))
        kept = min(reach + 1, len(order))  # at least one
        spot = int(np.searchsorted(heights[:kept], point * heights[kept - 1], side="right"))
        return int(order[min(spot, kept - 1)])


def _softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    made: npt.NDArray[np.float64] = powers / powers.sum()
    return made

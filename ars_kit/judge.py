"""A member before its judges: evaluators and the held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from ars_kit.data import Corpus
from ars_kit.host import Host
from ars_kit.schema import Choice
from ars_kit.settings import Settings
from ars_kit.spec import Evaluand, Evaluator
from ars_kit.tokens import heldout_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PERPLEXITY = Choice("perplexity")
"""The one judge that every member has: the held-out loss chooses the best."""


def judges_of(settings: Settings) -> tuple[Choice, ...]:
    """Return a run's evaluators."""
    chosen = settings.run.evaluators
    named = {choice.name for choice in chosen}
    return chosen if PERPLEXITY.name in named else (PERPLEXITY, *chosen)


def judge(
    host: Host,
    settings: Settings,
    name: str,
    model: PreTrainedModel,
    corpus: Corpus,
    *,
    choices: Sequence[Choice] | None = None,
) -> dict[str, float | None]:
    """Ask evaluators about a model, in eval mode from here on.

    Args:
        host: the installed plugins.
        settings: how long the windows are, and how much is judged.
        name: of the model.
        model: on its device.
        corpus: whose held-out side it is judged on.
        choices: the evaluators; the run's if left out.

    Raises:
        PluginError: an evaluator raised, or returned something else than figures by name.
    """
    model.eval()
    found: dict[str, float | None] = {}
    for choice in judges_of(settings) if choices is None else choices:
        evaluator: Evaluator = host.make("evaluators", choice)
        evaluand = Evaluand(
            name=name,
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(str(corpus.tokenizer_dir)),
            heldout=heldout_windows(
                corpus.heldout, settings.data.sequence_length, settings.data.heldout_tokens
            ),
            context=settings.data.sequence_length,
            bytes_per_token=corpus.heldout_bytes_per_token,
            batch_size=settings.train.batch_size // settings.train.accumulation,
        )
        with host.blaming("evaluators", choice.name, f"judging {name}"):
            found |= _figures(evaluator(evaluand), known=found)
    return found


def _figures(answer: object, known: dict[str, float | None]) -> dict[str, float | None]:
    """Check what an evaluator returned; a figure that is not finite was not measured."""
    figures = dict(answer)  # type: ignore[call-overload]  # whatever a stranger returned
    for name, value in figures.items():
        if not isinstance(name, str) or not isinstance(value, int | float | None):
            raise TypeError(f"{name!r}: {value!r} is no figure by name")
        if name in known:
            raise ValueError(f"{name!r} was measured by an earlier evaluator")
    return {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}

"""A member before its judges: evaluators and the held-out text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from ars_kit.data import Corpus
from ars_kit.errors import ConfigError
from ars_kit.host import Host
from ars_kit.schema import Choice
from ars_kit.settings import Settings
from ars_kit.spec import Assessment, Evaluand, Evaluator
from ars_kit.tokens import heldout_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PERPLEXITY = Choice("perplexity")
"""The one judge that every member has: the held-out loss chooses the best."""
QUALITY = "quality"
"""The folder in a member's directory for the files that evaluators leave."""
_FILE = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Judged(Assessment):
    """What several evaluators found, taken together.

    Attributes:
        by: by the name of a figure, the evaluator that returned it.
    """

    by: Mapping[str, str] = field(default_factory=dict)


def judges_of(settings: Settings) -> tuple[Choice, ...]:
    """Return a run's evaluators."""
    chosen = settings.run.evaluators
    named = {choice.name for choice in chosen}
    return chosen if PERPLEXITY.name in named else (PERPLEXITY, *chosen)


def require_distinct(choices: Sequence[Choice]) -> None:
    """Refuse an evaluator that is named twice: both would measure the same figures.

    Raises:
        ConfigError: it is.
    """
    names = [choice.name for choice in choices]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"evaluator {twice[0]!r} is named twice; name it once")


def judge(
    host: Host,
    settings: Settings,
    name: str,
    model: PreTrainedModel,
    corpus: Corpus,
    *,
    choices: Sequence[Choice] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Judged:
    """Ask evaluators about a model, in eval mode from here on.

    Args:
        host: the installed plugins.
        settings: how long the windows are, and how much is judged.
        name: of the model.
        model: on its device.
        corpus: whose held-out side it is judged on.
        choices: the evaluators; the run's if left out.
        progress: told the share of each evaluator's work that is done.

    Returns:
        What they found, taken together.

    Raises:
        PluginError: an evaluator raised, or returned something else than figures by name.
    """
    model.eval()
    found = Judged({})
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
            stream=corpus.heldout,
            passages=corpus.passages,
            progress=progress,
        )
        with host.blaming("evaluators", choice.name, f"judging {name}"):
            more = checked(evaluator(evaluand))
            whole, by = joined(found, more), dict.fromkeys(more.figures, choice.name)
        found = Judged(whole.figures, whole.files, whole.notes, {**found.by, **by})
    return found


def write_files(found: Assessment, folder: Path) -> None:
    """Write an assessment's files into a member's directory."""
    for name, text in found.files.items():
        (folder / QUALITY).mkdir(exist_ok=True)
        (folder / QUALITY / name).write_text(text, encoding="utf-8")


def checked(answer: object) -> Assessment:
    """Check what an evaluator returned; a figure that is not finite was not measured."""
    if not isinstance(answer, Assessment):
        answer = Assessment(dict(answer))  # type: ignore[call-overload]  # whatever a stranger returned
    figures: dict[Any, Any] = dict(answer.figures)
    files: dict[Any, Any] = dict(answer.files)
    notes: dict[Any, Any] = dict(answer.notes)
    for name, value in figures.items():
        if not isinstance(name, str) or not isinstance(value, int | float | None):
            raise TypeError(f"{name!r}: {value!r} is no figure by name")
    for name, text in files.items():
        if not isinstance(text, str) or not _FILE.fullmatch(str(name)):
            raise TypeError(f"{name!r} is no text by file name")
        if re.search("[\ud800-\udfff]", text):
            raise TypeError(f"{name!r} holds a lone surrogate, which no file in UTF-8 can")
    for name, note in notes.items():
        if not isinstance(name, str) or not isinstance(note, str):
            raise TypeError(f"{name!r}: {note!r} is no note by name")
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}
    return Assessment(finite, files, notes)


def joined(found: Assessment, more: Assessment) -> Assessment:
    """Take two evaluators' answers together.

    Raises:
        ValueError: both gave a figure, a file or a note of one name.
    """
    both = [
        *(found.figures.keys() & more.figures.keys()),
        *(found.files.keys() & more.files.keys()),
        *(found.notes.keys() & more.notes.keys()),
    ]
    if both:
        raise ValueError(f"{both[0]!r} was measured by an earlier evaluator")
    return Assessment(
        {**found.figures, **more.figures},
        {**found.files, **more.files},
        {**found.notes, **more.notes},
    )

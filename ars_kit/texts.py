"""A run's texts: its own, on which all members are judged, and those that members train on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ars_kit.data import Corpus, prepare
from ars_kit.errors import DataError
from ars_kit.host import Host
from ars_kit.plan import require_batch
from ars_kit.roster import parse_roster
from ars_kit.settings import Settings
from ars_kit.source import NamedSource, parse_source
from ars_kit.spool import Progress
from ars_kit.tokenizer import Pretrained, TokenizerSpec, TrainBPE


def open_corpus(
    settings: Settings, host: Host, cache: Path, progress: Progress | None = None
) -> Corpus:
    """Prepare the run's text, or find it in the cache."""
    base = settings.family.base
    spec: TokenizerSpec = Pretrained(base) if base else TrainBPE(settings.family.vocab_size)
    return _prepared(settings.data.source, spec, settings, host, cache, progress)


def open_texts(
    settings: Settings, host: Host, cache: Path, progress: Progress | None = None
) -> dict[str, Corpus]:
    """Prepare the run's text and those of its members, or find them in the cache.

    A document that several of them hold is divided everywhere as in the first of them: what is held
    out of one is trained on in none.

    Returns:
        By source as it was written; the run's first, whose tokenizer serves them all.
    """
    base, main = settings.family.base, settings.data.source
    found = {main: open_corpus(settings, host, cache, progress)}
    ours = Pretrained(str(found[main].tokenizer_dir), ours=True)
    spec = Pretrained(base) if base else ours
    for text in (member.data for member in parse_roster(settings.family.members)):
        if text is not None and text not in found:
            beside = found.values()
            try:
                found[text] = _prepared(text, spec, settings, host, cache, progress, beside=beside)
            except DataError as error:
                raise DataError(f"{text}, the text of a member: {error}") from error
    return found


def _prepared(
    source: str,
    tokenizer: TokenizerSpec,
    settings: Settings,
    host: Host,
    cache: Path,
    progress: Progress | None,
    *,
    beside: Collection[Corpus] = (),
) -> Corpus:
    train, heldout = require_batch(settings)
    return prepare(
        NamedSource(host, parse_source(source, host)),
        tokenizer=tokenizer,
        cache=cache,
        heldout_fraction=settings.data.heldout_fraction,
        need_train=train,
        need_heldout=heldout,
        beside=beside,
        progress=progress,
    )

"""Judging what is there already: members, the best of them, or anybody's model, on any text.

What an evaluator found is kept in the cache under the checkpoint's hash, the text's, and the
evaluator's settings, so that nothing is measured twice unless it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ars_kit.causality import require_causal
from ars_kit.data import Corpus, prepare
from ars_kit.durable import directory_hash
from ars_kit.errors import ArsKitError
from ars_kit.figures import device_name
from ars_kit.host import Host
from ars_kit.judge import joined, judge, judges_of, require_distinct
from ars_kit.judgements import judgement_file, keep_judgement, named_files, read_judgement
from ars_kit.models import load_base_config, load_member
from ars_kit.outcome import FROZEN, kept_judgements, text_hashes
from ars_kit.plan import pick_device
from ars_kit.resolving import resolve
from ars_kit.schema import Choice
from ars_kit.settings import Settings
from ars_kit.source import NamedSource, parse_source
from ars_kit.spec import Assessment
from ars_kit.spool import Progress
from ars_kit.store import locate
from ars_kit.texts import open_texts
from ars_kit.tokenizer import Pretrained, TokenizerSpec, TrainBPE
from ars_kit.tokens import heldout_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class JudgingWatcher(Protocol):
    """Told how far the judging is."""

    def preparing(self, stage: str, count: int) -> None:
        """Hear of the text's preparation."""
        ...

    def judging(self, model: str, evaluator: str) -> None:
        """Hear that an evaluator starts."""
        ...

    def share(self, done: float) -> None:
        """Hear how much of its work is done, 0 to 1."""
        ...

    def judged(self, model: str, evaluator: str, *, cached: bool) -> None:
        """Hear that its figures are there, measured or from the cache."""
        ...

    def unkept(self, reason: str) -> None:
        """Hear, once, why figures are not in the cache for the next time."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Court:
    """What all judgements of one command share.

    Attributes:
        host: the installed plugins.
        settings: of the run, with what the user gave over them.
        out: the run folder.
        cache: of prepared text, and of judgements.
        whole: the text is nobody's training text: all of it is judged.
        fresh: measure again what is in the cache.
        watcher: told how far it is.
        device: that models are judged on, in float32.
        failures: why the cache could not keep what was found.
    """

    host: Host
    settings: Settings
    out: Path
    cache: Path
    whole: bool
    fresh: bool
    watcher: JudgingWatcher
    device: torch.device
    failures: list[str] = dataclasses.field(default_factory=list)


def evaluate(
    names: Sequence[str],
    host: Host,
    out: Path,
    cache: Path,
    overrides: Mapping[str, Any],
    *,
    watcher: JudgingWatcher,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """Judge members, ``best``, or any model directories; returns their figures and notes.

    Of evaluators that measure nothing, the texts they wrote are returned too, as ``files``.

    Args:
        names: what to judge.
        host: the installed plugins.
        out: the run folder, whose frozen settings apply where there are any.
        cache: of prepared text, and of judgements.
        overrides: settings by ``section.key`` that take their place.
        watcher: told how far it is.
        fresh: measure again what is in the cache.

    Raises:
        ConfigError: there is none of that name, it is no causal language model, an evaluator's
            setting does not fit, or the device is not here.
        DataError: the text cannot be had, or is too little.
        IntegrityError: a member is damaged.
        PluginError: an evaluator failed.
    """
    frozen = out / FROZEN
    own = resolve({}, {}, frozen) if frozen.exists() else None
    settings = resolve(overrides, {}, frozen if own else None)
    whole = "data.source" in overrides and (own is None or own.data.source != settings.data.source)
    if whole:
        data = dataclasses.replace(settings.data, heldout_fraction=1.0, heldout_tokens=None)
        settings = dataclasses.replace(settings, data=data)
    device = pick_device(settings.train.device)
    court = Court(host, settings, out, cache, whole, fresh, watcher, device)
    choices = settings.run.evaluators if "run.evaluators" in overrides else judges_of(settings)
    require_distinct(choices)
    for choice in choices:
        host.make("evaluators", choice)  # what does not fit is said before anything is loaded
    paths = [locate(name, out) for name in names]
    for path in paths:
        load_base_config(str(path.absolute()))  # what says itself that it is no decoder
    found = []
    for name, path in zip(names, paths, strict=True):
        label = path.name if name == "best" else name
        quality = _judged(court, label, path, choices)
        texts = {"files": dict(quality.files)} if quality.files else {}
        found.append({"model_id": label, **quality.figures, "notes": dict(quality.notes), **texts})
    if court.failures:
        watcher.unkept(court.failures[0])
    return found


def _judged(court: Court, label: str, path: Path, choices: Iterable[Choice]) -> Assessment:
    """Return what the evaluators find, or found when they were asked before."""
    asked, (court, corpus) = court, _before(court, path)
    notes = {**_by_whose_settings(court, path), **_changed(court, path, corpus)}
    if court.whole != asked.whole:
        notes |= {"text": f"{court.settings.data.source}: only what the run held out of it"}
    checkpoint = directory_hash(path)
    home = kept_judgements(court.cache, checkpoint)
    model: PreTrainedModel | None = None
    whole = Assessment({}, notes=notes)
    for choice in choices:
        identity = _identity(court, choice, corpus, checkpoint)
        file = judgement_file(home, identity)
        part = None if court.fresh else read_judgement(file)
        cached = part is not None
        if part is None:
            court.watcher.judging(label, choice.name)
            if model is None:
                model = load_member(path)
                require_causal(str(path), model)
                model.to(court.device)  # type: ignore[arg-type]
            part = judge(
                court.host,
                court.settings,
                label,
                model,
                corpus,
                choices=[choice],
                progress=court.watcher.share,
            )
            if failure := keep_judgement(file, identity, part):
                court.failures.append(failure)
        court.watcher.judged(label, choice.name, cached=cached)
        with court.host.blaming("evaluators", choice.name, f"judging {label}"):
            # Of an evaluator that measures nothing, what it wrote is all that there is to show.
            whole = joined(whole, dataclasses.replace(part, files={}) if part.figures else part)
    return whole


def _before(court: Court, path: Path) -> tuple[Court, Corpus]:
    """Return the text in a model's own tokens, and how it is judged.

    Of text that the model's run trained on, by whatever name it was asked for, only what was held
    out of it is judged.
    """
    corpus = _heard(court, path)
    if not court.whole or corpus.facts.data_hash not in _trained_on(path.parent):
        return court, corpus
    run = resolve({}, {}, path.parent / FROZEN).data
    data = dataclasses.replace(
        court.settings.data,
        heldout_fraction=run.heldout_fraction,
        heldout_tokens=run.heldout_tokens,
    )
    settings = dataclasses.replace(court.settings, data=data)
    court = dataclasses.replace(court, settings=settings, whole=False)
    return court, _as_trained(court, path, corpus.facts.data_hash) or _heard(court, path)


def _as_trained(court: Court, path: Path, text: str) -> Corpus | None:
    """Return a text that members of a model's run had of their own, divided as it was there.

    None where it is the run's own, which no other text has a say in, or where the run's texts are
    not all there any more.
    """
    if text == text_hashes(path.parent).get("data"):
        return None
    run = resolve({}, {}, path.parent / FROZEN)
    try:
        texts = open_texts(run, court.host, court.cache, court.watcher.preparing)
    except ArsKitError:
        return None
    return next((corpus for corpus in texts.values() if corpus.facts.data_hash == text), None)


def _trained_on(out: Path) -> set[str]:
    """Return the hashes of all texts of a run; none where there is no run."""
    known = text_hashes(out) if (out / FROZEN).exists() else {}
    others = known.get("others")
    texts = [known.get("data"), *(others.values() if isinstance(others, dict) else ())]
    return {text for text in texts if isinstance(text, str)}


def _heard(court: Court, path: Path) -> Corpus:
    return _prepared(
        court.settings,
        court.host,
        path,
        court.cache,
        need_train=0 if court.whole else 1,
        progress=court.watcher.preparing,
    )


def heldout_text(
    path: Path, host: Host, out: Path, cache: Path, overrides: Mapping[str, Any]
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield held-out text in a model directory's own tokens, in windows of the run's context.

    Args:
        path: the directory.
        host: the installed plugins.
        out: the run folder, whose frozen settings apply where there are any.
        cache: of prepared text.
        overrides: settings by ``section.key`` that take their place.

    Raises:
        DataError: the text cannot be had, or is too little.
    """
    frozen = out / FROZEN
    settings = resolve(overrides, {}, frozen if frozen.exists() else None)
    corpus = _prepared(settings, host, path, cache)
    return heldout_windows(corpus.heldout, settings.data.sequence_length)


def _prepared(
    settings: Settings,
    host: Host,
    path: Path,
    cache: Path,
    *,
    need_train: int = 1,
    progress: Progress | None = None,
) -> Corpus:
    """Return the text in a model's own tokens."""
    spec = _own_tokenizer(settings, path)
    found = partial(
        prepare,
        NamedSource(host, parse_source(settings.data.source, host)),
        cache=cache,
        heldout_fraction=settings.data.heldout_fraction,
        need_train=need_train,
        need_heldout=2,
        progress=progress,
    )
    corpus = found(tokenizer=spec)
    trained_with = text_hashes(path.parent).get("tokenizer", corpus.facts.tokenizer_hash)
    if isinstance(spec, TrainBPE) and corpus.facts.tokenizer_hash != trained_with:
        # Of text that has changed, or by other settings, another tokenizer is made than it learned.
        return found(tokenizer=Pretrained(str(path), ours=True))
    return corpus


def _changed(court: Court, path: Path, corpus: Corpus) -> dict[str, str]:
    """Return the note that a member's text is no longer what it was trained on, where it is not."""
    source, frozen = court.settings.data.source, path.parent / FROZEN
    if not frozen.exists() or resolve({}, {}, frozen).data.source != source:
        return {}
    now = corpus.facts.data_hash
    if court.whole or text_hashes(path.parent).get("data", now) == now:
        return {}
    return {
        "text": f"{source} has changed since {path.name} was trained: what is held out of it now "
        "may have been trained on"
    }


def _by_whose_settings(court: Court, path: Path) -> dict[str, str]:
    """Return the note by whose settings a model is judged that is no member of the run."""
    run, data = court.out / FROZEN, court.settings.data
    if run.exists() and path.resolve().parent == court.out.resolve():
        return {}
    named = court.settings.origins["data.source"] == "flag"
    what = f"a context of {data.sequence_length}" + ("" if named else f" on {data.source}")
    whose = "those of" if run.exists() else "the defaults, as no run is in"
    has_own = (path.parent / FROZEN).exists()
    own = f"; its own run's are had by --out {path.parent}" if has_own else ""
    return {"settings": f"{path.name} is judged with {what}, {whose} {court.out}{own}"}


def _own_tokenizer(settings: Settings, path: Path) -> TokenizerSpec:
    """Return the tokenizer that the run trained, or the one beside a stranger's weights."""
    is_ours = (path.parent / FROZEN).exists() and settings.family.base is None
    same_text = (
        is_ours and resolve({}, {}, path.parent / FROZEN).data.source == settings.data.source
    )
    return TrainBPE(settings.family.vocab_size) if same_text else Pretrained(str(path))


def _identity(court: Court, choice: Choice, corpus: Corpus, checkpoint: str) -> dict[str, Any]:
    """Return all that a judgement depends on."""
    data, facts = court.settings.data, corpus.facts
    beside = facts.fingerprint.get("beside")  # texts that it is divided like
    settings = court.host.check("evaluators", choice)
    return {
        "checkpoint": checkpoint,
        "data": facts.data_hash,
        "tokenizer": facts.tokenizer_hash,
        "heldout_fraction": data.heldout_fraction,
        **({"beside": beside} if beside else {}),
        "heldout_tokens": data.heldout_tokens,
        "context": data.sequence_length,
        "evaluator": choice.name,
        "settings": settings,
        "files": named_files(settings.values()),
        "plugin": str(court.host.listing("evaluators", choice.name).plugin),
        "device": device_name(court.device),
        "versions": {p: version(p) for p in ("torch", "transformers")},
    }

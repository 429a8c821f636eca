"""Held-out loss, perplexity and bits per byte, with an interval over documents."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ars_kit.errors import ConfigError
from ars_kit.resampling import bits_per_byte, interval
from ars_kit.spec import Assessment, Evaluand, Passage

SORTED = 4096
"""Windows that are sorted by length at once."""

Nats = npt.NDArray[np.float32]
T = TypeVar("T")


class Perplexity:
    """The mean negative log-likelihood of held-out tokens, each predicted once.

    Without a stride, the run's held-out tokens are one stream in windows that do not overlap: cheap
    enough for every member, and a token sees between 1 and ``context`` tokens before it. With one,
    every document of the whole held-out split is read by itself, after an end-of-text token, in
    windows that overlap by all but ``stride`` tokens, so that a token sees at least
    ``context`` - ``stride`` tokens of its document, where there are so many. That is the recipe of
    transformers' page "Perplexity of fixed-length models", for windows of ``context`` + 1 tokens.

    Args:
        stride: tokens that a window moves on by; None: the cheap way.
        context: tokens a window predicts from; None: those the member was trained with.

    Raises:
        ConfigError: they do not fit each other, or the model.
    """

    def __init__(self, stride: int | None, context: int | None) -> None:
        if stride is None and context is not None:
            raise ConfigError("'perplexity': context needs a stride beside it")
        self.stride, self.context = stride, context

    def __call__(self, member: Evaluand) -> Assessment:
        """Return the figures, how they were measured, and each document's part in them."""
        if self.stride is None:
            nats, how = _of_stream(member), f"windows of {member.context} that do not overlap"
            rows = list(_rows(member.passages, nats, shift=1))
        else:
            context = self._fitting(member, self.stride)
            how = f"each document by itself, context {context}, stride {self.stride}"
            nats = _of_documents(member, context, self.stride)
            rows = list(_rows(member.passages, nats, shift=0))
        return _assessment(rows, f"{len(nats):,} tokens, {how}")

    def _fitting(self, member: Evaluand, stride: int) -> int:
        context = self.context or member.context
        longest = getattr(member.model.config, "max_position_embeddings", None) or context
        if context > longest:
            raise ConfigError(
                f"'perplexity': {member.name} reads {longest} tokens at most; context={context}"
            )
        if not 1 <= stride <= context:
            raise ConfigError(
                f"'perplexity': stride={stride} must be between 1 and the context, {context}"
            )
        return context


def _assessment(rows: Sequence[dict[str, Any]], how: str) -> Assessment:
    # What is not finite was not measured, and JSON has no word for it.
    plain = ({**row, "nats": row["nats"] if math.isfinite(row["nats"]) else None} for row in rows)
    files = {"documents.jsonl": "".join(json.dumps(row) + "\n" for row in plain)}
    nats, tokens, sizes = (
        np.array([row[key] for row in rows], dtype=np.float64)
        for key in ("nats", "tokens", "bytes")
    )
    names = ("heldout_loss", "perplexity", "bits_per_byte")
    if not tokens.sum():
        return Assessment(dict.fromkeys((*names, "bits_per_byte_low", "bits_per_byte_high")))
    loss = float(nats.sum() / tokens.sum())
    low, high = interval(nats, sizes) or (None, None)
    figures = {
        "heldout_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "bits_per_byte": bits_per_byte(nats, sizes),
        "bits_per_byte_low": low,
        "bits_per_byte_high": high,
    }
    documents = len({row["document"] for row in rows})
    parts = f"{len(rows)} documents"
    if documents < len(rows):
        parts = f"{len(rows)} passages of {documents} document{'s' * (documents > 1)}"
    return Assessment(figures, files, {"perplexity": f"{how}; interval over {parts}"})


def _of_stream(member: Evaluand) -> Nats:
    """Return the nats of every token of the run's windows but the first, in order."""
    found, done = [], 0
    for batch in _batched(member.heldout, member.batch_size, key=len):
        ids = torch.from_numpy(np.stack(batch))
        found.append(_nats(member.model, ids, ids.shape[1] - 1).flatten())
        done += len(found[-1])
        member.progress(min(1.0, done / max(1, len(member.stream) - 1)))
    return np.concatenate(found) if found else np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class _Window:
    """One forward pass, in places of the stream; place ``document`` - 1 is an end of text.

    Attributes:
        document: where its document begins.
        start: its first token; the one before it is read too, and predicted by nobody.
        stop: past its last.
        first: the first token that is predicted here; those before it are context.
    """

    document: int
    start: int
    stop: int
    first: int


def _of_documents(member: Evaluand, context: int, stride: int) -> Nats:
    """Return the nats of every token of the stream, documents by themselves."""
    end = member.tokenizer.eos_token_id
    found: Nats = np.full(len(member.stream), np.nan, dtype=np.float32)
    windows = _windows(member.passages, context, stride)
    while block := list(itertools.islice(windows, SORTED)):
        block.sort(key=lambda w: (w.stop - w.start, w.first - w.start))
        for batch in _batched(block, member.batch_size):
            width = max(w.stop - w.start for w in batch) + 1
            ids = np.full((len(batch), width), end, dtype=np.int64)  # short ones end in padding
            for row, w in zip(ids, batch, strict=True):
                begin = max(w.start - 1, w.document)
                row[begin - w.start + 1 : w.stop - w.start + 1] = member.stream[begin : w.stop]
            keep = width - 1 - min(w.first - w.start for w in batch)
            nats = _nats(member.model, torch.from_numpy(ids), keep)
            for row, w in zip(nats, batch, strict=True):
                at = keep - (width - 1) + w.first - w.start
                found[w.first : w.stop] = row[at : at + w.stop - w.first]
        member.progress(max(w.stop for w in block) / len(member.stream))
    return found


def _windows(passages: Sequence[Passage], context: int, stride: int) -> Iterator[_Window]:
    for _, group in itertools.groupby(passages, key=lambda p: p.document):
        parts = list(group)
        begin, end = parts[0].start, parts[-1].stop
        done = begin
        for start in range(begin, end, stride):
            stop = min(start + context, end)
            yield _Window(begin, start, stop, done)
            done = stop
            if stop == end:
                break


def _nats(model: PreTrainedModel, ids: torch.Tensor, keep: int) -> Nats:
    """Return the nats of the last ``keep`` tokens of each row, shape (n_rows, keep).

    Args:
        model: causal, so that what pads a row on the right changes nothing before it.
        ids: int64, shape (n_rows, width).
        keep: tokens of each row.
    """
    ids = ids.to(model.device)
    with torch.inference_mode():
        out = model(input_ids=ids[:, :-1], use_cache=False, **last(model, keep))
        logits = out.logits[:, -keep:]
        nats = cross_entropy(
            logits.flatten(0, 1).float(), ids[:, -keep:].flatten(), reduction="none"
        )
    return np.asarray(nats.view(len(ids), keep).float().cpu())


def last(model: PreTrainedModel, keep: int) -> dict[str, int]:
    """Return what keeps all but the last ``keep`` places out of the head, where a model can."""
    able = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": keep} if able else {}


def _rows(passages: Sequence[Passage], nats: Nats, shift: int) -> Iterator[dict[str, Any]]:
    """Yield what each passage has of the judged tokens, as far as they were judged.

    Args:
        passages: of the stream.
        nats: of its tokens from place ``shift`` on.
        shift: places that nobody predicted.
    """
    end = shift + len(nats)
    for passage in passages:
        first, stop = max(passage.start, shift), min(passage.stop, end)
        if first >= stop:
            if passage.start >= stop:
                return
            continue
        whole = passage.stop - passage.start
        yield {
            "document": passage.document,
            "origin": passage.origin,
            "nats": float(nats[first - shift : stop - shift].sum(dtype=np.float64)),
            "tokens": stop - first,
            # Of a passage that was judged in part, the bytes are those of its tokens' share.
            "bytes": round(passage.bytes * (stop - first) / whole),
        }


def _batched(
    items: Iterable[T], size: int, key: Callable[[T], Any] | None = None
) -> Iterator[list[T]]:
    """Yield lists of at most ``size`` neighbours, alike in ``key``."""
    for _, group in itertools.groupby(items, key=key or (lambda _: None)):
        while batch := list(itertools.islice(group, size)):
            yield batch

"""How fast `perplexity:stride=...` reads held-out text, against the loop everybody writes.

The loop is that of transformers' page "Perplexity of fixed-length models", document by document:
one window at a time, the loss by ``labels``. Both read the same windows of the same documents
with the same model, in turns within one process, and must find the same nats of every document. The
bar is three times as fast. It is judged on whole documents, and on their paragraphs as documents of
their own, where the loop's windows are short. Speed does not depend on what a model has learned, so
its weights are random, in the shape of a member of the default family.

With ``--bleu`` instead the pairs that a trained member left (``quality/bleu.jsonl``)
are scored a second time with their prompts counted, to show what that is worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch
import transformers
from ending import numbers, run
from transformers import AutoTokenizer, PreTrainedModel

from ars_kit.data import Corpus, prepare
from ars_kit.host import Host
from ars_kit.models import build, count_parameters
from ars_kit.schema import Choice
from ars_kit.shapes import embedded_config
from ars_kit.source import NamedSource, parse_source
from ars_kit.spec import DataSource, Document, Evaluand
from ars_kit.tokenizer import TrainBPE

BAR, TOLERANCE = 3.0, 1e-5
VOCABULARY = 1024

Nats = list[float]


@dataclass(frozen=True)
class Paragraphs:
    """A source whose documents are the paragraphs of another's."""

    whole: DataSource

    def fingerprint(self) -> dict[str, Any]:
        """Return the other's, as that of its paragraphs."""
        return {"paragraphs": self.whole.fingerprint()}

    def documents(self) -> Iterator[Document]:
        """Yield the paragraphs: what stands between blank lines."""
        for document in self.whole.documents():
            for text in document.text.split("\n\n"):
                yield Document(text, document.origin)


def opened(source: str, cache: Path, *, paragraphs: bool) -> Corpus:
    """Return a text, prepared as a run prepares it."""
    host = Host.installed()
    named: DataSource = NamedSource(host, parse_source(source, host))
    if paragraphs:
        named = Paragraphs(named)
    return prepare(named, tokenizer=TrainBPE(VOCABULARY), cache=cache)


def evaluand(
    model: PreTrainedModel, corpus: Corpus, *, context: int, tokens: int, batch_size: int
) -> Evaluand:
    """Return a model before the first documents of a held-out split, at least ``tokens`` long."""
    last = next((p.document for p in corpus.passages if p.stop >= tokens), None)
    passages = [p for p in corpus.passages if last is None or p.document <= last]
    return Evaluand(
        name="model",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(str(corpus.tokenizer_dir)),
        heldout=[],
        context=context,
        bytes_per_token=corpus.heldout_bytes_per_token,
        batch_size=batch_size,
        stream=corpus.heldout[: passages[-1].stop],
        passages=passages,
    )


def batched(member: Evaluand, stride: int) -> Nats:
    """Return each passage's nats, as the evaluator finds them."""
    judge = Host.installed().make("evaluators", Choice("perplexity", {"stride": stride}))
    rows = judge(member).files["documents.jsonl"].splitlines()
    return [json.loads(row)["nats"] for row in rows]


def plain(member: Evaluand, stride: int) -> Nats:
    """Return each document's nats by the loop, after an end-of-text token."""
    found: dict[int, float] = {}
    bounds: dict[int, tuple[int, int]] = {}
    for p in member.passages:
        bounds[p.document] = (bounds.get(p.document, (p.start, 0))[0], p.stop)
    for document, (start, stop) in bounds.items():
        tokens = np.asarray(member.stream[start:stop], np.int64)
        ids = torch.tensor([[member.tokenizer.eos_token_id, *tokens]])
        found[document] = recipe(member.model, ids, member.context + 1, stride)
    return list(found.values())


def recipe(model: PreTrainedModel, ids: torch.Tensor, longest: int, stride: int) -> float:
    """Return the nats of all ids but the first; each window's mean counts for what it is over."""
    total, previous = 0.0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + longest, ids.shape[1])
        window = ids[:, begin:end].to(model.device)
        target = window.clone()
        target[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(window, labels=target).loss
        total += float(loss) * int((target[:, 1:] != -100).sum())
        previous = end
        if end == ids.shape[1]:
            break
    return total


def compare(member: Evaluand, stride: int, rounds: int) -> dict[str, Any]:
    """Time both in turns, the first of each round drawn; returns ratios and how the nats differ."""
    ways: dict[str, Callable[[Evaluand, int], Nats]] = {"plain": plain, "batched": batched}
    found = {name: way(member, stride) for name, way in ways.items()}  # warm, and not timed
    one, two = (np.array(found[name]) for name in ways)
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in rng.sample(list(ways), 2):
            begin = time.perf_counter()
            ways[name](member, stride)
            seconds[name].append(time.perf_counter() - begin)
    ratios = [p / b for p, b in zip(seconds["plain"], seconds["batched"], strict=True)]
    tokens = len(member.stream)
    median = statistics.median(ratios)
    differs = float(np.max(np.abs(one - two) / one))
    return {
        "documents": len(one),
        "tokens": tokens,
        "context": member.context,
        "stride": stride,
        "batch_size": member.batch_size,
        "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()},
        "ratio": median,
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "rounds": rounds,
        "largest_relative_difference": differs,
        "met": median >= BAR and differs <= TOLERANCE,
    }


def with_and_without_prompt(pairs: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Return BLEU and chrF of continuations, and of prompt and continuation in one."""
    found = {}
    for name, head in (("continuation", ""), ("prompt_included", "prompt")):
        hypotheses, references = (
            [pair.get(head, "") + pair[part] for pair in pairs]
            for part in ("hypothesis", "reference")
        )
        found[f"bleu_{name}"] = sacrebleu.corpus_bleu(hypotheses, [references]).score
        found[f"chrf_{name}"] = sacrebleu.corpus_chrf(hypotheses, [references]).score
    return found


def bleu_of(member: Path) -> dict[str, Any]:
    """Return what a trained member's pairs score, and what the member is."""
    lines = (member / "quality" / "bleu.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = json.loads((member / "metrics.json").read_text(encoding="utf-8"))
    found = {
        "member": metrics["model_id"],
        "parameters": metrics["parameters"],
        "trained_on_tokens": metrics["lineage_tokens"],
        "how": metrics["notes"]["bleu"],
        "signature": metrics["notes"]["bleu_signature"],
        **with_and_without_prompt([json.loads(line) for line in lines]),
    }
    print(json.dumps(found))
    return found


def speed_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return each shape's ratio on documents and on paragraphs, for each number of threads."""
    texts = {
        "documents": opened(options.data, options.cache, paragraphs=False),
        "paragraphs": opened(options.data, options.cache, paragraphs=True),
    }
    report: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text": options.data,
        "bar": {"ratio": BAR, "largest_relative_difference": TOLERANCE},
        "speed": [],
    }
    ways = itertools.product(options.threads, options.depths, texts.items())
    for threads, depth, (text, corpus) in ways:
        torch.set_num_threads(threads)
        config = embedded_config(depth, vocab_size=VOCABULARY, context=options.context)
        member = evaluand(
            build(config, seed=0).eval(),
            corpus,
            context=options.context,
            tokens=options.tokens,
            batch_size=options.batch_size,
        )
        found = compare(member, options.stride, options.rounds)
        shape = {"shape": f"d{depth}", "parameters": count_parameters(config), "of": text}
        report["speed"].append({**shape, "threads": threads, **found})
        print(json.dumps(report["speed"][-1]), flush=True)
    return report


def main() -> None:
    """Measure, print, and write the figures where they are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="stdlib", help="a source of text")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "arskit")
    parser.add_argument(
        "--depths", type=numbers, default="10,18", help="shapes of the default family's members"
    )
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8000, help="read so many, or a little more")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    cores = ",".join(map(str, sorted({1, os.cpu_count() or 1})))
    parser.add_argument(
        "--threads", type=numbers, default=cores, help="one, and all, as arskit evaluate takes"
    )
    parser.add_argument("--bleu", type=Path, help="a member that was judged with bleu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    report = bleu_of(options.bleu) if options.bleu else speed_of(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)

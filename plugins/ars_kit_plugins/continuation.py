"""What a model writes: continuations of held-out passages against the true ones, and samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import GenerationConfig

from ars_kit.errors import ConfigError
from ars_kit.spec import Assessment, Evaluand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = ("Erkläre AGI Framework", "The", "Once upon a time", "import")
"""What every member of every family is asked to continue."""
USUAL = 32
"""Tokens of a prompt and of its continuation, where the context has room for both."""


class Bleu:
    """BLEU and chrF of greedy continuations; the prompt is no part of what is compared.

    A prompt is copied into both texts by whoever counts it, and matches itself.

    Args:
        prompt: tokens of a held-out passage that the model is given.
        length: tokens after them, to be continued.
        passages: how many, evenly spread over the held-out split.

    Raises:
        ConfigError: one of them is less than 1, or the model cannot read as many.
    """

    def __init__(self, prompt: int | None, length: int | None, passages: int) -> None:
        for name, value in (("prompt", prompt), ("length", length), ("passages", passages)):
            if value is not None and value < 1:
                raise ConfigError(f"'bleu': {name}={value} must be at least 1")
        self.prompt, self.length, self.passages = prompt, length, passages

    def __call__(self, member: Evaluand) -> Assessment:
        """Return ``bleu`` and ``chrf`` (0 to 100), their signatures, and the pairs."""
        from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415 -- only who asks waits for it
        from sacrebleu.metrics.chrf import CHRF  # noqa: PLC0415 -- likewise

        prompt, length = lengths(member, "bleu", self.prompt, self.length)
        passages = _spread(member, prompt + length, self.passages)
        if not passages:
            note = f"no held-out document has {prompt + length} tokens"
            return Assessment({"bleu": None, "chrf": None}, notes={"bleu": note})
        pairs = _continued(member, passages, prompt)
        hypotheses = [pair["hypothesis"] for pair in pairs]
        references = [[pair["reference"] for pair in pairs]]
        bleu, chrf = BLEU(), CHRF()
        figures = {
            "bleu": bleu.corpus_score(hypotheses, references).score,
            "chrf": chrf.corpus_score(hypotheses, references).score,
        }
        how = f"{len(pairs)} passages, {length} tokens after a prompt of {prompt}, greedy"
        notes = {
            "bleu": f"{how}; the prompt is not compared",
            "bleu_signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        return Assessment(figures, {"bleu.jsonl": "".join(lines)}, notes)


class Samples:
    """What the model writes after fixed prompts, greedily: to be read, not counted.

    Args:
        length: tokens at most.

    Raises:
        ConfigError: it is less than 1.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ConfigError(f"'generate': length={length} must be at least 1")
        self.length = length

    def __call__(self, member: Evaluand) -> Assessment:
        """Return no figure, but the samples."""
        samples = []
        for done, prompt in enumerate(PROMPTS):
            ids = member.tokenizer(prompt, return_tensors="pt").input_ids
            room = longest(member) - ids.shape[1]
            text = ""
            if room > 0:
                text = decoded(member.tokenizer, generated(member, ids, min(self.length, room))[0])
            samples.append({"prompt": prompt, "text": text})
            member.progress((done + 1) / len(PROMPTS))
        made = json.dumps(samples, indent=1, ensure_ascii=False) + "\n"
        note = f"greedy, {self.length} tokens at most"
        return Assessment({}, {"samples.json": made}, {"generate": note})


def lengths(member: Evaluand, who: str, prompt: int | None, length: int | None) -> tuple[int, int]:
    """Return how many tokens to give and how many to ask for.

    Args:
        member: who is asked.
        who: the evaluator, for complaints.
        prompt: tokens wanted; None for the usual number, or what the context has room for.
        length: likewise.

    Raises:
        ConfigError: the model cannot read as many.
    """
    room = longest(member)
    usual = max(1, min(USUAL, member.context // 2))
    prompt, length = prompt or usual, length or usual
    if prompt + length > room:
        raise ConfigError(
            f"{who!r}: {member.name} reads {room} tokens at most, fewer than prompt={prompt} and "
            f"length={length} together"
        )
    return prompt, length


def longest(member: Evaluand) -> int:
    """Return how many tokens the model can read."""
    return getattr(member.model.config, "max_position_embeddings", None) or member.context


def generated(member: Evaluand, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return the greedy continuations of rows of ids, without the prompts."""
    end = member.tokenizer.eos_token_id
    # Said in full, so that a model's own taste in sampling does not come in between.
    how = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        max_new_tokens=length,
        eos_token_id=end,
        pad_token_id=end,
    )
    ids = ids.to(member.model.device)
    generate: Any = member.model.generate  # typed as a tensor or a module
    with torch.inference_mode():
        made = generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return cast("torch.Tensor", made[:, ids.shape[1] :].cpu())


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Return the text of ids, end-of-text tokens left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _spread(member: Evaluand, size: int, most: int) -> list[Any]:
    """Return at most ``most`` spans of ``size`` tokens, each inside a document, evenly spread."""
    ends: dict[int, list[int]] = {}
    for passage in member.passages:
        ends.setdefault(passage.document, [passage.start])[1:] = [passage.stop]
    starts = [
        begin
        for start, stop in ends.values()
        for begin in range(start, stop - size, size)  # without the end-of-text token
    ]
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(most, len(starts))).round().astype(int))
    return [np.asarray(member.stream[starts[i] : starts[i] + size], np.int64) for i in chosen]


def _continued(member: Evaluand, passages: Sequence[Any], prompt: int) -> list[dict[str, str]]:
    pairs = []
    for first in range(0, len(passages), member.batch_size):
        ids = torch.from_numpy(np.stack(passages[first : first + member.batch_size]))
        made = generated(member, ids[:, :prompt], ids.shape[1] - prompt)
        pairs += [
            {
                "prompt": decoded(member.tokenizer, true[:prompt]),
                "hypothesis": decoded(member.tokenizer, hypothesis),
                "reference": decoded(member.tokenizer, true[prompt:]),
            }
            for true, hypothesis in zip(ids, made, strict=True)
        ]
        member.progress(len(pairs) / len(passages))
    return pairs

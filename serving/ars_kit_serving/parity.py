"""Whether an exported model computes what the trained one does.

Both see the same text. Where the format keeps the arithmetic, every logit is compared: of whole
sequences, of sequences that went through the cache, alone and four of different lengths together
(which is where padding goes wrong); and the most likely continuation must be the same. Where the
format rounds, the loss on held-out text and the most likely tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from ars_kit.errors import ParityError
from ars_kit.spec import Engine

LENGTHS = (1, 5, 17, 33)
"""Tokens of the prompts, where the context has room for them."""

STEPS = 8
"""Tokens of the text that follow a prompt one at a time; in a small context half of it."""

GREEDY = 24
"""Tokens that are made up from each prompt; in a small context half of it."""

WORSE = 0.05
"""Nats per token by which a format that rounds may raise the loss."""

AGREEMENT = 0.9
"""Share of positions at which it must find the same token most likely."""

JUDGED = 1024
"""Tokens of text that such a format is judged on."""

OWN = 64
"""Tokens that follow the first in a text that a model makes up."""

Floats = npt.NDArray[np.float32]


def compare(
    model: PreTrainedModel, engine: Engine, texts: Sequence[Sequence[int]], tolerance: float | None
) -> dict[str, Any]:
    """Compare an engine with the model it was exported from.

    Args:
        model: as it was trained, in eval mode, on the CPU.
        engine: of the export, with four slots.
        texts: of tokens, at least one.
        tolerance: as in :class:`ars_kit.spec.Exporter`.

    Returns:
        What was compared and found, JSON-ready.

    Raises:
        ParityError: they differ by more than they may, with the numbers.
    """
    if tolerance is None:
        return _judge(model, engine, texts)
    prompts = _prompts(texts, engine.context)
    found = _Largest()
    for prompt, following in prompts:
        whole = _reference(model, [*prompt, *following])
        found.see(engine.prefill(0, [*prompt, *following]), whole[-1])  # without the cache
        engine.release(0)
        _follow(engine, [(prompt, following)], [whole], found)
    together = [_reference(model, [*p, *f]) for p, f in prompts]
    _follow(engine, prompts, together, found)
    allowed = tolerance * max(1.0, found.scale)
    facts = {
        "compared": {
            "prompts": [len(p) for p, _ in prompts],
            "tokens_through_the_cache": min(len(following) for _, following in prompts),
            "batches": [1, len(prompts)],
            "logits": found.count,
        },
        "largest_difference": found.difference,
        "largest_logit": found.scale,
        "allowed": allowed,
    }
    if not found.difference <= allowed:  # a NaN is no parity
        raise ParityError(
            f"the exported model's logits differ by {found.difference:.3g} where {allowed:.3g} is "
            "allowed; nothing was written"
        )
    return facts | _same_text(model, engine, [p for p, _ in prompts], allowed)


class _Largest:
    """The largest difference seen."""

    def __init__(self) -> None:
        self.difference, self.scale, self.count = 0.0, 0.0, 0

    def see(self, logits: Floats, wanted: Floats) -> None:
        shared = min(len(logits), len(wanted))  # a vocabulary may be padded
        difference = float(np.abs(logits[:shared] - wanted[:shared]).max())
        self.difference = float(np.maximum(self.difference, difference))  # a NaN stays
        self.scale = max(self.scale, float(np.abs(wanted).max()))
        self.count += shared


def _prompts(texts: Sequence[Sequence[int]], context: int) -> list[tuple[list[int], list[int]]]:
    """Return prompts of several lengths, each with the tokens that follow it.

    A text that is too short goes on with the next: in prompts of one length nobody would see that
    padding is ignored.
    """
    made = []
    steps, greedy = (_fitting(count, context) for count in (STEPS, GREEDY))
    for number, length in enumerate(LENGTHS):
        first = number % len(texts)
        size = max(1, min(length, context - max(steps, greedy)))
        endless = chain.from_iterable(cycle([*texts[first:], *texts[:first]]))
        text = list(islice(endless, size + steps))
        made.append((text[:size], text[size:]))
    return made


def _fitting(count: int, context: int) -> int:
    return max(1, min(count, context // 2))


@torch.inference_mode()
def _reference(model: PreTrainedModel, tokens: Sequence[int]) -> Floats:
    """Return the model's logits, shape (tokens, vocabulary)."""
    made = model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    logits: Floats = made.logits[0].float().numpy()
    return logits


def _follow(
    engine: Engine,
    prompts: Sequence[tuple[list[int], list[int]]],
    wanted: Sequence[Floats],
    found: _Largest,
) -> None:
    """Put prompts through the engine together, and the text after them a token at a time."""
    for slot, (prompt, _) in enumerate(prompts):
        found.see(engine.prefill(slot, prompt), wanted[slot][len(prompt) - 1])
    for step in range(min(len(following) for _, following in prompts)):
        tokens = {slot: following[step] for slot, (_, following) in enumerate(prompts)}
        for slot, row in enumerate(engine.decode(tokens)):
            found.see(row, wanted[slot][len(prompts[slot][0]) + step])
    for slot in range(len(prompts)):
        engine.release(slot)


def _same_text(
    model: PreTrainedModel, engine: Engine, prompts: Sequence[list[int]], allowed: float
) -> dict[str, Any]:
    """Let both go on from the prompts, taking the most likely token each time."""
    rows = [engine.prefill(slot, prompt) for slot, prompt in enumerate(prompts)]
    made: list[list[int]] = [[int(row.argmax())] for row in rows]
    count = _fitting(GREEDY, engine.context)
    for _ in range(count - 1):
        logits = engine.decode({slot: tokens[-1] for slot, tokens in enumerate(made)})
        for tokens, row in zip(made, logits, strict=True):
            tokens.append(int(row.argmax()))
    equal, ties = 0, 0
    for slot, (prompt, tokens) in enumerate(zip(prompts, made, strict=True)):
        engine.release(slot)
        wanted = _reference(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        # Along the engine's own text: where the model would have gone another way, it is a tie
        # that rounding may decide, or they are not the same.
        lost = [float(row.max() - row[token]) for row, token in zip(wanted, tokens, strict=True)]
        if max(lost) > 2 * allowed:
            raise ParityError(
                f"greedy text differs: after {lost.index(max(lost))} tokens the exported model "
                f"takes one whose logit is {max(lost):.3g} below the best; nothing was written"
            )
        ties += max(lost) > 0
        equal += max(lost) == 0
    return {"greedy": {"tokens": count, "prompts": len(prompts), "equal": equal, "ties": ties}}


def _judge(
    model: PreTrainedModel, engine: Engine, texts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare losses and most likely tokens over the texts."""
    losses, own, same, count = 0.0, 0.0, 0, 0
    for text in _windows(texts, engine.context):
        wanted = _reference(model, text)[:-1]
        rows = [engine.prefill(0, text[:1])]
        rows += [engine.decode({0: token})[0] for token in text[1:-1]]
        engine.release(0)
        found = np.stack(rows)[:, : wanted.shape[1]]
        targets = np.array(text[1:])
        losses += _nll(found, targets)
        own += _nll(wanted, targets)
        same += int((found.argmax(1) == wanted.argmax(1)).sum())
        count += len(targets)
    facts = {
        "compared": {"tokens": count},
        "loss": losses / count,
        "loss_of_the_model": own / count,
        "allowed_loss": own / count + WORSE,
        "agreement": same / count,
        "allowed_agreement": AGREEMENT,
    }
    if not (facts["loss"] <= facts["allowed_loss"] and facts["agreement"] >= AGREEMENT):  # type: ignore[operator] # two numbers
        raise ParityError(
            f"the exported model's loss is {losses / count:.4f} nats per token against "
            f"{own / count:.4f} ({WORSE} more is allowed), and it agrees on the most likely token "
            f"at {same / count:.1%} of the positions ({AGREEMENT:.0%} is needed); nothing was "
            "written"
        )
    return facts


@torch.inference_mode()
def own_texts(model: PreTrainedModel, context: int) -> list[list[int]]:
    """Return text that a model makes up, of as many tokens as a format that rounds is judged on.

    On it the model's loss is its own entropy, so what another's exceeds it by is how far the two
    are apart, KL(model || other). Each begins with a token drawn evenly; the rest is drawn at
    temperature 1. The same model makes the same.

    Args:
        model: a decoder with a cache, in eval mode, on the CPU.
        context: tokens that a text may have, two at least.
    """
    steps = min(context - 1, OWN)
    draw = torch.Generator().manual_seed(0)
    size = int(model.config.get_text_config().vocab_size)
    last = torch.randint(size, (-(-JUDGED // steps), 1), generator=draw)
    texts, cache = [last], None
    for _ in range(steps):
        made = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, odds = made.past_key_values, made.logits[:, -1].float().softmax(-1)
        last = torch.multinomial(odds, 1, generator=draw)
        texts.append(last)
    return torch.cat(texts, dim=1).tolist()


def _windows(texts: Sequence[Sequence[int]], context: int) -> Iterator[list[int]]:
    left = JUDGED
    for text in texts:
        window = list(text[: min(context, left + 1)])
        if len(window) > 1:
            left -= len(window) - 1
            yield window
        if left <= 0:
            return


def _nll(logits: Floats, targets: npt.NDArray[np.int64]) -> float:
    """Return the summed negative log-likelihood in nats."""
    wide = torch.from_numpy(logits).double().log_softmax(-1)
    return float(-wide[torch.arange(len(targets)), torch.from_numpy(targets)].sum())

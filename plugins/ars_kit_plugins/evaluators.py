"""The built-in evaluators, as offers."""

# What does the work imports torch, which is slow: an offer's maker imports it when it is chosen.
# ruff: noqa: PLC0415

from __future__ import annotations

from ars_kit.spec import Evaluator, Offer, hookimpl


def perplexity(*, stride: int | None = None, context: int | None = None) -> Evaluator:
    """Held-out loss in nats per token, perplexity, and bits per byte with its 95 % interval.

    Args:
        stride: tokens a sliding window moves on by, over the whole held-out split, each document by
            itself; without it, the run's held-out tokens in windows that do not overlap.
        context: tokens such a window predicts from; without it, those of the training.
    """
    from ars_kit_plugins.judging import Perplexity

    return Perplexity(stride, context)


def bleu(*, prompt: int | None = None, length: int | None = None, passages: int = 64) -> Evaluator:
    """Continuation BLEU and chrF (sacrebleu), the prompt not compared.

    Args:
        prompt: tokens of a held-out passage to start from; without it 32, or half the context.
        length: tokens to continue and to compare; without it 32, or half the context.
        passages: how many at most, evenly spread.
    """
    from ars_kit_plugins.continuation import Bleu

    return Bleu(prompt, length, passages)


def speed(*, prompt: int | None = None, length: int | None = None, repeats: int = 7) -> Evaluator:
    """Prefill and decode tokens per second, and time to the first token, batch 1 and 8.

    Args:
        prompt: tokens to read; without it 32, or half the context.
        length: tokens to decode; without it 32, or half the context.
        repeats: rounds that are counted, after two warm ones.
    """
    from ars_kit_plugins.speed import Speed

    return Speed(prompt, length, repeats)


def generate(*, length: int = 48) -> Evaluator:
    """Greedy continuations of fixed prompts, the same for every member.

    Args:
        length: tokens at most.
    """
    from ars_kit_plugins.continuation import Samples

    return Samples(length)


def lm_eval(
    *, tasks: tuple[str, ...] = (), fewshot: int | None = None, limit: int | None = None
) -> Evaluator:
    """Tasks of EleutherAI's lm-evaluation-harness, an extra: ``ars-kit[lm-eval]``.

    Args:
        tasks: names of the harness's, or YAML files of one's own, with a comma between.
        fewshot: worked examples before each question; without it, as the task says.
        limit: questions of each task at most.
    """
    from ars_kit_plugins.harness import Harness

    return Harness(tasks, fewshot, limit)


@hookimpl
def arskit_evaluators() -> list[Offer[Evaluator]]:
    """Offer the built-in evaluators."""
    return [
        Offer("perplexity", "held-out loss, perplexity, bits per byte", perplexity),
        Offer("bleu", "continuations against the true text, by BLEU and chrF", bleu),
        Offer("speed", "tokens per second, time to the first token", speed),
        Offer("generate", "continuations of fixed prompts, to be read", generate),
        Offer("lm-eval", "tasks of EleutherAI's lm-evaluation-harness", lm_eval),
    ]

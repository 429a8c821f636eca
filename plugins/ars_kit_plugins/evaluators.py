"""The built-in evaluators, as offers."""

from __future__ import annotations

from ars_kit.spec import Evaluator, Offer, hookimpl


def perplexity(*, stride: int | None = None, context: int | None = None) -> Evaluator:
    """Held-out loss in nats per token, perplexity, and bits per byte with its 95 % interval.

    Args:
        stride: tokens a sliding window moves on by, over the whole held-out split, each document by
            itself; without it, the run's held-out tokens in windows that do not overlap.
        context: tokens such a window predicts from; without it, those of the training.
    """
    from ars_kit_plugins.judging import Perplexity  # noqa: PLC0415 -- torch is slow to import

    return Perplexity(stride, context)


@hookimpl
def arskit_evaluators() -> list[Offer[Evaluator]]:
    """Offer the built-in evaluators."""
    return [Offer("perplexity", "held-out loss, perplexity, bits per byte", perplexity)]

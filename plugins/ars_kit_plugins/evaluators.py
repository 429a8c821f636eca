"""The built-in evaluators, as offers."""

from __future__ import annotations

from ars_kit.spec import Evaluator, Offer, hookimpl


def perplexity() -> Evaluator:
    """Held-out loss in nats per token, perplexity and bits per byte."""
    from ars_kit_plugins.judging import Perplexity  # noqa: PLC0415 -- torch is slow to import

    return Perplexity()


@hookimpl
def arskit_evaluators() -> list[Offer[Evaluator]]:
    """Offer the built-in evaluators."""
    return [Offer("perplexity", "held-out loss, perplexity, bits per byte", perplexity)]

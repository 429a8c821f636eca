"""The held-out curve: what a member's loss on unseen text was while it trained, and what it cost.

A fixed sample of the held-out text is judged before the first step, every ``run.heldout_every``
steps, and after the last. Its windows lie evenly over the held-out text, and are the same for every
member and every run of the same text, so two curves may be compared point by point. They are few
and do not overlap: a curve's last point is not the ``heldout_loss`` of the finished member, and is
never compared with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from ars_kit.data import Corpus
    from ars_kit.settings import Settings

TOKENS = 8192
"""Held-out tokens that a point predicts, at most."""


@dataclass(frozen=True, slots=True)
class Curve:
    """When a member is judged while it trains, and on what.

    Attributes:
        every: optimizer steps between two points.
        windows: (n, context + 1) token ids; inputs and targets overlap by all but one.
        batch_size: windows that fit the device at once.
        forward_flops: of one pass over all windows.
    """

    every: int
    windows: npt.NDArray[np.int64]
    batch_size: int
    forward_flops: float

    @classmethod
    def of(cls, settings: Settings, corpus: Corpus, flops: float) -> Curve | None:
        """Return what the settings ask for, or None where they ask for no curve.

        Args:
            settings: the run's.
            corpus: whose held-out text it is.
            flops: of the member's forward pass, per token.
        """
        if settings.run.heldout_every is None:
            return None
        context = settings.data.sequence_length
        windows = sample(corpus, context, settings.data.heldout_tokens)
        return cls(
            every=settings.run.heldout_every,
            windows=windows,
            # Nothing is kept for a backward pass, so twice a micro-batch fits wherever one does.
            batch_size=2 * settings.train.batch_size // settings.train.accumulation,
            forward_flops=flops * windows[:, 1:].size,
        )

    def due(self, done: int, steps: int) -> bool:
        """Whether there is a point after ``done`` of a member's ``steps``."""
        return done % self.every == 0 or done == steps

    def point(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Judge a model; waits for the device. Draws no random number, leaves no trace.

        Returns:
            ``loss`` in nats per token (None where it is not finite), the ``judged_tokens``, and the
            ``judging_seconds`` and ``judging_flops`` that are no part of training.
        """
        began = time.perf_counter()
        was_training = model.training
        model.eval()
        nats = heldout_nats(model, self.windows, self.batch_size, device)
        model.train(was_training)
        tokens = self.windows[:, 1:].size
        loss = nats / tokens
        return {
            "loss": loss if np.isfinite(loss) else None,
            "judged_tokens": tokens,
            "judging_seconds": time.perf_counter() - began,
            "judging_flops": self.forward_flops,
        }


def sample(corpus: Corpus, context: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return whole windows that lie evenly over the held-out text, (n, context + 1) token ids.

    Args:
        corpus: the text.
        context: tokens a window predicts; shortened where the text holds no whole window.
        limit: held-out tokens that count, from the start.
    """
    have = len(corpus.heldout) if limit is None else min(len(corpus.heldout), limit + 1)
    context = min(context, have - 1)
    whole = (have - 1) // context
    count = min(whole, max(1, TOKENS // context))
    begins = context * np.linspace(0, whole - 1, count).round().astype(int)
    return np.stack([corpus.heldout[b : b + context + 1] for b in begins]).astype(np.int64)


def heldout_nats(
    model: nn.Module, windows: npt.NDArray[np.int64], batch_size: int, device: torch.device
) -> float:
    """Return the summed negative log-likelihood of every token but each window's first.

    Args:
        model: in eval mode.
        windows: (n, context + 1) token ids.
        batch_size: windows that fit the device at once.
        device: the model's.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for first in range(0, len(windows), batch_size):
            window = torch.from_numpy(windows[first : first + batch_size]).to(device)
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
            targets = window[:, 1:].flatten()
            total += cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
    return float(total)

"""The arithmetic of the built-in evaluators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ars_kit.spec import Evaluand


class Perplexity:
    """The mean negative log-likelihood of the held-out tokens, each predicted once.

    Windows do not overlap, so a token sees between 0 and ``context`` - 1 tokens before it; the
    figure is therefore a little higher than with a sliding window.
    """

    def __call__(self, member: Evaluand) -> Mapping[str, float | None]:
        """Return ``heldout_loss`` (nats per token), ``perplexity`` and ``bits_per_byte``."""
        device = next(member.model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        tokens = 0
        with torch.inference_mode():
            for batch in _batches(member):
                window = torch.from_numpy(batch).to(device)
                logits = member.model(input_ids=window[:, :-1], use_cache=False).logits
                total += cross_entropy(
                    logits.flatten(0, 1).float(), window[:, 1:].flatten(), reduction="sum"
                )
                tokens += window[:, 1:].numel()
        if not tokens:
            return {"heldout_loss": None, "perplexity": None, "bits_per_byte": None}
        loss = float(total) / tokens
        return {
            "heldout_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else None,
            "bits_per_byte": loss / math.log(2) / member.bytes_per_token,
        }


def _batches(member: Evaluand) -> Iterator[np.ndarray[Any, Any]]:
    """Stack windows of one length; only the last window is shorter."""
    batch: list[Any] = []
    for window in member.heldout:
        if batch and (len(batch) == member.batch_size or len(window) != len(batch[0])):
            yield np.stack(batch)
            batch = []
        batch.append(window)
    if batch:
        yield np.stack(batch)

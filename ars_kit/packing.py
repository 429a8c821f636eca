"""Documents that share a window, kept apart: positions restart, and none attends to another.

transformers sees where a document begins from position ids that restart, and makes the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import masking_utils

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOK = "find_packed_sequence_indices"
"""Where transformers looks for documents among position ids."""
APART = 1e-4
"""Largest change of a logit, against the largest logit, that is no other document's."""


def forward(wrapped: Any, tokens: Tensor, positions: Tensor | None = None, **more: Any) -> Any:
    """Run a model on windows; nothing waits for the device.

    Args:
        wrapped: a causal language model, as accelerate prepared it.
        tokens: token ids, shape (sequences, length).
        positions: of each token in its document, same shape; None: each window is one document.
        more: arguments of the model.
    """
    if positions is not None:
        more["position_ids"] = positions
    with _told(apart=positions is not None):
        return wrapped(input_ids=tokens, use_cache=False, **more)


def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether a document's logits are in a window with another what they are alone.

    Tried on a few tokens: not every architecture looks at position ids, nor does every kernel.
    """
    training, device = model.training, model.device
    tokens = torch.arange(1, 17, device=device).reshape(2, 8)
    tokens %= model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 1, 2, 3, 0, 1, 2]], device=device)
    model.eval()
    try:
        with torch.no_grad():
            packed = forward(model, tokens, positions).logits[:, 5:].float()
            alone = forward(model, tokens[:, 5:]).logits.float()
    except TypeError:  # it takes no position ids
        return False
    finally:
        model.train(training)
    return bool((packed - alone).abs().max() <= APART * alone.abs().max().clamp(min=1.0))


@contextmanager
def _told(*, apart: bool) -> Iterator[None]:
    """Spare transformers the look at the position ids' values, for which it waits for the device.

    Fake tensors have none to look at.
    """
    known = getattr(masking_utils, LOOK, None)
    if known is None:  # a version that looks elsewhere finds the same, and waits
        yield
        return
    setattr(masking_utils, LOOK, _documents if apart else _one_document)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, known)


def _documents(position_ids: Tensor) -> Tensor:
    """Return which document of its window each token is of, from 0, same shape."""
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


def _one_document(_: Tensor) -> None:
    """Say that there is nothing to keep apart."""

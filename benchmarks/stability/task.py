"""What is trained: a Qwen2-like model on bytes, its text, its batches, its learning rate."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config

from ars_kit.host import Host
from ars_kit.models import build
from ars_kit.schema import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bytes = npt.NDArray[np.uint8]

VOCABULARY = 256
LIMIT = 4_000_000
"""Bytes of text that are used at most."""
HELD_OUT = 256
"""Held-out windows that a run is judged on, spread evenly over the held-out text."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model and the length of its run.

    Attributes:
        hidden: width of the gated MLP.
        batch: sequences a step.
        context: bytes a sequence.
        warmup: steps of linear warm-up of the learning rate.
        cosine: decay to a tenth along a cosine afterwards; else constant.
        calm: first step that may be provoked by chance, so that every method's window has filled.
        lr: where an experiment prescribes one; tuned otherwise.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    batch: int
    context: int
    steps: int
    warmup: int = 20
    cosine: bool = True
    calm: int = 64
    lr: float | None = None


SIZES = {
    "tiny": Size(1, 16, 2, 32, 2, 16, steps=12, warmup=2, calm=2),
    "small": Size(2, 64, 4, 160, 8, 64, steps=300),
    "10m": Size(8, 320, 8, 1024, 8, 128, steps=300),
    "published": Size(4, 256, 4, 1024, 8, 64, steps=1000, warmup=0, cosine=False, calm=64, lr=3e-3),
}
"""``published`` is the distribution-shift experiment in its published form (4 layers, 4 heads,
256 wide, learning rate 3e-3, sequences reversed from step 300 of 1000); what was not published,
such as the MLP's width and the batch, is chosen here."""


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes to train on and bytes held out.

    Attributes:
        name: how reports call it.
        digest: of both parts, the beginning of their SHA-256.
    """

    name: str
    train: Bytes
    heldout: Bytes
    digest: str


def file_text(path: Path) -> Text:
    """Read a file; its last tenth is held out.

    Raises:
        OSError: it cannot be read.
    """
    data = path.read_bytes()[:LIMIT]
    cut = len(data) * 9 // 10
    return _text(path.name, data[:cut], data[cut:])


def library_text(half: int) -> Text:
    """Return the standard library's documentation, every tenth document held out.

    Args:
        half: 0 or 1; the documents at even places or those at odd ones, so that what is tuned on
            one half can be reported on the other.
    """
    source = Host.installed().make("data_sources", Choice("stdlib"))
    documents = [d.text.encode() for i, d in enumerate(source.documents()) if i % 2 == half]
    train = b"\n\n".join(d for i, d in enumerate(documents) if i % 10)
    heldout = b"\n\n".join(documents[::10])
    return _text(f"standard library, half {half}", train[:LIMIT], heldout[: LIMIT // 10])


def _text(name: str, train: bytes, heldout: bytes) -> Text:
    digest = hashlib.sha256(train + b"\0" + heldout).hexdigest()[:12]
    return Text(
        name, np.frombuffer(train, dtype=np.uint8), np.frombuffer(heldout, dtype=np.uint8), digest
    )


def make_model(size: Size, seed: int) -> PreTrainedModel:
    """Return a fresh float32 model that depends on its size and the seed alone."""
    model = build(model_config(size), seed=seed)
    model.train()
    return model


def model_config(size: Size) -> Qwen2Config:
    """Return the model's configuration."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(size.context, 256),
        initializer_range=0.5 / math.sqrt(size.width),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def windows(data: Bytes, starts: npt.NDArray[np.int64], context: int) -> Bytes:
    """Return ``context + 1`` bytes from each start, shape (len(starts), context + 1)."""
    found: Bytes = data[starts[:, None] + np.arange(context + 1)]
    return found


def drawn_batch(size: Size, text: Text, seed: int, step: int) -> Bytes:
    """Return a step's batch, shape (batch, context + 1); a pure function of (seed, step)."""
    draw = np.random.default_rng((seed, 0, step))
    starts = draw.integers(0, len(text.train) - size.context, size.batch)
    return windows(text.train, starts, size.context)


def loss_of(model: PreTrainedModel, batch: Bytes) -> Tensor:
    """Return the mean cross-entropy of a batch, 0-d, in nats per byte.

    Args:
        model: the model.
        batch: shape (sequences, context + 1).
    """
    tokens = torch.from_numpy(batch.astype(np.int64)).to(model.device)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def heldout_loss(model: PreTrainedModel, size: Size, text: Text, *, reverse: bool) -> float:
    """Return the mean held-out loss in nats per byte.

    Args:
        model: the model.
        size: its size.
        text: whose held-out part is read.
        reverse: read every sequence backwards.
    """
    places = np.linspace(0, len(text.heldout) - size.context - 1, HELD_OUT).astype(np.int64)
    found = windows(text.heldout, places, size.context)
    if reverse:
        found = found[:, ::-1]
    with torch.no_grad():
        parts = [loss_of(model, part).item() for part in np.split(found, 8)]
    return math.fsum(parts) / len(parts)


def learning_rate(size: Size, peak: float, step: int, *, constant: bool = False) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to a tenth of ``peak``."""
    if step < size.warmup:
        return peak * (step + 1) / size.warmup
    if constant or not size.cosine:
        return peak
    done = (step - size.warmup) / max(1, size.steps - size.warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

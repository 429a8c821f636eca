"""Recipes for a device's memory: what is kept in which precision, and what is computed twice.

- ``full``: everything is kept; on a GPU bf16 arithmetic over fp32 weights and moments.
- ``lean``: activations are computed again in the backward pass (Chen et al., 1604.06174), logits
  stand in chunks, AdamW's moments take 8 bits (Dettmers et al., 2110.02861).
- ``tiny``: the same with weights and gradients in bf16, rounded stochastically by the optimizer,
  which steps each parameter within the backward pass and frees its gradient (Lv et al.,
  2306.09782).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from ars_kit import packing
from ars_kit.errors import ConfigError
from ars_kit.schema import Choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RecipeName = Literal["full", "lean", "tiny"]

CHUNK = 2**25
"""Logits that stand at once where they are chunked; 128 MiB of them in fp32."""
LOW_BIT = "adamw-8bit"
"""What takes the place of ``adamw`` where moments take 8 bits."""
AGREES = 1e-2
"""Relative difference up to which a chunked loss is the model's own, in any precision."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a member is trained within a device's memory.

    Attributes:
        recompute: activations within a layer are computed again in the backward pass.
        chunked: logits never stand whole.
        low_bit: AdamW's moments take 8 bits.
        bf16_weights: weights and gradients are bf16, else fp32.
        in_backward: each parameter is stepped as its gradient arrives, and the gradient freed.
    """

    name: RecipeName
    recompute: bool = False
    chunked: bool = False
    low_bit: bool = False
    bf16_weights: bool = False
    in_backward: bool = False

    def base(self, base: Choice) -> Choice:
        """Return the base optimizer with this recipe's moments; others than AdamW keep theirs.

        Raises:
            ConfigError: it cannot round bf16 weights stochastically.
        """
        if not self.low_bit or base.name.startswith("adamw-"):
            return base
        if base.name == "adamw":
            return Choice(LOW_BIT, base.settings)
        if self.bf16_weights:
            raise ConfigError(
                f"--memory tiny rounds bf16 weights stochastically, which base optimizer "
                f"{base.name!r} cannot; use adamw, adamw-8bit or adamw-4bit, or --memory lean"
            )
        return base


RECIPES: Mapping[RecipeName, Recipe] = {
    "full": Recipe("full"),
    "lean": Recipe("lean", recompute=True, chunked=True, low_bit=True),
    "tiny": Recipe(
        "tiny", recompute=True, chunked=True, low_bit=True, bf16_weights=True, in_backward=True
    ),
}
"""From the most memory to the least."""


def prepare(model: PreTrainedModel, recipe: Recipe) -> None:
    """Bring a model into the form that a recipe trains, in place.

    Raises:
        ConfigError: its architecture cannot compute activations again.
    """
    if recipe.bf16_weights:
        # The parameters alone: rotary frequencies stay fp32, as where transformers loads bf16.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if recipe.recompute:
        # The first is transformers' new name; the second is all that 5.17 has.
        enable = getattr(model, "activation_checkpointing_enable", None)
        try:
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"a {model.config.model_type} cannot compute activations again, which "
                f"--memory {recipe.name} does; use --memory full"
            ) from error


def whole_loss(
    wrapped: Any, window: Tensor, positions: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Return logits, shape (sequences, length, vocabulary), and their mean cross-entropy, 0-d.

    Args:
        wrapped: the model as accelerate prepared it.
        window: token ids, shape (sequences, length + 1).
        positions: of each input token in its document, where documents are kept apart.
    """
    logits = packing.forward(wrapped, window[:, :-1], positions).logits
    return logits, cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


class ChunkedLoss:
    """The same loss, but no logits: the head is applied to a chunk of positions at a time.

    Each chunk's logits are computed again in the backward pass. The loss is made within the
    model's own forward pass, so that whatever wraps it (autocast, data parallelism) sees it.

    Args:
        model: whose head is asked for its weight alone.
        chunk: logits that stand at once.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = CHUNK) -> None:
        self.model, self.chunk = model, chunk
        self.head: Any = model.get_output_embeddings()

    def __call__(
        self, wrapped: Any, window: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return None for the logits, and their mean cross-entropy, 0-d and fp32."""
        with self._at_work():
            tokens, labels = window[:, :-1], window[:, 1:]
            return None, packing.forward(wrapped, tokens, positions, labels=labels).loss

    def agrees(self) -> bool:
        """Whether it is the loss that the model's own logits give.

        What an architecture does behind the head it does here to the hidden states, and that is
        the same only if it is a constant factor: numbers larger than any logit must show no more.
        """
        weight, training = self.head.weight, self.model.training
        probe = torch.arange(9, device=weight.device)[None] % weight.shape[0]
        large = torch.linspace(-1e4, 1e4, 8 * weight.shape[1], device=weight.device)
        large = large.reshape(1, 8, -1).to(weight.dtype)
        self.model.eval()
        with torch.no_grad():
            _, own = whole_loss(self.model, probe)
            _, chunked = self(self.model, probe)
            with self._at_work():
                self.head.forward = lambda _: large
                self.model.loss_function = lambda logits, *_, **__: logits
                seen = self.model(input_ids=probe[:, :-1], labels=probe[:, 1:]).loss
        self.model.train(training)
        if seen.shape != large.shape:
            return False
        factor = seen.flatten()[-1] / large.flatten()[-1]
        same = torch.isclose(seen, factor * large, rtol=AGREES, atol=1.0).all()
        return bool(same & torch.isclose(own, chunked, rtol=AGREES))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Let the head pass hidden states through, to where the loss is made of them."""
        own = vars(self.model).get("_loss_function")
        self.head.forward = nn.Identity().forward
        self.model.loss_function = self._of_hidden
        try:
            yield
        finally:
            del self.head.forward, self.model._loss_function  # noqa: SLF001 -- what the setter set
            if own is not None:
                self.model.loss_function = own

    def _of_hidden(self, logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the mean cross-entropy.

        Args:
            logits: in their place the hidden states, shape (sequences, length, width).
            labels: token ids, shape (sequences, length); each position's own, not shifted.
        """
        hidden, targets = logits.flatten(0, 1), labels.flatten()
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, t in zip(hidden.split(self.rows), targets.split(self.rows), strict=True):
            total = total + self.of_chunk(h, t)
        return total / targets.numel()

    @property
    def rows(self) -> int:
        """Positions of a chunk."""
        return max(1, self.chunk // int(self.head.weight.shape[0]))

    def of_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy of a chunk, 0-d; its logits are computed again.

        Args:
            hidden: shape (positions, width).
            targets: token ids, shape (positions,).
        """
        summed: Tensor = checkpoint(self._part, hidden, targets, use_reentrant=False)
        return summed

    def _part(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = linear(hidden, self.head.weight, self.head.bias)
        return cross_entropy(logits.float(), targets, reduction="sum")

"""The engine that runs a model as transformers has it: every architecture, on any device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from ars_kit.models import load_base
from ars_kit.spec import Service
from ars_kit_serving.engines.context import context_of, keeps_all
from ars_kit_serving.engines.padding import Integers, Logits, PaddedEngine


class EagerEngine(PaddedEngine):
    """A transformers model over one batch of sequences that come and go.

    Where padding on the left is not exact (sliding windows, states other than keys and values,
    positions that the model counts itself), each sequence is computed by itself.
    """

    def __init__(
        self,
        service: Service,
        *,
        device: str = "auto",
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        kinds["auto"] = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = load_base(str(service.path.absolute()), kinds[dtype])
        self.model: PreTrainedModel = model.to(device)
        super().__init__(context_of(self.model.config, service), service.slots)
        takes = inspect.signature(self.model.forward).parameters
        self._batches = keeps_all(self.model.config) and "position_ids" in takes
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._caches: dict[int, Any] = {}  # where nothing is batched

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits:
        """Compute a prompt by itself."""
        if self._batches:
            return super().prefill(slot, tokens)
        self._caches[slot] = DynamicCache(config=self.model.config)
        row: Logits = self._forward(torch.tensor([tokens]), self._caches[slot])[0]
        return row

    def decode(self, tokens: Mapping[int, int]) -> Logits:
        """Take all sequences a token further, in one batch where that is exact."""
        if self._batches:
            return super().decode(tokens)
        rows = [self._forward(torch.tensor([[t]]), self._caches[s]) for s, t in tokens.items()]
        return np.concatenate(rows)

    def run(
        self, tokens: Integers, mask: Integers, positions: Integers, past: list[Any] | None
    ) -> tuple[Logits, list[Any]]:
        """Run the model over a batch."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)) if past else None)
        device = self.model.device
        logits = self._forward(
            torch.from_numpy(tokens),
            cache,
            attention_mask=torch.from_numpy(mask).to(device),
            position_ids=torch.from_numpy(positions).to(device),
        )
        layers: list[Any] = cache.layers
        return logits, [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, cache: Any, **rest: Any) -> Logits:
        made = self.model(
            input_ids=tokens.to(self.model.device),
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
            **rest,
        )
        logits: Logits = made.logits[:, -1].float().cpu().numpy()
        return logits

    def zeros(self, like: Any, shape: tuple[int, ...]) -> Any:
        """Return a tensor of zeros."""
        return like.new_zeros(shape)

    def release(self, slot: int) -> None:
        """Forget a sequence."""
        super().release(slot)
        self._caches.pop(slot, None)

    def close(self) -> None:
        """Drop the model."""
        super().close()
        self._caches.clear()
        del self.model

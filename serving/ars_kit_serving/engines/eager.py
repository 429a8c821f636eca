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
from ars_kit_serving.engines.context import context_of, depends_on_the_longest, keeps_all
from ars_kit_serving.engines.padding import Integers, Logits, PaddedEngine


class EagerEngine(PaddedEngine):
    """A transformers model over one batch of sequences that come and go.

    Where padding on the left is not exact (sliding windows, states other than keys and values,
    positions that the model counts itself or encodes by the longest of a batch), each sequence is
    computed by itself; and anew for each token where the model leaves the cache that it is handed
    empty, for what it keeps in another, or in itself, would be lost or another sequence's.
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
        mamba = "cache_params" in takes and "past_key_values" not in takes
        self._cache = "cache_params" if mamba else "past_key_values"
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._fills = self._fills_caches()
        self._batches = (
            self._fills
            and keeps_all(self.model.config)
            and not depends_on_the_longest(self.model.config)
            and "position_ids" in takes
        )
        self._caches: dict[int, Any] = {}  # where nothing is batched: a cache, or all tokens
        if not self._fills:
            service.say(
                f"{service.name}: {self.model.config.model_type} does not keep a text in the cache "
                "that it is handed, so each token costs as much as all before it"
            )

    def _fills_caches(self) -> bool:
        """Whether what the model keeps of a text is in the cache that it is handed."""
        cache = DynamicCache(config=self.model.config)
        try:
            self._forward(torch.tensor([[0, 0]]), cache)
        except (AttributeError, IndexError, TypeError, ValueError):  # it takes another kind
            return False
        # Every layer: before transformers 5.23 those of RecurrentGemma that keep a state within
        # the model stand in the cache as empty ones of attention.
        return bool(cache.layers) and all(map(_is_filled, cache.layers))

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits:
        """Compute a prompt by itself."""
        if self._batches:
            return super().prefill(slot, tokens)
        new = DynamicCache(config=self.model.config) if self._fills else None
        row: Logits = self._forward(torch.tensor([tokens]), new)[0]
        self._caches[slot] = list(tokens) if new is None else new
        return row

    def decode(self, tokens: Mapping[int, int]) -> Logits:
        """Take all sequences a token further, in one batch where that is exact."""
        if self._batches:
            return super().decode(tokens)
        return np.concatenate([self._further(slot, token) for slot, token in tokens.items()])

    def _further(self, slot: int, token: int) -> Logits:
        """Take a sequence a token further by itself."""
        cached = self._caches[slot]
        if self._fills:
            return self._forward(torch.tensor([[token]]), cached)
        cached.append(token)
        return self._forward(torch.tensor([cached]), None)

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
            use_cache=cache is not None,
            **({} if cache is None else {self._cache: cache}),
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


def _is_filled(layer: Any) -> bool:
    """Whether a cache's layer holds something: keys and values, or states."""
    states = ("is_conv_states_initialized", "is_recurrent_states_initialized")
    held = [done for name in states for done in getattr(layer, name, {}).values()]
    return any([getattr(layer, "is_initialized", False), *held])

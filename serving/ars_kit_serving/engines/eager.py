"""The engine that runs a model as transformers has it: every architecture, on any device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ars_kit.models import load_base
from ars_kit.spec import Service
from ars_kit_serving.engines.context import context_of


class EagerEngine:
    """A transformers model over one batch of sequences that come and go.

    Sequences of different lengths share a batch by padding on the left. Where that is not exact
    (sliding windows, states other than keys and values, positions that the model counts itself)
    each sequence is computed by itself.
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
        self.model = load_base(str(service.path), kinds[dtype]).to(device)  # type: ignore[arg-type]
        self.slots = service.slots
        self.context = context_of(self.model.config, service)
        layers = DynamicCache(config=self.model.config).layers
        plain = all(type(layer) is DynamicLayer for layer in layers)
        counts = "position_ids" in inspect.signature(self.model.forward).parameters
        self._batches = plain and counts
        self._alone: dict[int, Any] = {}  # caches of sequences that are in no batch (yet)
        self._lengths: dict[int, int] = {}
        self._rows: list[int] = []  # the batch's slots, in order
        self._batch: list[tuple[torch.Tensor, torch.Tensor]] = []  # (rows, heads, width, dim) each

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Compute a prompt by itself."""
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(torch.tensor([tokens]), past_key_values=cache)
        self._alone[slot], self._lengths[slot] = cache, len(tokens)
        row: npt.NDArray[np.float32] = logits[0]
        return row

    @torch.inference_mode()
    def decode(self, tokens: Mapping[int, int]) -> npt.NDArray[np.float32]:
        """Take all sequences a token further, in one batch where that is exact."""
        if self._batches:
            logits = self._decode_together(tokens)
        else:
            rows = [
                self._forward(torch.tensor([[token]]), past_key_values=self._alone[slot])
                for slot, token in tokens.items()
            ]
            logits = np.concatenate(rows)
        for slot in tokens:
            self._lengths[slot] += 1
        return logits

    def _decode_together(self, tokens: Mapping[int, int]) -> npt.NDArray[np.float32]:
        if self._alone or self._rows != list(tokens):
            self._regroup(list(tokens))
        lengths = torch.tensor([self._lengths[slot] for slot in tokens])
        width = self._batch[0][0].shape[2] + 1
        mask = torch.arange(width) >= (width - 1 - lengths)[:, None]
        cache = DynamicCache(self._batch)
        logits = self._forward(
            torch.tensor(list(tokens.values()))[:, None],
            past_key_values=cache,
            attention_mask=mask.long(),
            position_ids=lengths[:, None],
        )
        grown: list[Any] = cache.layers
        self._batch = [(layer.keys, layer.values) for layer in grown]
        return logits

    def _regroup(self, slots: list[int]) -> None:
        """Make the batch anew from its old rows and the prompts that came in."""
        width = max(self._lengths[slot] for slot in slots)
        layers = []
        for number in range(len(self._batch) or len(next(iter(self._alone.values())).layers)):
            parts = [self._part(slot, number) for slot in slots]
            pair = []
            for tensors in zip(*parts, strict=True):
                first = tensors[0]
                whole = first.new_zeros((len(slots), first.shape[0], width, first.shape[2]))
                for row, tensor in enumerate(tensors):
                    whole[row, :, width - tensor.shape[1] :] = tensor
                pair.append(whole)
            layers.append((pair[0], pair[1]))
        self._batch, self._rows = layers, slots
        self._alone.clear()

    def _part(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one sequence's keys and values without padding, (heads, length, dim) each."""
        if slot in self._alone:
            found = self._alone[slot].layers[layer]
            return found.keys[0], found.values[0]
        row, length = self._rows.index(slot), self._lengths[slot]
        keys, values = self._batch[layer]
        return keys[row, :, -length:], values[row, :, -length:]

    def _forward(self, tokens: torch.Tensor, **rest: Any) -> npt.NDArray[np.float32]:
        device = self.model.device
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in rest.items()}
        made = self.model(input_ids=tokens.to(device), use_cache=True, **moved)
        logits: npt.NDArray[np.float32] = made.logits[:, -1].float().cpu().numpy()
        return logits

    def release(self, slot: int) -> None:
        """Forget a sequence; the batch closes up when it is next computed."""
        self._alone.pop(slot, None)
        self._lengths.pop(slot, None)
        if not self._lengths:
            self._batch, self._rows = [], []

    def close(self) -> None:
        """Drop the model."""
        self._alone.clear()
        self._batch = []
        del self.model

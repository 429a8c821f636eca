"""One ONNX graph of a decoder with its cache, by torch's own exporter."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ars_kit.errors import ConfigError
from ars_kit.models import load_base
from ars_kit.spec import Engine
from ars_kit_serving.engines.context import require_exportable
from ars_kit_serving.engines.onnx_graph import OnnxEngine

MODEL = "model.onnx"
KINDS = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}

BIG = 1_500_000_000
"""Bytes of weights from which on they lie beside the graph: a protobuf holds 2 GB at most."""


class Flat(nn.Module):
    """A causal language model whose cache goes in and comes out as a list of tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return logits and the grown cache.

        Args:
            input_ids: shape (batch, sequence).
            attention_mask: shape (batch, past + sequence).
            position_ids: shape (batch, sequence).
            past: keys and values of each layer, (batch, heads, past, dim) each.
        """
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        made = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers: list[Any] = made.past_key_values.layers
        return (made.logits, *[t for layer in layers for t in (layer.keys, layer.values)])


class OnnxExporter:
    """Plain ONNX: ``model.onnx``, for ONNX Runtime and whatever else reads it.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and ``past.N.key`` and
    ``past.N.value`` for each layer; outputs ``logits``, ``present.N.key`` and ``present.N.value``.
    Batch, sequence and past may be of any size, and padding on the left is masked.
    """

    def __init__(self, *, precision: Literal["fp32", "fp16"] = "fp32") -> None:
        self.precision = precision
        self.tolerance: float | None = TOLERANCES[precision]

    def export(self, source: Path, target: Path) -> None:
        """Write the graph.

        Raises:
            ConfigError: the model's cache is not keys and values alone, or torch cannot trace it.
        """
        model = load_base(str(source.absolute()), KINDS[self.precision])
        require_exportable(model.config, "onnx")
        past = _sample_cache(model)
        tokens = torch.tensor([[1, 2], [3, 1]])
        mask = torch.ones(2, past[0].shape[2] + 2, dtype=torch.long)
        inputs = (tokens, mask, torch.tensor([[3, 4], [3, 4]]), past)
        shapes = (
            {0: "batch", 1: "sequence"},
            {0: "batch", 1: "total"},
            {0: "batch", 1: "sequence"},
            [{0: "batch", 2: "past"} for _ in past],
        )
        names = [f"{n // 2}.{('key', 'value')[n % 2]}" for n in range(len(past))]
        try:
            with torch.no_grad(), _quiet():
                program: Any = torch.onnx.export(
                    Flat(model),
                    inputs,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    input_names=["input_ids", "attention_mask", "position_ids"]
                    + [f"past.{name}" for name in names],
                    output_names=["logits"] + [f"present.{name}" for name in names],
                    opset_version=20,
                    verbose=False,
                )
        except Exception as error:
            words = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # it colours them
            reason = words.strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"torch cannot export {model.config.model_type} to ONNX: {reason[0]}"
            ) from error
        size = sum(p.nbytes for p in model.parameters())
        program.save(str(target / MODEL), external_data=size > BIG)

    def open(self, target: Path, *, context: int, slots: int, threads: int = 0) -> Engine:
        """Run it in ONNX Runtime."""
        return OnnxEngine(target / MODEL, context=context, slots=slots, threads=threads)


def _sample_cache(model: PreTrainedModel) -> list[Tensor]:
    """Return a cache of two sequences and three tokens."""
    with torch.no_grad():
        made = model(input_ids=torch.tensor([[1, 2, 3], [3, 2, 1]]), use_cache=True)
    layers: list[Any] = made.past_key_values.layers
    return [t for layer in layers for t in (layer.keys, layer.values)]


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's advice to its authors off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

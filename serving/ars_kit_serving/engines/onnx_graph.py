"""The engine for `arskit export --format onnx`: one decoder graph, any architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from ars_kit_serving.engines.padding import Integers, Logits, PaddedEngine
from ars_kit_serving.engines.sessions import CHUNK, kind_of, open_session


class OnnxEngine(PaddedEngine):
    """An exported decoder in ONNX Runtime.

    Args:
        file: ``model.onnx``, as :mod:`ars_kit_serving.decoder` writes it.
        context: tokens a sequence may have.
        slots: sequences at once.
        threads: that one operator may use; 0 for one a core, but one for a small model.

    Raises:
        ConfigError: the runtime cannot run the graph.
    """

    def __init__(self, file: Path, *, context: int, slots: int, threads: int = 0) -> None:
        super().__init__(context, slots)
        self._session = open_session(file, threads)
        self._outputs = [node.name for node in self._session.get_outputs()]
        past = [n for n in self._session.get_inputs() if n.name.startswith("past")]
        self._names = [node.name for node in past]
        self._empty = [np.zeros((1, n.shape[1], 0, n.shape[3]), kind_of(n)) for n in past]

    def run(
        self, tokens: Integers, mask: Integers, positions: Integers, past: list[Any] | None
    ) -> tuple[Logits, list[Any]]:
        """Run the graph, a long prompt piece by piece."""
        cached = past or self._empty
        old = mask.shape[1] - tokens.shape[1]
        for start in range(0, tokens.shape[1], CHUNK):
            end = min(start + CHUNK, tokens.shape[1])
            feed = {
                "input_ids": tokens[:, start:end],
                "attention_mask": mask[:, : old + end],
                "position_ids": positions[:, start:end],
                **dict(zip(self._names, cached, strict=True)),
            }
            values = {name: _value(x) for name, x in feed.items()}
            logits, *cached = self._session.run_with_ort_values(self._outputs, values)
        last: Logits = logits.numpy()[:, -1].astype(np.float32)
        return last, cached

    def zeros(self, like: Any, shape: tuple[int, ...]) -> Any:
        """Return an array of zeros."""
        return np.zeros(shape, like.dtype)

    def array(self, cached: Any) -> Any:
        """Copy a value out of the runtime."""
        return cached if isinstance(cached, np.ndarray) else cached.numpy()

    def close(self) -> None:
        """Drop the session."""
        super().close()
        del self._session


def _value(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))
    return x

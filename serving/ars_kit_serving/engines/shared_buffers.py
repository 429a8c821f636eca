"""The engine for `arskit export --format genai`: grouped-query attention over one buffer.

onnxruntime-genai's builder writes graphs whose attention (ONNX Runtime's GroupQueryAttention) takes
the length of each sequence by itself and adds to the cache in place. Rows of different lengths
then share a batch without any padding, and nothing is copied from step to step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ars_kit.errors import ConfigError
from ars_kit_serving.engines.padding import Logits
from ars_kit_serving.engines.sessions import CHUNK, kind_of, open_session

CONFIG = "genai_config.json"
PAST, PRESENT = "past_key_values.", "present."


class SharedBufferEngine:
    """A genai model in ONNX Runtime.

    Args:
        file: ``model.onnx``, as onnxruntime-genai's builder writes it with ``genai_config.json``.
        context: tokens a sequence may have.
        slots: sequences at once.
        threads: that one operator may use; 0 for one a core, but one for a small model.

    Raises:
        ConfigError: the runtime cannot run the graph, or it is not of that kind.
    """

    def __init__(self, file: Path, *, context: int, slots: int, threads: int = 0) -> None:
        self.context, self.slots = context, slots
        self._session = open_session(file, threads)
        inputs = {node.name: node for node in self._session.get_inputs()}
        past = [node for name, node in inputs.items() if name.startswith(PAST)]
        others = inputs.keys() - {n.name for n in past} - {"input_ids", "attention_mask"}
        if others - {"position_ids"} or not past:
            raise ConfigError(f"the graph wants inputs that are not known here: {sorted(others)}")
        self._positions = "position_ids" in others
        described = json.loads((file.parent / CONFIG).read_text(encoding="utf-8"))
        size = described["model"]["decoder"]["head_size"]
        # Pages of zeros take no memory before they are written to.
        self._buffers = {
            node.name.removeprefix(PAST): np.zeros(
                (slots, node.shape[1], context, size), kind_of(node)
            )
            for node in past
        }
        self._rows: list[int] = []  # the slot of each row in use; they are the first ones
        self._lengths: dict[int, int] = {}
        self._binding: Any = None
        self._bound_rows: slice | None = None

    def prefill(self, slot: int, tokens: Sequence[int]) -> Logits:
        """Compute a prompt in the first free row."""
        row = len(self._rows)
        self._rows.append(slot)
        self._lengths[slot] = len(tokens)
        ids = np.array([tokens], np.int64)
        for start in range(0, len(tokens), CHUNK):
            end = min(start + CHUNK, len(tokens))
            mask = np.ones((1, end), np.int64)
            logits = self._run(slice(row, row + 1), ids[:, start:end], mask, np.arange(start, end))
        first: Logits = logits[0]
        return first

    def decode(self, tokens: Mapping[int, int]) -> Logits:
        """Take all sequences a token further."""
        ids = np.array([[tokens[slot]] for slot in self._rows], np.int64)
        old = np.array([self._lengths[slot] for slot in self._rows])
        mask = (np.arange(old.max() + 1) <= old[:, None]).astype(np.int64)
        logits = self._run(slice(0, len(ids)), ids, mask, old[:, None])
        for slot in self._rows:
            self._lengths[slot] += 1
        places = {slot: row for row, slot in enumerate(self._rows)}
        ordered: Logits = logits[[places[slot] for slot in tokens]]
        return ordered

    def _run(
        self,
        rows: slice,
        ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.int64],
        positions: npt.NDArray[Any],
    ) -> Logits:
        binding = self._bound(rows)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", mask)
        if self._positions:
            spread = np.broadcast_to(positions.astype(np.int64), ids.shape)
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(spread))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[0].numpy()[:, -1].astype(np.float32)
        return logits

    def _bound(self, rows: slice) -> Any:
        """Return a binding of these rows' cache, the last one if it is theirs.

        Naming two buffers a layer costs a small model as much as computing a token.
        """
        if rows != self._bound_rows:
            self._binding, self._bound_rows = self._session.io_binding(), rows
            self._binding.bind_output("logits", "cpu")  # the first of its outputs
            for name, buffer in self._buffers.items():
                part = buffer[rows]
                place = (part.dtype.type, part.shape, part.ctypes.data)
                self._binding.bind_input(PAST + name, "cpu", 0, *place)
                self._binding.bind_output(PRESENT + name, "cpu", 0, *place)
        return self._binding

    def release(self, slot: int) -> None:
        """Forget a sequence; the last row moves into its place."""
        length = self._lengths.pop(slot, None)
        if length is None:
            return
        row, last = self._rows.index(slot), self._rows.pop()
        if last != slot:
            self._rows[row] = last
            used = self._lengths[last]
            for buffer in self._buffers.values():
                buffer[row, :, :used] = buffer[len(self._rows), :, :used]

    def close(self) -> None:
        """Drop the session and the buffers."""
        self._binding = self._bound_rows = None
        del self._session
        self._buffers = {}

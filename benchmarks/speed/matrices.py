"""What an answer's tokens cost where nothing is computed but the products with a model's matrices.

No engine that multiplies the same matrices, in the same precision and by the same library, is
faster: attention, norms, sampling, the cache and the server come on top.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speed.clients import Load

Rows = dict[str, npt.NDArray[np.float32]]


class Matrices:
    """A model's matrices in ONNX Runtime, each multiplied as often as a load needs.

    All clients of a load ask at once: their prompts are multiplied together, but for the last
    matrix, which only the prompts' ends see; then so is each further token of all of them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, threads: int
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        head = model.get_output_embeddings()
        self.tokenizer = tokenizer
        self.widths = {layer.in_features for layer in layers}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        graph = _products([layer.weight.detach().numpy() for layer in layers])
        self.session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.body = [f"y{i}" for i, layer in enumerate(layers) if layer is not head]
        self.head = [f"y{i}" for i, layer in enumerate(layers) if layer is head]

    def measure(self, load: Load) -> dict[str, float | None]:
        """Return tokens a second, and a CPU-second."""
        asked = [load.prompts[n % len(load.prompts)] for n in range(load.requests)]
        lengths = [len(self.tokenizer(text)["input_ids"]) for text in asked]
        groups = [lengths[i : i + load.clients] for i in range(0, len(lengths), load.clients)]
        made = {rows: self._rows(rows) for group in groups for rows in (sum(group), len(group))}
        begun, cpu = time.perf_counter(), time.process_time()
        for group in groups:
            self.session.run(self.body, made[sum(group)])
            self.session.run(self.head, made[len(group)])
            for _ in range(load.tokens - 1):
                self.session.run(self.body + self.head, made[len(group)])
        tokens = load.requests * load.tokens
        return {
            "tokens_per_second": tokens / (time.perf_counter() - begun),
            "tokens_per_cpu_second": tokens / (time.process_time() - cpu),
        }

    def _rows(self, count: int) -> Rows:
        draw = np.random.default_rng(0)
        return {f"x{k}": draw.normal(size=(count, k)).astype(np.float32) for k in self.widths}


def _products(weights: list[Any]) -> ModelProto:
    """Return a graph of one product for each matrix, of the rows of its width."""
    inputs = [
        helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["rows", k])
        for k in sorted({w.shape[1] for w in weights})
    ]
    outputs = [
        helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", w.shape[0]])
        for i, w in enumerate(weights)
    ]
    held = [
        numpy_helper.from_array(np.ascontiguousarray(w.T), f"w{i}") for i, w in enumerate(weights)
    ]
    nodes = [
        helper.make_node("MatMul", [f"x{w.shape[1]}", f"w{i}"], [f"y{i}"])
        for i, w in enumerate(weights)
    ]
    graph = helper.make_graph(nodes, "products", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

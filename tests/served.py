"""What the serving tests share: small diverse checkpoints, and an engine that says its lines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from conftest import make_text
from starlette.testclient import TestClient
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ars_kit.spec import Service
from ars_kit.tokenizer import TrainBPE, make_tokenizer
from ars_kit_serving.app import create_app
from ars_kit_serving.generation import Model
from ars_kit_serving.guard import Rules
from ars_kit_serving.scheduling import Scheduler
from ars_kit_serving.tokenizing import ServedTokenizer

CONTEXT = 96
ASK = {"model": "tiny", "prompt": "the loss", "max_tokens": 8, "temperature": 0}
HELLO = [{"role": "user", "content": "größer"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}


def shape(kind: str, vocabulary: int) -> PretrainedConfig:
    """Return two layers of an architecture."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if kind == "qwen3":
        return Qwen3Config(**common, head_dim=16)
    if kind == "llama":
        return LlamaConfig(**common)
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    return Qwen2Config(**common, tie_word_embeddings=True)


def make_checkpoint(path: Path, kind: str = "qwen2", **changes: Any) -> Path:
    """Write an untrained checkpoint whose weights are far enough apart to say many things.

    Args:
        path: to write.
        kind: of architecture.
        changes: to its configuration.
    """
    made = make_tokenizer(TrainBPE(320), iter(make_text(8)), path)
    config = shape(kind, made.size)
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=draw))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    return path


class Scripted:
    """An engine that answers every prompt with the same tokens, over and over.

    Args:
        lines: the tokens.
        vocabulary: of its logits.
        pause: seconds a step takes.
        slots: sequences at once.
    """

    def __init__(
        self, lines: Sequence[int], vocabulary: int, *, pause: float = 0.0, slots: int = 2
    ) -> None:
        self.context, self.slots, self.pause = 10_000, slots, pause
        self.lines, self.vocabulary = lines, vocabulary
        self.places: dict[int, int] = {}
        self.steps = 0
        self.broken = False
        self.go = threading.Event()
        self.go.set()

    def prefill(self, slot: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        self.go.wait(20)
        self.places[slot] = 0
        return self._say(slot)

    def decode(self, tokens: Mapping[int, int]) -> npt.NDArray[np.float32]:
        self.go.wait(20)
        if self.broken:
            raise RuntimeError("out of lines")
        time.sleep(self.pause)
        self.steps += 1
        return np.stack([self._say(slot) for slot in tokens])

    def _say(self, slot: int) -> npt.NDArray[np.float32]:
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.lines[self.places[slot] % len(self.lines)]] = 50
        self.places[slot] += 1
        return logits

    def release(self, slot: int) -> None:
        self.places.pop(slot, None)

    def close(self) -> None:
        self.places.clear()


def model_of(
    engine: Any, tokenizer: ServedTokenizer, name: str = "tiny", *, queue: int = 8
) -> Model:
    """Return a served model over an engine."""
    return Model(name, tokenizer, Scheduler(engine, queue=queue), tokenizer.size, 1)


def service_of(path: Path, **more: Any) -> Service:
    """Return what an engine of a checkpoint is told."""
    fields = {"context": None, "slots": 3, "say": print, "cache": path.parent / "cache", **more}
    return Service(name="tiny", path=path, digest="0", **fields)


def client_of(model: Model, *, seconds: float = 30, **rules: Any) -> TestClient:
    """Return a client of a server of one model."""
    app = create_app({model.name: model}, rules=Rules(**rules), seconds=seconds)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def form(schema: Any) -> dict[str, Any]:
    """Return a ``response_format``."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def events(text: str) -> list[Any]:
    """Return the chunks of a stream that ended well."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error_of(response: Any, status: int) -> dict[str, Any]:
    """Return the error of an answer in OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found

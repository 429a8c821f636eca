"""Engines over architectures that keep a text in other ways than the family's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PretrainedConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from ars_kit.errors import ConfigError
from ars_kit.spec import Service
from ars_kit_serving.engines.context import require_exportable
from ars_kit_serving.engines.eager import EagerEngine

VOCABULARY = 64
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "eos_token_id": 0}
DEEP: dict[str, Any] = {**SMALL, "num_attention_heads": 2, "intermediate_size": 48}

CONFIGS: dict[str, PretrainedConfig] = {
    "mamba": MambaConfig(**SMALL, num_hidden_layers=2, state_size=8),
    "rwkv": RwkvConfig(**SMALL, num_hidden_layers=2, context_length=128),
    "recurrent_gemma": RecurrentGemmaConfig(
        **DEEP, num_hidden_layers=3, lru_width=32, attention_window_size=16
    ),
    "openai-gpt": OpenAIGPTConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128
    ),
    "phi3": Phi3Config(
        **DEEP,
        num_hidden_layers=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    ),
}


def follow(config: PretrainedConfig, folder: Path) -> None:
    """Take two sequences of different lengths further in turns; each row must be its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn(p.shape) * (p.dim() > 1))
    model.save_pretrained(folder)
    service = Service("tiny", folder, "0", folder / "cache", None, 2, print)
    engine = EagerEngine(service, device="cpu")
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, VOCABULARY, length).tolist() for length in (5, 40)]

    def check(slot: int, row: Any) -> None:
        with torch.no_grad():
            wanted = model(torch.tensor([texts[slot]]), use_cache=False).logits[0, -1].numpy()
        assert np.abs(row - wanted).max() < 1e-3

    for slot, text in enumerate(texts):
        check(slot, engine.prefill(slot, text))
    for _ in range(4):
        tokens = {slot: int(draw.integers(1, VOCABULARY)) for slot in (0, 1)}
        for slot, token in tokens.items():
            texts[slot].append(token)
        for slot, row in enumerate(engine.decode(tokens)):
            check(slot, row)
    engine.close()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_sequence_hears_of_its_own_past_and_of_no_other(kind: str, tmp_path: Path) -> None:
    follow(CONFIGS[kind], tmp_path)


def test_so_it_does_where_one_layer_of_many_leaves_the_cache_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As RecurrentGemma's layers did that kept their states within the model.
    plain = LlamaAttention.forward

    def keeps_nothing(self: Any, *args: Any, past_key_values: Any = None, **rest: Any) -> Any:
        kept = None if self.layer_idx == 0 else past_key_values
        return plain(self, *args, past_key_values=kept, **rest)

    monkeypatch.setattr(LlamaAttention, "forward", keeps_nothing)
    follow(LlamaConfig(**DEEP, num_hidden_layers=2), tmp_path)


def test_positions_that_hang_on_the_longest_text_of_a_batch_are_not_exported() -> None:
    for form in ("onnx", "genai"):
        with pytest.raises(ConfigError, match=f"{form} cannot export phi3: the longest sequence"):
            require_exportable(CONFIGS["phi3"], form)

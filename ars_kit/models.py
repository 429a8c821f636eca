"""A member's configuration from one knob (depth), and its life as a Hugging Face directory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from ars_kit.errors import ConfigError

REFERENCE_EPS = 1e-6
REFERENCE_WIDTH = 32
INTERMEDIATE_RATIO = 3
"""MLP width of an embedded member, as a multiple of its residual width."""


def embedded_config(
    depth: int, *, vocab_size: int, context: int, aspect: float = 1.6, head_dim: int = 8
) -> Qwen2Config:
    """Return the Qwen2 configuration of the embedded member ``d{depth}``.

    ``depth`` layers of width ``head_dim * ceil(aspect * depth / 8)`` (nanochat's one-knob rule at a
    small scale), one KV head for each query head, tied embeddings. RMSNorm's epsilon is inversely
    proportional to the width: a residual stream padded with zeros has a smaller mean square, and
    only with an epsilon scaled alike does a widened child compute what its parent computes.
    """
    width = head_dim * math.ceil(aspect * depth / 8)
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=INTERMEDIATE_RATIO * width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        max_position_embeddings=max(context, 1024),
        rms_norm_eps=REFERENCE_EPS * REFERENCE_WIDTH / width,
        initializer_range=0.5 / math.sqrt(width),
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )


def grown_config(base: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return ``base`` with ``layers`` layers and everything else as it is."""
    tree = base.to_dict()
    kinds = tree.get("layer_types")
    if kinds:
        tree["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    tree["num_hidden_layers"] = layers
    return type(base).from_dict(tree)


def load_base_config(name: str) -> PretrainedConfig:
    """Read the configuration of a pretrained base, a directory or a hub id.

    Raises:
        ConfigError: it cannot be had, or it would run code of its own.
    """
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise ConfigError(f"base {name!r} is no model directory: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub raises a dozen kinds
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load base {name!r}: {why}") from error
    if getattr(config, "auto_map", None):
        raise ConfigError(f"base {name!r} brings code of its own, which is never run")
    return config  # type: ignore[no-any-return]


def load_base(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a pretrained base.

    Raises:
        ConfigError: it cannot be had.
    """
    load_base_config(name)
    try:
        return _from_pretrained(name, dtype)
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load base {name!r}: {why}") from error


def load_member(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a verified member directory in eval mode."""
    return _from_pretrained(str(path), dtype)


def _from_pretrained(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False
    )
    return model.eval()


def build(
    config: PretrainedConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a fresh model whose weights depend on ``config`` and ``seed`` alone.

    The process's own random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by Hugging Face name, detached; a tied head stands once, as embedding."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=True)}


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the model; names and shapes must match exactly.

    Raises:
        ValueError: names are missing or unknown, or a shape differs.
    """
    own = dict(model.named_parameters(remove_duplicate=True))
    if own.keys() != weights.keys():
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
                )
            parameter.copy_(weights[name])


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model without memory, for counting."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def count_parameters(config: PretrainedConfig) -> int:
    """Return the number of parameters, a tied head counted once."""
    return sum(p.numel() for p in meta_model(config).parameters())


def flops_per_token(config: PretrainedConfig, context: int) -> float:
    """Return the FLOPs of forward and backward per trained token (Kaplan et al., 2001.08361).

    6 for each weight that a token is multiplied by (the head is, tied or not; an embedding lookup
    is not), and ``12 * layers * heads * head_dim * context`` for the attention's two products.
    Attention counts the full square, as torch's FlopCounterMode does: a causal kernel does half.
    """
    model = meta_model(config)
    matmul = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 12.0 * config.num_hidden_layers * heads * head_dim * context
    return 6.0 * matmul + attention


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, lr_width: int | None, lr_vectors: float
) -> list[dict[str, Any]]:
    """Return torch parameter groups by role, in a fixed order.

    Hidden matrices train at ``lr * lr_width / width`` (Yang et al., muP, 2203.03466: one rate then
    serves all widths), embeddings and vectors (norms, biases) at ``lr_vectors``; without
    ``lr_width`` all train at ``lr``. Only matrices decay.
    """
    width = model.config.hidden_size  # type: ignore[union-attr]
    scaled = lr_width is not None
    rates = {
        "matrix": lr * (lr_width or width) / width,
        "embedding": lr_vectors if scaled else lr,
        "vector": lr_vectors if scaled else lr,
    }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    if head is not None:
        embeddings.add(id(head.weight))
    found: dict[str, dict[str, Any]] = {
        role: {
            "params": [],
            "names": [],
            "role": role,
            "lr": rate,
            "weight_decay": weight_decay if role == "matrix" else 0.0,
        }
        for role, rate in rates.items()
    }
    for name, p in model.named_parameters(remove_duplicate=True):
        role = "embedding" if id(p) in embeddings else "matrix" if p.ndim == 2 else "vector"
        found[role]["params"].append(p)
        found[role]["names"].append(name)
    return [group for group in found.values() if group["params"]]


def save_member(model: PreTrainedModel, tokenizer_dir: Path, path: Path) -> None:
    """Write a directory that plain transformers loads: one safetensors file, configs, tokenizer."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(path, max_shard_size="1TB")
    for file in sorted(tokenizer_dir.iterdir()):
        if file.is_file() and not (path / file.name).exists():
            shutil.copyfile(file, path / file.name)


def logits_difference(a: PreTrainedModel, b: PreTrainedModel, tokens: Tensor) -> float:
    """Return the largest |logit_a - logit_b| in float32 over ``tokens`` (batch, sequence).

    Only the vocabulary that both share is compared.
    """
    modes = a.training, b.training
    with torch.no_grad():
        la, lb = (m.eval()(input_ids=tokens.to(m.device)).logits.float().cpu() for m in (a, b))
    a.train(modes[0])
    b.train(modes[1])
    shared = min(la.shape[-1], lb.shape[-1])
    return float((la[..., :shared] - lb[..., :shared]).abs().max())


def config_json(config: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration as JSON-ready data."""
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return tree

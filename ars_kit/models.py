"""A member's model: built, loaded, counted, grouped for the optimizer, saved, compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ars_kit.causality import NotCausalError, other_task, require_causal
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.hub import place_of
from ars_kit.spec import like

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
"""What of a tokenizer's directory a member takes along: never a base's weights."""

_HUB_REASONS: dict[type[Exception], str] = {
    HFValidationError: "there is no such directory, and it is no hub id (owner/name)",
    GatedRepoError: "the hub asks for a token with access to it; run `hf auth login`",
    RepositoryNotFoundError: "the hub has no such model, or it is private",
    RevisionNotFoundError: "the model has no such branch, tag or commit on the hub",
    LocalEntryNotFoundError: "it is not in the cache, and the hub cannot be reached or "
    "HF_HUB_OFFLINE is set; name a local directory, or fetch it where there is a network",
    SafetensorError: "a safetensors file is damaged; fetch it again",
}


def load_base_config(name: str) -> PretrainedConfig:
    """Read the configuration of a pretrained base, a directory or a hub id.

    Raises:
        ConfigError: it cannot be had, it is no causal language model, or only code of its own
            could run it.
    """
    # os.path has an answer too for what no file can be called, and for nobody's home.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    slashes = name.partition("@")[0].count("/")
    local = path.is_absolute() or name.startswith((".", "~")) or slashes > 1
    there = os.path.exists(path)  # noqa: PTH110
    if (local or there) and not os.path.isfile(path / "config.json"):  # noqa: PTH113
        what = "is no model directory: it has no config.json" if there else "does not exist"
        raise ConfigError(f"base {name!r} {what}")
    try:
        place, revision = place_of(name)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, revision=revision)
    except Exception as error:  # the hub raises a dozen kinds
        raise ConfigError(f"cannot load base {name!r}: {_reason(error)}") from error
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if other := other_task(config) if known else f"a {config.model_type}":
        raise NotCausalError(f"base {name!r} is no causal language model: it is {other}")
    _forget_remote_code(config)
    return config  # type: ignore[no-any-return]


def load_base(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a pretrained base in eval mode.

    Raises:
        ConfigError: it cannot be had, its weights are damaged or not all there, or it is no causal
            language model: a token's prediction changes with later ones.
    """
    load_base_config(name)
    try:
        place, revision = place_of(name)
        model = _from_pretrained(place, dtype, revision=revision)
    except Exception as error:
        raise ConfigError(f"cannot load base {name!r}: {_reason(error)}") from error
    require_causal(name, model)
    return model


def load_member(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a verified member directory in eval mode.

    Raises:
        IntegrityError: it is not a whole member.
    """
    try:
        return _from_pretrained(str(path), dtype, local_files_only=True)
    except Exception as error:
        raise IntegrityError(f"cannot load member {str(path)!r}: {_reason(error)}") from error


def _from_pretrained(name: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    # Transformers fills what a file lacks with random numbers, and says so in a log only.
    lacking = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if lacking:
        raise ValueError(f"its weights lack {', '.join(lacking[:3])} ({len(lacking)} in all)")
    _forget_remote_code(model.config)
    model.eval()
    return model


def _forget_remote_code(config: PretrainedConfig) -> None:
    """Drop the pointer to a repository's own code: transformers' class is the one that runs."""
    if hasattr(config, "auto_map"):
        del config.auto_map


def _reason(error: BaseException) -> str:
    """Return one line that says why a model cannot be had, and how to mend it."""
    text = str(error)
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if "trust_remote_code" in text:
        return "it needs code of its own, which is never run; use an architecture of transformers"
    if "does not recognize this architecture" in text:
        return "this version of transformers does not know its architecture"
    for kind, line in _HUB_REASONS.items():
        if any(isinstance(c, kind) for c in causes):
            return line
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def build(
    config: PretrainedConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a fresh model whose weights depend on ``config`` and ``seed`` alone.

    The process's own random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every accelerator.
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by Hugging Face name, detached; a tied head stands once, as embedding."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=True)}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return those of the weights that train, by name, detached; all where nothing is frozen."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def set_weights(model: nn.Module, weights: Mapping[str, Tensor], *, trained: bool = False) -> None:
    """Copy ``weights`` into the model; names and shapes must match exactly.

    Args:
        model: what they are for.
        weights: by name.
        trained: they are those that train, the frozen ones stay.

    Raises:
        ValueError: names are missing or unknown, or a shape differs.
    """
    own = {n: p for n, p in model.named_parameters() if p.requires_grad or not trained}
    if own.keys() != weights.keys():
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise ValueError(f"weights do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, parameter in own.items():
        _require_shape(name, like(weights, name), parameter)
    with torch.no_grad():
        for name, parameter in own.items():
            value = weights[name]
            _require_shape(name, value, parameter)
            parameter.copy_(value)


def _require_shape(name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model without memory, for counting."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of :func:`build` with meta weights; its buffers are filled."""
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # each weight was made empty by itself, which tears a tied head off
    return model


def count_parameters(config: PretrainedConfig) -> int:
    """Return the number of parameters, a tied head counted once."""
    return _counts(_Shape(config.to_json_string(use_diff=False), config)).parameters


def flops_per_token(config: PretrainedConfig, context: int) -> float:
    """Return the FLOPs of forward and backward per trained token (Kaplan et al., 2001.08361).

    6 for each weight that a token is multiplied by (the head is, tied or not; an embedding lookup
    is not), and ``12 * layers * heads * head_dim * context`` for the attention's two products,
    with the window in place of the context where a layer's attention slides. Attention counts the
    full square, as the PaLM paper (2204.02311) and torch's FlopCounterMode do: a causal kernel does
    half. A mixture of experts is not counted.
    """
    matmul = _counts(_Shape(config.to_json_string(use_diff=False), config)).multiplied
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or context
    reach = sum(min(window, context) if "sliding" in kind else context for kind in kinds)
    return float(6 * matmul + 12 * heads * head_dim * reach)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A configuration by its content."""

    text: str
    config: PretrainedConfig = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Counts:
    """A model's numbers of weights.

    Attributes:
        multiplied: those that a token is multiplied by.
    """

    parameters: int
    multiplied: int


@lru_cache(maxsize=256)
def _counts(shape: _Shape) -> _Counts:
    """Count a model's weights; a plan asks several times of each member, a run at each birth."""
    model = meta_model(shape.config)
    # The modules, not the parameters: a tied head is a matrix product though it has none.
    matrices = (m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    return _Counts(sum(p.numel() for p in model.parameters()), sum(w.numel() for w in matrices))


def parameter_groups(
    model: PreTrainedModel,
    *,
    lr: float,
    weight_decay: float,
    lr_width: int | None,
    lr_vectors: float,
) -> list[dict[str, Any]]:
    """Return torch parameter groups by role, in a fixed order; what is frozen is in none.

    Hidden matrices train at ``lr * lr_width / width`` (Yang et al., muP, 2203.03466: one rate then
    serves all widths), embeddings and vectors (norms, biases) at ``lr_vectors``; without
    ``lr_width`` all train at ``lr``. Only matrices decay.
    """
    width = model.config.get_text_config().hidden_size
    scaled = lr_width is not None
    rates = {
        "matrix": lr * (lr_width or width) / width,
        "embedding": lr_vectors if scaled else lr,
        "vector": lr_vectors if scaled else lr,
    }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
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
        if not p.requires_grad:
            continue
        role = "embedding" if id(p) in embeddings else "matrix" if p.ndim > 1 else "vector"
        found[role]["params"].append(p)
        found[role]["names"].append(name)
    return [group for group in found.values() if group["params"]]


def save_member(model: PreTrainedModel, tokenizer_dir: Path, path: Path) -> None:
    """Write a directory that plain transformers loads: one safetensors file, configs, tokenizer."""
    generation = model.generation_config
    if generation.pad_token_id is None:  # or transformers warns at every generation
        ends = generation.eos_token_id
        generation.pad_token_id = ends[0] if isinstance(ends, list) else ends
    model.save_pretrained(path, max_shard_size="1TB")
    for pattern in TOKENIZER_FILES:
        for file in sorted(tokenizer_dir.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, path / file.name)


def logits_difference(a: PreTrainedModel, b: PreTrainedModel, tokens: Tensor) -> float:
    """Return the largest |logit_a - logit_b| over ``tokens``, shape (batch, sequence).

    Both in eval mode and in their own precision; only the vocabulary that both share is compared.
    """
    modes = a.training, b.training
    with torch.no_grad():
        la, lb = (
            m.eval()(input_ids=tokens.to(m.device), use_cache=False).logits.double().cpu()
            for m in (a, b)
        )
    a.train(modes[0])
    b.train(modes[1])
    shared = min(la.shape[-1], lb.shape[-1])
    return float((la[..., :shared] - lb[..., :shared]).abs().max())


def config_json(config: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration as JSON-ready data."""
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return tree

"""A member's transformers configuration, from one knob (depth) or from its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from ars_kit.errors import ConfigError

REFERENCE_EPS = 1e-6
REFERENCE_WIDTH = 32
INTERMEDIATE_RATIO = 3
"""MLP width of an embedded member, as a multiple of its residual width."""
ARCHITECTURES: Mapping[str, type[PretrainedConfig]] = {
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
}
"""What an embedded family can be made of."""

WIDEST = 1 << 20
"""Of a size that is given, and of an embedded model: the number of a matrix's entries must fit into
63 bits."""


def embedded_config(
    depth: int,
    *,
    vocab_size: int,
    context: int,
    aspect: float = 1.6,
    head_dim: int = 8,
    architecture: str = "qwen2",
    init: float = 0.5,
    sizes: Mapping[str, int] | None = None,
) -> PretrainedConfig:
    """Return the configuration of the embedded member ``d{depth}``.

    ``depth`` layers of width ``head_dim * ceil(aspect * depth / 8)`` (nanochat's one-knob rule at a
    small scale), one KV head for each query head, tied embeddings. RMSNorm's epsilon is inversely
    proportional to the width: a residual stream padded with zeros has a smaller mean square, and
    only with an epsilon scaled alike does a widened child compute what its parent computes.

    Args:
        depth: its layers.
        vocab_size: of its tokenizer.
        context: tokens it is trained on at once.
        aspect: see above.
        head_dim: dimensions of a head.
        architecture: one of :data:`ARCHITECTURES`.
        init: standard deviation of fresh matrices, times the root of the width.
        sizes: by configuration key, what the rule is not to decide.

    Raises:
        ConfigError: the sizes do not fit each other, or the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"family.architecture {architecture!r} is not one that grows exactly: growth knows the "
            f"pre-norm decoders with RMSNorm, rotary positions and gated MLPs of "
            f"{', '.join(ARCHITECTURES)}"
        )
    given = dict(sizes or {})
    _require_sane(given)
    head = given.get("head_dim", head_dim)
    if not aspect * depth * head_dim / 8 <= WIDEST:  # infinite ones and NaN too
        raise ConfigError(
            f"family.aspect {aspect:g} makes a model of {depth} layers wider than {WIDEST:,}; "
            "make it smaller"
        )
    width = given.get("hidden_size", head_dim * math.ceil(aspect * depth / 8))
    if "num_attention_heads" not in given and width % head:
        raise ConfigError(
            f"hidden_size {width} is no multiple of head_dim {head}; give num_attention_heads"
        )
    heads = given.get("num_attention_heads", width // head)
    tree: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": INTERMEDIATE_RATIO * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max(context, 1024),
        "rms_norm_eps": REFERENCE_EPS * REFERENCE_WIDTH / width,
        "initializer_range": init / math.sqrt(width),
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # No pad token: torch gives the embedding of one no gradient, and here it would be the end
        # of text, which the members read between documents.
        "pad_token_id": None,
        "dtype": "float32",
        **given,
    }
    if head * heads != width or architecture == "qwen3":  # which has a default of its own
        tree["head_dim"] = head
    return _checked(ARCHITECTURES[architecture], tree)


def _require_sane(sizes: Mapping[str, int]) -> None:
    """Refuse sizes that nobody means to ask for.

    Raises:
        ConfigError: one is such.
    """
    for key, size in sizes.items():
        if size > WIDEST:
            raise ConfigError(f"{key} {size} goes beyond {WIDEST:,}; is that a slip?")


def _checked(kind: type[PretrainedConfig], tree: Mapping[str, Any]) -> PretrainedConfig:
    """Make a configuration whose sizes fit each other.

    Raises:
        ConfigError: they do not.
    """
    queries, keys = tree["num_attention_heads"], tree["num_key_value_heads"]
    if queries % keys:
        raise ConfigError(
            f"num_attention_heads {queries} is no multiple of num_key_value_heads {keys}"
        )
    head = tree.get("head_dim") or tree["hidden_size"] // queries
    if head % 2:
        raise ConfigError(f"head_dim must be even for rotary embeddings, not {head}")
    try:
        return kind.from_dict(dict(tree))
    except Exception as error:  # each architecture's validation has its own kind
        reason = " ".join(str(error).split())
        raise ConfigError(f"no {kind.model_type} can have this shape: {reason}") from error


def grown_config(
    base: PretrainedConfig, layers: int, sizes: Mapping[str, int] | None = None
) -> PretrainedConfig:
    """Return ``base`` with ``layers`` layers and everything else as it is.

    Where layers differ in kind (sliding or full attention), the pattern is stretched: each new
    layer is of the kind of the old layer nearest to its relative depth.

    Args:
        base: any causal language model's configuration.
        layers: at least as many as the base has, unless sizes are given.
        sizes: by configuration key, what else is to change. A wider residual stream takes
            RMSNorm's epsilon along, as :func:`embedded_config` says.

    Raises:
        ConfigError: ``layers`` is less than the base has, or sizes do not fit.
    """
    tree = base.to_dict()
    depth = base.num_hidden_layers
    if layers < depth and sizes is None:
        raise ConfigError(f"the base has {depth} layers; a grown member cannot have {layers}")
    kinds = tree.get("layer_types")
    if kinds:
        stretched = [kinds[(2 * j + 1) * depth // (2 * layers)] for j in range(layers)]
        tree["layer_types"] = stretched
        if tree.get("use_sliding_window") and "sliding_attention" in stretched:
            # Readers that know no layer_types go by this.
            tree["max_window_layers"] = stretched.index("sliding_attention")
    tree["num_hidden_layers"] = layers
    others = {k: v for k, v in (sizes or {}).items() if k != "num_hidden_layers"}
    _require_sane(others)
    if not others:
        return type(base).from_dict(tree)
    unknown = [k for k in (*others, "rms_norm_eps") if k not in tree and k != "head_dim"]
    if unknown:
        raise ConfigError(f"a {base.model_type} has no {unknown[0]}, so only its depth can change")
    eps = tree["rms_norm_eps"] * tree["hidden_size"]
    # Heads keep their dimensions unless told otherwise: more of them are new ones.
    head = tree.get("head_dim") or tree["hidden_size"] // tree["num_attention_heads"]
    tree |= {"head_dim": head, **others}
    tree["rms_norm_eps"] = eps / tree["hidden_size"]
    return _checked(type(base), tree)

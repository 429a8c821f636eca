"""What growth must know of Qwen2, Llama and Qwen3: their shapes, their tensors, their limits.

The three families share one pre-norm decoder with rotary positions and a gated MLP. A tensor's
dimensions are named by the *axis* they run along, so that one description of how an axis grows
serves every tensor that has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("qwen2", "llama", "qwen3")
"""``model_type`` of the configurations whose shape may grow."""

AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocabulary", "residual"),
    "lm_head.weight": ("vocabulary", "residual"),
    "model.norm.weight": ("residual",),
    "input_layernorm.weight": ("residual",),
    "post_attention_layernorm.weight": ("residual",),
    "q_proj.weight": ("query", "residual"),
    "q_proj.bias": ("query",),
    "k_proj.weight": ("key", "residual"),
    "k_proj.bias": ("key",),
    "v_proj.weight": ("value", "residual"),
    "v_proj.bias": ("value",),
    "q_norm.weight": ("head",),
    "k_norm.weight": ("head",),
    "o_proj.weight": ("residual", "attention"),
    "o_proj.bias": ("residual",),
    "gate_proj.weight": ("hidden", "residual"),
    "gate_proj.bias": ("hidden",),
    "up_proj.weight": ("hidden", "residual"),
    "up_proj.bias": ("hidden",),
    "down_proj.weight": ("residual", "hidden"),
    "down_proj.bias": ("residual",),
}
"""The axes of each tensor, by the end of its name."""

SILENT = frozenset({"o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"})
"""What a block writes to the residual stream with: zero in a new block, which is then the identity,
and zero wherever an old one was extended."""

PER_FREQUENCY_ROPE = frozenset({"default", "linear", "llama3"})
"""Rotary schemes whose every frequency depends on itself alone, not on head_dim or the context."""

_COSMETIC = frozenset({
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "id2label", "initializer_range", "label2id", "max_position_embeddings", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Configuration keys that change neither a tensor's shape nor what the logits are."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder.

    Attributes:
        residual: width of the residual stream.
        hidden: width of the gated MLP.
        groups: KV heads.
        queries: query heads of each KV head; query head j reads KV head ``j // queries``.
        head: dimensions of a head.
        kinds: attention type of each layer.
    """

    residual: int
    hidden: int
    vocabulary: int
    groups: int
    queries: int
    head: int
    eps: float
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """Read the sizes off a configuration of one of :data:`FAMILIES`."""
        heads = config.num_attention_heads
        kinds = getattr(config, "layer_types", None)
        return cls(
            residual=config.hidden_size,
            hidden=config.intermediate_size,
            vocabulary=config.vocab_size,
            groups=config.num_key_value_heads,
            queries=heads // config.num_key_value_heads,
            head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=config.rms_norm_eps,
            kinds=tuple(kinds or ["full_attention"] * config.num_hidden_layers),
        )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.kinds)


def structure(config: PretrainedConfig) -> dict[str, Any]:
    """Return what of a configuration decides its tensors and their function."""
    return {k: v for k, v in config.to_dict().items() if k not in _COSMETIC}


def same_structure(parent: PretrainedConfig, child: PretrainedConfig) -> bool:
    """Return whether the child's tensors can be the parent's, unchanged."""
    mine, theirs = structure(parent), structure(child)
    rope = getattr(parent, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in PER_FREQUENCY_ROPE:
        mine["context"] = getattr(parent, "max_position_embeddings", None)
        theirs["context"] = getattr(child, "max_position_embeddings", None)
    return mine == theirs


def refusal(parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
    """Return why ``child`` cannot continue ``parent`` exactly, in words, or None if it can."""
    if same_structure(parent, child):
        return None
    kind = parent.model_type
    if child.model_type != kind:
        return f"a {child.model_type} cannot continue a {kind}"
    if kind not in FAMILIES:
        mine, theirs = structure(parent), structure(child)
        changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        return (
            f"growth knows {', '.join(FAMILIES)}; a {kind} can only be continued in its own shape, "
            f"and {', '.join(changed[:4]) or 'the context'} would change"
        )
    for key in _FIXED:
        old, new = getattr(parent, key, None), getattr(child, key, None)
        if old != new:
            return f"{key} changes from {old} to {new}, which no exact growth can do"
    p, c = Shape.of(parent), Shape.of(child)
    return (
        _shrinks(p, c)
        or _heads(kind, p, c, parent)
        or _epsilon(p, c)
        or _context(parent, child)
        or _kinds(p, c)
    )


_FIXED = (
    "vocab_size", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias",
    "rope_parameters", "sliding_window",
)  # fmt: skip


def _shrinks(p: Shape, c: Shape) -> str | None:
    pairs = {
        "num_hidden_layers": (p.layers, c.layers),
        "hidden_size": (p.residual, c.residual),
        "intermediate_size": (p.hidden, c.hidden),
        "num_key_value_heads": (p.groups, c.groups),
        "query heads per KV head": (p.queries, c.queries),
        "head_dim": (p.head, c.head),
    }
    for name, (old, new) in pairs.items():
        if new < old:
            return f"{name} shrinks from {old} to {new}; growth only adds"
    return None


def _heads(kind: str, p: Shape, c: Shape, config: PretrainedConfig) -> str | None:
    if c.head == p.head:
        return None
    if c.head % p.head:
        return f"head_dim grows from {p.head} to {c.head}, which is no multiple of it"
    if kind == "qwen3":
        # Silent new dimensions must be zero in q and k alike, or the norms over the head would
        # see them; then each is the other's gradient, and both stay zero for ever.
        return f"Qwen3's head norms would leave the dimensions beyond head_dim {p.head} untrainable"
    rope = getattr(config, "rope_parameters", None) or {}
    scheme = rope.get("rope_type", "default")
    if scheme not in PER_FREQUENCY_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"head_dim cannot grow exactly under {scheme!r} rotary embeddings"
    return None


def _epsilon(p: Shape, c: Shape) -> str | None:
    exact = p.eps * p.residual / c.residual
    if math.isclose(exact, c.eps, rel_tol=1e-6):
        return None
    return (
        f"a residual stream of {c.residual} instead of {p.residual} needs rms_norm_eps "
        f"{exact:.6g}, not {c.eps:.6g}"
    )


def _context(parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
    scheme = (getattr(parent, "rope_parameters", None) or {}).get("rope_type", "default")
    old, new = parent.max_position_embeddings, child.max_position_embeddings
    if scheme not in PER_FREQUENCY_ROPE and old != new:
        return f"max_position_embeddings changes from {old} to {new} under {scheme!r} positions"
    return None


def _kinds(p: Shape, c: Shape) -> str | None:
    if inherited_layers(p.kinds, c.kinds) is not None:
        return None
    return "the child's layer_types do not contain the parent's in order"


def inherited_layers(parent: Sequence[str], child: Sequence[str]) -> tuple[int | None, ...] | None:
    """Return, for each child layer, the parent layer it continues, or None for a new block.

    New blocks are spread evenly: parent layer i of L goes to the middle of its share of the L'
    child layers, ``ceil((2i + 1) L' / 2L) - 1``. Where layers differ in kind (sliding or full
    attention) each must keep its own, and the assignment in order that strays least is taken.

    Args:
        parent: the kind of each parent layer.
        child: the kind of each child layer.

    Returns:
        None where no assignment in order keeps the kinds.
    """
    n, m = len(parent), len(child)
    ideal = [-(-(2 * i + 1) * m // (2 * n)) - 1 for i in range(n)]
    # best[j]: least total stray, and the places, of the parent layers so far within child[:j].
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] * (m + 1)
    for i in range(n):
        after: list[tuple[int, tuple[int, ...]] | None] = [None] * (m + 1)
        for j in range(m):
            before, so_far = best[j], after[j]
            after[j + 1] = so_far
            if before is not None and parent[i] == child[j]:
                here = (before[0] + abs(j - ideal[i]), (*before[1], j))
                if so_far is None or here[0] < so_far[0]:
                    after[j + 1] = here
        best = after
    found = best[m]
    if found is None:
        return None
    places = {place: i for i, place in enumerate(found[1])}
    return tuple(places.get(j) for j in range(m))

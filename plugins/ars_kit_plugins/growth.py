"""Exact growth of Qwen2, Llama and Qwen3 state dicts, with the provenance of every rectangle.

Three operators compose, and each leaves the function as it was (up to rounding):

* **identity blocks**: a new layer whose output projections are zero adds nothing to the residual
  stream (LLaMA Pro, 2401.02415);
* **zero-padded width**: the residual stream x becomes [x, 0]. RMSNorm then divides by a root mean
  square that is sqrt(h/h') smaller, so gains are multiplied by sqrt(h/h'), and epsilon must be
  ``eps * h/h'`` (LEMON, 2310.07999, for LayerNorm);
* **whole KV groups and MLP columns**: new heads and new hidden units read what they like, and
  write nothing at first: their columns of o_proj and down_proj are zero.

New parameters that may differ from zero are taken from the child's own fresh initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ars_kit.spec import Block

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

FAMILIES = ("qwen2", "llama", "qwen3")
SILENT = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight",
          "mlp.down_proj.bias")  # fmt: skip
"""Parameters of a new block that must be zero for it to be the identity."""

Weights = dict[str, "Tensor"]
Provenance = dict[str, Sequence[Block]]
Span = tuple[int, int, int]


def head_dim(config: PretrainedConfig) -> int:
    """Return the dimensions of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def refusal(parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
    """Return why ``child`` cannot continue ``parent`` exactly, in words, or None if it can."""
    kind = parent.model_type
    same = parent.to_dict() == child.to_dict()
    if same:
        return None
    if kind not in FAMILIES or child.model_type != kind:
        known = ", ".join(FAMILIES)
        return f"growth knows {known}; the parent is {kind}, the child {child.model_type}"
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads"):
        if getattr(child, key) < getattr(parent, key):
            return f"{key} shrinks from {getattr(parent, key)} to {getattr(child, key)}"
    ratio_p = parent.num_attention_heads // parent.num_key_value_heads
    ratio_c = child.num_attention_heads // child.num_key_value_heads
    if ratio_p != ratio_c:
        return f"query heads per KV head change from {ratio_p} to {ratio_c}"
    for key in ("vocab_size", "tie_word_embeddings", "hidden_act"):
        if getattr(parent, key) != getattr(child, key):
            return f"{key} changes from {getattr(parent, key)} to {getattr(child, key)}"
    if head_dim(parent) != head_dim(child):
        return f"head_dim changes from {head_dim(parent)} to {head_dim(child)}"
    scaled = parent.rms_norm_eps * parent.hidden_size / child.hidden_size
    if not math.isclose(scaled, child.rms_norm_eps, rel_tol=1e-6):
        return f"exact widening needs rms_norm_eps {scaled:.3g}, not {child.rms_norm_eps:.3g}"
    if kind == "qwen3" and child.hidden_size != parent.hidden_size:
        # q_norm and k_norm share the one epsilon but keep their width.
        return "Qwen3 cannot widen exactly: its head norms share the epsilon that must change"
    return None


def inherited_layers(parent_layers: int, child_layers: int) -> list[int | None]:
    """Return, for each child layer, the parent layer it continues, or None for a new block.

    New blocks are spread evenly, each behind the layers it divides: parent layer i lands at
    ``floor(i * child / parent)``.
    """
    places: list[int | None] = [None] * child_layers
    for i in range(parent_layers):
        places[i * child_layers // parent_layers] = i
    return places


def grow(
    parent: PretrainedConfig,
    weights: Mapping[str, Tensor],
    child: PretrainedConfig,
    fresh: Mapping[str, Tensor],
) -> tuple[Weights, Provenance]:
    """Return the child's weights and where each came from.

    Args:
        parent: the parent's configuration; :func:`refusal` must be None.
        weights: the parent's tensors by Hugging Face name, a tied head once.
        child: the child's configuration.
        fresh: the child's tensors as freshly initialised.
    """
    layers = inherited_layers(parent.num_hidden_layers, child.num_hidden_layers)
    grown: Weights = {}
    provenance: Provenance = {}
    for name, new in fresh.items():
        source = _parent_name(name, layers)
        if source is None:
            silent = name.endswith(SILENT)
            grown[name] = torch.zeros_like(new) if silent else new.clone()
            provenance[name] = ()
            continue
        grown[name], block = _widen(name, source, weights[source], new, parent, child)
        provenance[name] = (block,)
    return grown, provenance


def _parent_name(name: str, layers: Sequence[int | None]) -> str | None:
    """Return the parent's name of a child tensor, or None where its layer is new."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return name
    number, _, tail = rest.partition(".")
    source = layers[int(number)]
    return None if source is None else f"{head}.layers.{source}.{tail}"


def _widen(
    name: str,
    source: str,
    old: Tensor,
    new: Tensor,
    parent: PretrainedConfig,
    child: PretrainedConfig,
) -> tuple[Tensor, Block]:
    """Place ``old`` in the corner of a tensor shaped like ``new``.

    Rows beyond the old are new outputs, and random; columns beyond the old read what is zero at
    first (a residual dimension, a new head, a new hidden unit). For rows that write to the
    residual stream the padding must stay zero, so those are zero; columns read by a row that the
    parent had are fresh where their input is zero, and zero where it is not.
    """
    out = new.clone().to(old.dtype)
    # Which rows write to the residual stream, and so must leave its new dimensions at zero.
    writes = name.endswith(SILENT) or "embed_tokens" in name
    if old.ndim == 2 and writes:
        out.zero_()
    gain = 1.0
    if old.ndim == 1 and name.endswith("norm.weight") and old.shape[0] == parent.hidden_size:
        if not name.endswith(("q_norm.weight", "k_norm.weight")):
            gain = math.sqrt(parent.hidden_size / child.hidden_size)
    elif old.ndim == 1 and writes:
        out.zero_()
    corner = tuple(slice(0, n) for n in old.shape)
    out[corner] = old * gain if gain != 1.0 else old
    extents: tuple[Span, ...] = tuple((0, n, 1) for n in old.shape)
    return out, Block(source, extents, extents, gain)

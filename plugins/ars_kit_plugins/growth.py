"""Exact growth of Qwen2, Llama and Qwen3 state dicts, with the provenance of every rectangle.

Four operators, which act on different axes and so compose in any order. Each leaves every logit as
it was, for *any* weights of the parent, so gradients with respect to what was inherited are the
parent's too (divided by the coefficient):

* **identity blocks** (LLaMA Pro, 2401.02415): a new layer whose ``o_proj`` and ``down_proj`` are
  zero adds nothing to the residual stream.
* **residual width** h -> h': the stream x becomes [x, 0], because nothing writes to its new units.
  RMSNorm then divides by a root mean square that is sqrt(h/h') as large, so gains are multiplied
  by sqrt(h/h'); epsilon must be ``eps * h/h'``, which the child's configuration states. (The idea
  for LayerNorm: LEMON, 2310.07999.) Qwen3's norms over each head share that epsilon but not the
  padding; a norm of s*q with epsilon s^2*eps is the norm of q, so its q_proj and k_proj are
  multiplied by s = sqrt(h/h').
* **MLP width**: new hidden units read the stream and are read by zero columns of ``down_proj``.
* **heads**: new KV groups, and new query heads *inside* each group (query head j reads KV head
  ``j // ratio``, so appended ones would change the old ones' partner), are read by zero columns of
  ``o_proj``. head_dim D -> rD: rotary pair i has frequency theta^(-2i/D), which in the wider head
  is pair r*i's; scores are divided by sqrt(rD) instead of sqrt(D), so q_proj is multiplied by
  sqrt(r). The other new key dimensions are zero, the query ones are not, so that the keys learn.

A new unit is live: on one side of it stands the fresh initialisation, on the other side zero,
which therefore has a gradient at the first step, and the fresh side at the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from ars_kit.errors import ConfigError
from ars_kit.spec import Block, LazyWeights, Span, like
from ars_kit_plugins.architecture import (
    AXES,
    SILENT,
    Shape,
    inherited_layers,
    refusal,
    same_structure,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

__all__ = ["Growth", "Operator", "Run", "grow", "plan", "residual_width"]

GAINS = ("model.norm.weight", "input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True, slots=True)
class Run:
    """Equally spaced indices of a child's axis that continue those of the parent's."""

    child: Span
    parent: Span


@dataclass(frozen=True, slots=True)
class Operator:
    """One function-preserving change of shape.

    Attributes:
        name: such as ``"residual-width"``.
        change: what it changes, for a reader.
        axes: where the parent's indices land on each axis that it changes.
        coefficients: what inherited entries are multiplied by, by the end of the tensor's name.
        zeroed: child indices of an axis whose *new* entries must be zero, by the end of the
            tensor's name; that axis is the tensor's first.
    """

    name: str
    change: str
    axes: Mapping[str, tuple[Run, ...]] = field(default_factory=dict)
    coefficients: Mapping[str, float] = field(default_factory=dict)
    zeroed: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Growth:
    """The composed operators.

    Attributes:
        operators: in the order of :func:`plan`; empty for a copy.
        layers: for each child layer the parent layer it continues; None for an identity block.
    """

    operators: tuple[Operator, ...]
    layers: tuple[int | None, ...]

    def runs(self, axis: str) -> tuple[Run, ...] | None:
        """Return where the parent's indices of an axis land, or None if they stay as they are."""
        return next((o.axes[axis] for o in self.operators if axis in o.axes), None)

    def coefficient(self, end: str) -> float:
        """Return what a tensor whose name ends so is multiplied by."""
        return math.prod((o.coefficients.get(end, 1.0) for o in self.operators), start=1.0)

    def zeroed(self, end: str) -> tuple[Span, ...]:
        """Return the rows of such a tensor that must be zero where nothing is inherited."""
        return tuple(span for o in self.operators for span in o.zeroed.get(end, ()))

    def source(self, name: str) -> str | None:
        """Return the parent's name of a child's tensor; None where its layer is new."""
        head, found, rest = name.partition(".layers.")
        if not found or not self.layers:
            return name
        number, _, tail = rest.partition(".")
        layer = self.layers[int(number)]
        return None if layer is None else f"{head}.layers.{layer}.{tail}"


def plan(
    parent: PretrainedConfig,
    child: PretrainedConfig,
    layers: tuple[int | None, ...] | None = None,
) -> Growth:
    """Return the operators that lead from ``parent`` to ``child``.

    Args:
        parent: the parent's configuration.
        child: the child's configuration.
        layers: for each child layer the parent layer that it continues; by default each parent
            layer is continued once, and new blocks are spread evenly.

    Raises:
        ConfigError: :func:`refusal` has a reason.
    """
    if same_structure(parent, child):
        return Growth((), ())
    reason = refusal(parent, child)
    if reason:
        raise ConfigError(reason)
    p, c = Shape.of(parent), Shape.of(child)
    layers = layers or inherited_layers(p.kinds, c.kinds)
    assert layers is not None  # noqa: S101 -- refusal has looked
    found = (
        _identity_blocks(p, c),
        residual_width(p, c, head_norms=parent.model_type == "qwen3"),
        _mlp_width(p, c),
        _heads(p, c),
    )
    return Growth(tuple(o for o in found if o is not None), layers)


def grow(
    parent: PretrainedConfig,
    weights: Mapping[str, Tensor],
    child: PretrainedConfig,
    fresh: Mapping[str, Tensor],
    layers: tuple[int | None, ...] | None = None,
) -> tuple[Mapping[str, Tensor], dict[str, Sequence[Block]]]:
    """Return the child's weights, made one at a time when asked for, and where each came from.

    Args:
        parent: the parent's configuration.
        weights: the parent's tensors by Hugging Face name, a tied head once.
        child: the child's configuration.
        fresh: the child's tensors as freshly initialised; they decide shapes, precision, device.
        layers: as :func:`plan` takes them.

    Raises:
        ConfigError: :func:`refusal` has a reason, or the parent's tensors do not fit its
            configuration.
    """
    growth = plan(parent, child, layers)
    provenance: dict[str, Sequence[Block]] = {}
    for name in fresh:
        source = growth.source(name)
        if source is not None and source not in weights:
            raise ConfigError(f"the parent's weights lack {source}, which its configuration needs")
        old = () if source is None else tuple(like(weights, source).shape)
        new = tuple(like(fresh, name).shape)
        provenance[name] = () if source is None else _blocks(growth, name, source, old, new)

    def read(name: str) -> Tensor:
        return _grown(growth, name, provenance[name], weights, fresh)

    return LazyWeights({name: like(fresh, name) for name in fresh}, read), provenance


def _blocks(
    growth: Growth, name: str, source: str, old: tuple[int, ...], new: tuple[int, ...]
) -> tuple[Block, ...]:
    end = _end(name)
    axes = AXES[end] if growth.operators and end else ("",) * len(old)
    landings = []
    for runs, n, m in zip(map(growth.runs, axes), old, new, strict=True):
        if not _fits(runs, n, m):
            raise ConfigError(
                f"{source} of the parent has shape {old}, which does not fit {new} of the child"
            )
        landings.append(runs or (Run((0, n, 1), (0, n, 1)),))
    coefficient = growth.coefficient(end)
    return tuple(
        Block(source, tuple(r.child for r in runs), tuple(r.parent for r in runs), coefficient)
        for runs in product(*landings)
    )


def _grown(
    growth: Growth,
    name: str,
    blocks: Sequence[Block],
    weights: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
) -> Tensor:
    end, model = _end(name), like(fresh, name)
    device = "cpu" if model.is_meta else model.device
    old = weights[blocks[0].parent] if blocks else None
    covered = sum(math.prod(len(range(*span)) for span in b.child_index) for b in blocks)
    if old is not None and covered == model.numel():
        out = model.new_empty(model.shape, device=device)
    elif end in SILENT or end == "embed_tokens.weight":
        out = model.new_zeros(model.shape, device=device)
    else:
        drawn = fresh[name]
        out = drawn if isinstance(fresh, LazyWeights) else drawn.clone()
        for span in growth.zeroed(end) if blocks else ():
            out[slice(*span)] = 0
    for block in blocks:
        assert old is not None  # noqa: S101 -- a block has a parent
        values, coefficient = block.source(old).to(out), block.coefficient
        # Multiplying by one would be exact too, but costs a copy of the whole model.
        out[block.target] = values if coefficient == 1.0 else values * coefficient
    return out


def _end(name: str) -> str:
    return next((e for e in AXES if name.endswith(e)), "")


def _fits(runs: tuple[Run, ...] | None, old: int, new: int) -> bool:
    """Return whether an axis of the parent is taken whole and lands within the child's."""
    if runs is None:
        return old == new
    taken = sum(len(range(*run.parent)) for run in runs)
    return taken == old and max(run.child[1] for run in runs) <= new


def _identity_blocks(p: Shape, c: Shape) -> Operator | None:
    if p.layers == c.layers:
        return None
    return Operator("identity-blocks", f"layers {p.layers} -> {c.layers}")


def residual_width(p: Shape, c: Shape, *, head_norms: bool) -> Operator | None:
    """Return the operator for another width of the residual stream, None where it stays.

    Its coefficients hold for a narrower child too, of which :mod:`ars_kit_plugins.pruning` makes
    use; its axes for a wider one alone.
    """
    if p.residual == c.residual:
        return None
    scale = math.sqrt(p.residual / c.residual)
    scaled: tuple[str, ...] = GAINS
    if head_norms:
        scaled += ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
    span = (0, p.residual, 1)
    return Operator(
        "residual-width",
        f"residual stream {p.residual} -> {c.residual}",
        axes={"residual": (Run(span, span),)},
        coefficients=dict.fromkeys(scaled, scale),
    )


def _mlp_width(p: Shape, c: Shape) -> Operator | None:
    if p.hidden == c.hidden:
        return None
    span = (0, p.hidden, 1)
    change = f"MLP {p.hidden} -> {c.hidden}"
    return Operator("mlp-width", change, axes={"hidden": (Run(span, span),)})


def _heads(p: Shape, c: Shape) -> Operator | None:
    if (p.groups, p.queries, p.head) == (c.groups, c.queries, c.head):
        return None
    ratio = c.head // p.head
    queries = [
        (g * c.queries + q, g * p.queries + q) for g in range(p.groups) for q in range(p.queries)
    ]
    groups = [(g, g) for g in range(p.groups)]
    rotary = {"query": _rotary_runs(queries, p, c), "key": _rotary_runs(groups, p, c)}
    plain = {"attention": _plain_runs(queries, p, c), "value": _plain_runs(groups, p, c)}
    # Inherited heads only: a key head that is new altogether is silenced by o_proj.
    wide = ((0, p.groups * c.head, 1),) if ratio > 1 else ()
    return Operator(
        "heads",
        f"{p.groups}x{p.queries} heads of {p.head} -> {c.groups}x{c.queries} of {c.head}",
        axes={**rotary, **plain},
        coefficients=dict.fromkeys(("q_proj.weight", "q_proj.bias"), math.sqrt(ratio)),
        zeroed={"k_proj.weight": wide, "k_proj.bias": wide},
    )


def _plain_runs(heads: Sequence[tuple[int, int]], p: Shape, c: Shape) -> tuple[Run, ...]:
    """Place each (child, parent) head's dimensions at the beginning of the child's head."""
    runs = [
        Run((new * c.head, new * c.head + p.head, 1), (old * p.head, (old + 1) * p.head, 1))
        for new, old in heads
    ]
    return _merged(runs)


def _rotary_runs(heads: Sequence[tuple[int, int]], p: Shape, c: Shape) -> tuple[Run, ...]:
    """Place each head's rotary pairs (i, i + D/2) where the wider head has their frequency."""
    if p.head == c.head:
        return _plain_runs(heads, p, c)
    ratio, half = c.head // p.head, p.head // 2
    runs = []
    for new, old in heads:
        for side in (0, 1):
            to = new * c.head + side * (c.head // 2)
            at = old * p.head + side * half
            runs.append(Run((to, to + ratio * half, ratio), (at, at + half, 1)))
    return tuple(runs)


def _merged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Join runs that follow each other on both sides."""
    joined = [runs[0]]
    for run in runs[1:]:
        last = joined[-1]
        if last.child[1] == run.child[0] and last.parent[1] == run.parent[0]:
            run = Run((last.child[0], run.child[1], 1), (last.parent[0], run.parent[1], 1))  # noqa: PLW2901 -- the run grows
            joined[-1] = run
        else:
            joined.append(run)
    return tuple(joined)

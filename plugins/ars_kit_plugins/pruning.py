"""The family from the top down: the largest first, each smaller one cut out of it and taught by it.

Minitron (Muralidharan et al., 2407.14679), the rival of growth. What is cut is what contributes
least on training text: a block by how little it turns the residual stream, 1 - cos(in, out); a
head, an MLP unit, a channel by the root mean square of what it adds to what reads it. A unit that
exact growth has just added contributes nothing, so pruning is the inverse of growth: a parent that
was grown and not trained is cut back to what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ars_kit.errors import ConfigError
from ars_kit.spec import Birth, Block, Descent, LazyWeights, Parent, Picks, Seed, like
from ars_kit_plugins.architecture import AXES, Shape, refusal, same_structure
from ars_kit_plugins.distillation import taught_loss
from ars_kit_plugins.growth import residual_width
from ars_kit_plugins.lineages import Heir, OptState

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(slots=True)
class Importance:
    """How much each part of a model contributes, as means over the tokens it was shown.

    Attributes:
        layers: shape (layers,); 1 - cos(in, out) of the residual stream.
        channels: shape (width,); squares of the norms' outputs, which are what blocks read.
        heads: for each layer, shape (query heads,): squares of what each adds to the stream.
        units: for each layer, shape (MLP width,): likewise.
    """

    layers: list[Tensor] = field(default_factory=list)
    channels: Tensor | None = None
    heads: list[Tensor] = field(default_factory=list)
    units: list[Tensor] = field(default_factory=list)


def measure(model: Any, windows: Tensor) -> Importance:
    """Show a model text and note what contributes.

    Args:
        model: runnable, in eval mode; a Qwen2, Llama or Qwen3.
        windows: token ids, int64, shape (n, length).
    """
    import torch  # noqa: PLC0415 -- slow to import

    found = Importance()
    with torch.no_grad(), _watched(model, found):
        model(input_ids=windows.to(model.device), use_cache=False)
    return found


@contextmanager
def _watched(model: Any, found: Importance) -> Iterator[None]:
    inner, head = model.model, Shape.of(model.config).head

    def block(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        before = inputs[0].float()
        after = (output[0] if isinstance(output, tuple) else output).float()
        size = (before.square().sum(-1) * after.square().sum(-1)).sqrt().clamp(min=1e-30)
        found.layers.append((1 - (before * after).sum(-1) / size).mean())

    def norm(_: Any, __: Any, output: Tensor) -> None:
        seen = output.float().square().flatten(0, 1).mean(0)
        found.channels = seen if found.channels is None else found.channels + seen

    def attention(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().flatten(0, 1).unflatten(1, (-1, head))  # (tokens, heads, head_dim)
        weight = module.weight.float().unflatten(1, (-1, head))  # (width, heads, head_dim)
        found.heads.append(
            x.new_tensor(
                [
                    float((x[:, h] @ weight[:, h].T).square().sum(1).mean())
                    for h in range(x.shape[1])
                ]
            )
        )

    def mlp(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].float().square().flatten(0, 1).mean(0)
        found.units.append(seen * module.weight.float().square().sum(0))

    handles = [inner.norm.register_forward_hook(norm)]
    for layer in inner.layers:
        handles += [
            layer.register_forward_hook(block),
            layer.self_attn.o_proj.register_forward_pre_hook(attention),
            layer.mlp.down_proj.register_forward_pre_hook(mlp),
            *(getattr(layer, name).register_forward_hook(norm) for name in NORMS),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a parent stays.

    Attributes:
        layers: the parent's layers that stay, in order.
        channels: of the residual stream.
        heads: for each of those layers, the query heads.
        groups: for each of those layers, the KV heads.
        units: for each of those layers, of the MLP.
    """

    layers: tuple[int, ...]
    channels: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]


def cut(importance: Importance, p: Shape, c: Shape) -> Cut:
    """Return what contributes most and fits the child.

    Args:
        importance: of the parent's parts.
        p: the parent's shape.
        c: the child's, contained in it.
    """
    assert importance.channels is not None  # noqa: S101 -- every model has a norm
    layers = keep_layers([float(x) for x in importance.layers], p.kinds, c.kinds)
    heads, groups = [], []
    for layer in layers:
        by_group = importance.heads[layer].unflatten(0, (p.groups, p.queries))
        groups.append(_largest(by_group.sum(1), c.groups))
        inside = [_largest(by_group[g], c.queries) for g in groups[-1]]
        pairs = zip(groups[-1], inside, strict=True)
        heads.append(tuple(g * p.queries + q for g, queries in pairs for q in queries))
    return Cut(
        layers=layers,
        channels=_largest(importance.channels, c.residual),
        heads=tuple(heads),
        groups=tuple(groups),
        units=tuple(_largest(importance.units[layer], c.hidden) for layer in layers),
    )


def keep_layers(
    influence: Sequence[float], parent: Sequence[str], child: Sequence[str]
) -> tuple[int, ...]:
    """Return the parent layers of greatest influence whose kinds, in order, are the child's.

    Args:
        influence: of each parent layer.
        parent: the kind of each parent layer.
        child: the kind of each child layer; a subsequence of the parent's.
    """
    # best[j]: greatest influence of j layers kept so far, and which they are.
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * len(child)]
    for i, kind in enumerate(parent):
        for j in range(len(child), 0, -1):
            before = best[j - 1]
            if before is None or kind != child[j - 1]:
                continue
            here = (before[0] + influence[i], (*before[1], i))
            so_far = best[j]
            if so_far is None or here[0] > so_far[0]:
                best[j] = here
    found = best[len(child)]
    assert found is not None  # noqa: S101 -- supports has looked
    return found[1]


def _largest(values: Tensor, count: int) -> tuple[int, ...]:
    """Return the places of the largest values in order; of equals, the first."""
    ranked = sorted(range(len(values)), key=values.tolist().__getitem__, reverse=True)
    return tuple(sorted(ranked[:count]))


def prune(
    parent: PretrainedConfig,
    weights: Mapping[str, Tensor],
    child: PretrainedConfig,
    fresh: Mapping[str, Tensor],
    kept: Cut,
) -> tuple[Mapping[str, Tensor], dict[str, Sequence[Block]]]:
    """Return the child's weights, made one at a time when asked for, and where each came from.

    A narrower residual stream has another root mean square; gains are multiplied as for growth.

    Args:
        parent: the parent's configuration.
        weights: the parent's tensors by Hugging Face name, a tied head once.
        child: the child's configuration.
        fresh: the child's tensors as freshly initialised; they decide precision and device.
        kept: what of the parent stays.
    """
    p, c = Shape.of(parent), Shape.of(child)
    narrower = residual_width(p, c, head_norms=parent.model_type == "qwen3")
    factors = narrower.coefficients if narrower else {}
    provenance: dict[str, Sequence[Block]] = {}
    for name in fresh:
        source, layer = _source(name, kept)
        end = next(e for e in AXES if name.endswith(e))
        old, new = like(weights, source).shape, like(fresh, name).shape
        places = [_places(axis, layer, kept, p, n) for axis, n in zip(AXES[end], old, strict=True)]
        whole = tuple((0, n, 1) for n in new)
        provenance[name] = (Block(source, whole, tuple(places), factors.get(end, 1.0)),)

    def read(name: str) -> Tensor:
        (block,) = provenance[name]
        model = like(fresh, name)
        device = "cpu" if model.is_meta else model.device
        return block.source(weights[block.parent]).to(device, model.dtype) * block.coefficient

    return LazyWeights({name: like(fresh, name) for name in fresh}, read), provenance


def _source(name: str, kept: Cut) -> tuple[str, int]:
    """Return the parent's name of a child's tensor, and which of the kept layers it lies in."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return name, 0
    number, _, tail = rest.partition(".")
    return f"{head}.layers.{kept.layers[int(number)]}.{tail}", int(number)


def _places(axis: str, layer: int, kept: Cut, p: Shape, size: int) -> Picks | tuple[int, int, int]:
    """Return which of the parent's indices of an axis stay."""
    at: Sequence[int] = range(size)
    if axis == "residual":
        at = kept.channels
    elif axis == "hidden":
        at = kept.units[layer]
    elif axis in {"query", "attention"}:
        at = [h * p.head + d for h in kept.heads[layer] for d in range(p.head)]
    elif axis in {"key", "value"}:
        at = [g * p.head + d for g in kept.groups[layer] for d in range(p.head)]
    return (0, size, 1) if len(at) == size else Picks(tuple(at))


class Prune:
    """The largest member first; each smaller one is cut out of the next larger, and taught by it.

    What contributes least on training text goes. The loss is the cross-entropy plus ``weight``
    times the divergence from the parent, whose passes are counted in ``loss_flops``; the measuring
    is counted in ``setup_flops``.

    Args:
        weight: of the divergence, against 1 for the cross-entropy.
        temperature: by which both distributions are softened.
        sequences: windows of training text that contributions are measured on.
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
    """

    inherits = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
        sequences: int = 16,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
    ) -> None:
        self.heir = Heir(opt_state=opt_state, rewarm_steps=rewarm_steps, last_decay_fraction=None)
        self.loss = taught_loss(weight, temperature)
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, not {sequences}")
        self.sequences = sequences

    def descents(self, configs: Sequence[PretrainedConfig]) -> Sequence[Descent]:
        """Return the members from the last to the first, each the pupil of the one after it."""
        last = len(configs) - 1
        return [
            Descent(i, i + 1 if i < last else None, taught=i < last) for i in range(last, -1, -1)
        ]

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why the child cannot be cut out of the parent, or None if it can."""
        reason = refusal(child, parent)
        if reason:
            return f"pruning is growth backwards, and from the smaller one {reason}"
        if same_structure(parent, child) or Shape.of(parent).head == Shape.of(child).head:
            return None
        return (
            f"pruning keeps head_dim, which changes from {Shape.of(parent).head} to "
            f"{Shape.of(child).head}"
        )

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return what of the parent contributes most."""
        if same_structure(parent.config, birth.config):
            copy = self.heir.continued(parent, birth, "copied, and taught by its predecessor")
            return replace(copy, loss=self.loss)
        if birth.windows is None or parent.model is None:
            raise ConfigError("prune measures on training text what to cut; use it in arskit run")
        windows = birth.windows(self.sequences)
        importance = measure(parent.model(), windows[:, :-1])
        kept = cut(importance, Shape.of(parent.config), Shape.of(birth.config))
        weights, provenance = prune(parent.config, parent.weights, birth.config, birth.fresh, kept)
        return Seed(
            weights=weights,
            provenance=provenance,
            preserves="none",
            opt_state=self.heir.opt_state,
            rewarm_steps=self.heir.rewarm_steps,
            loss=self.loss,
            note="cut out of the next larger one, and taught by it",
        )

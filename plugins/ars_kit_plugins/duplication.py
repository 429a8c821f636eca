"""Deeper children whose new blocks are copies of old ones: rivals of exact growth, not exact.

Width, where it changes too, is padded exactly as in :mod:`ars_kit_plugins.growth`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ars_kit.errors import ConfigError
from ars_kit.spec import Birth, LazyWeights, Parent, Seed, like
from ars_kit_plugins.architecture import SILENT, Shape, inherited_layers, refusal
from ars_kit_plugins.lineages import COOLING, Heir, OptState, continuation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

Kinds = Sequence[str]
Layers = tuple[int | None, ...]


class Copies(Heir, ABC):
    """What strategies that repeat blocks have in common."""

    how: ClassVar[str]

    @abstractmethod
    def places(self, parent: Kinds, child: Kinds) -> Layers:
        """Return the parent layer that each child layer copies, from the kinds of both's layers."""

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why the child's layers cannot be the parent's, or None if they can."""
        reason = refusal(parent, child)
        if reason or not _deeper(parent, child):
            return reason
        p, c = Shape.of(parent).kinds, Shape.of(child).kinds
        for j, source in enumerate(self.places(p, c)):
            if source is not None and p[source] != c[j]:
                return f"layer {j} has {c[j]}, but the layer that it would copy has {p[source]}"
        return None

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, its blocks repeated where the child is deeper."""
        reason = self.supports(parent.config, birth.config)
        if reason:
            raise ConfigError(reason)
        if not _deeper(parent.config, birth.config):
            return self.continued(parent, birth, "grown cooled lineage")
        kinds = Shape.of(parent.config).kinds, Shape.of(birth.config).kinds
        return continuation(
            parent,
            birth,
            opt_state=self.opt_state,
            rewarm_steps=self.rewarm_steps,
            decay_fraction=self.decay_fraction(birth),
            note=f"grown cooled lineage, {self.how}",
            layers=self.places(*kinds),
            preserves="none",
        )


class Stack(Copies):
    """The parent's blocks stacked upon themselves: child layer j is parent layer j mod L.

    G_stack (Du et al., 2405.15319) grows by a whole factor; where the child's depth is none, the
    last repetition is cut short.

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    how = "blocks stacked"

    def places(self, parent: Kinds, child: Kinds) -> Layers:
        """Return the parent's layers from first to last, again and again."""
        return tuple(j % len(parent) for j in range(len(child)))


class Duplicate(Copies):
    """New blocks, where identity blocks would stand, are copies of the block before them.

    The first ones, with none before, copy the block after. Where a block and its copies are to
    write a ``share`` of what the block wrote, say 0.5, the child begins near its parent: a residual
    network is read as steps of a differential equation, and each step is taken in two halves
    (Chang et al., 1710.10348).

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
        share: what a copied block and its copies add to the residual stream is multiplied by.
    """

    how = "neighbours copied"

    def __init__(
        self,
        *,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
        last_decay_fraction: float | None = COOLING,
        share: float = 1.0,
    ) -> None:
        super().__init__(
            opt_state=opt_state,
            rewarm_steps=rewarm_steps,
            last_decay_fraction=last_decay_fraction,
        )
        if not 0 < share <= 1:
            raise ValueError(f"share must be greater than 0 and at most 1, not {share}")
        self.share = share

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, its blocks and their copies at their share."""
        seed = super().inherit(parent, birth)
        if self.share == 1.0 or not _deeper(parent.config, birth.config):
            return seed
        return _shared(seed, self._copied(parent, birth), self.share)

    def _copied(self, parent: Parent, birth: Birth) -> frozenset[str]:
        """Return the names of what copied blocks and their copies write with."""
        places = self.places(Shape.of(parent.config).kinds, Shape.of(birth.config).kinds)
        often = Counter(places)
        heads = {f".layers.{j}." for j, place in enumerate(places) if often[place] > 1}
        return frozenset(
            name
            for name in birth.fresh
            if name.endswith(tuple(SILENT)) and any(head in name for head in heads)
        )

    def places(self, parent: Kinds, child: Kinds) -> Layers:
        """Return each old layer at its place, and each new one as its neighbour."""
        places = inherited_layers(parent, child) or ()
        last = next((place for place in places if place is not None), None)
        found: list[int | None] = []
        for place in places:
            last = last if place is None else place
            found.append(last)
        return tuple(found)


def _shared(seed: Seed, names: frozenset[str], share: float) -> Seed:
    """Return a seed whose tensors of these names are multiplied by ``share``."""
    whole = seed.weights

    def read(name: str) -> Tensor:
        return whole[name] * share if name in names else whole[name]

    provenance = {
        name: [replace(b, coefficient=b.coefficient * share) for b in blocks]
        if name in names
        else blocks
        for name, blocks in seed.provenance.items()
    }
    weights = LazyWeights({name: like(whole, name) for name in whole}, read)
    return replace(seed, weights=weights, provenance=provenance)


def _deeper(parent: PretrainedConfig, child: PretrainedConfig) -> bool:
    return bool(parent.num_hidden_layers != child.num_hidden_layers)

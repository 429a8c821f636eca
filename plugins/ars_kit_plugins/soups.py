"""Averages of finished members of one shape (Wortsman et al., 2203.05482)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ars_kit.errors import ConfigError
from ars_kit.spec import Birth, Blend, Descent, LazyWeights, Parent, Seed, like
from ars_kit_plugins.architecture import same_structure
from ars_kit_plugins.lineages import Heir, lineage_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

NAME = "soup"


class Soup(Heir):
    """A chain as in ``progressive``, and at its end one more member: the cooled ones' average.

    Averaged, weight by weight and in float32, are the members that have the last one's shape and
    follow each other up to it. A family that has not two of them is refused.

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    makes = (NAME,)

    def descents(self, configs: Sequence[PretrainedConfig]) -> Sequence[Descent]:
        """Return a chain, if at least two members at its end have one shape."""
        if _alike(configs) < 2:
            raise ConfigError(
                "a soup averages members of one shape, and no two at the end of this family have "
                "one; use --base with --depth same, or a members file"
            )
        return [Descent(i, i - 1 if i else None) for i in range(len(configs))]

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, grown to the child's shape."""
        return self.continued(parent, birth, lineage_of(parent, birth))

    def finish(self, members: Sequence[Parent]) -> Iterable[Blend]:
        """Return the average of the last members of one shape."""
        mixed = members[-_alike([m.config for m in members]) :]
        last = mixed[-1]
        names = tuple(m.name for m in mixed)

        def read(name: str) -> Tensor:
            model = like(last.weights, name)
            total = sum(m.weights[name].float() for m in mixed[1:]) + mixed[0].weights[name].float()
            return (total / len(mixed)).to(model.dtype)

        weights = LazyWeights({name: like(last.weights, name) for name in last.weights}, read)
        return [Blend(NAME, last.config, weights, names, f"average of {', '.join(names)}")]


def _alike(configs: Sequence[PretrainedConfig]) -> int:
    """Return how many members at the end have the last one's shape."""
    count = 0
    for config in reversed(configs):
        if not same_structure(config, configs[-1]):
            break
        count += 1
    return count

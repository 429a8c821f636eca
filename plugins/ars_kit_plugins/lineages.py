"""Strategies that continue a parent exactly, and differ in which parent that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ars_kit.spec import Birth, Descent, Hint, Parent, Preserves, Seed
from ars_kit_plugins.architecture import refusal, same_structure
from ars_kit_plugins.growth import grow

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OptState = Literal["derive", "reset"]

COOLING = 1.0
"""Share of its steps in which the last of a chain cools: it trains for few, and nothing is born of
it that would have to be warm. What it is worth was measured: docs/inheritance.md."""


def continuation(
    parent: Parent,
    birth: Birth,
    *,
    opt_state: OptState,
    rewarm_steps: int,
    decay_fraction: float | None,
    note: str,
    layers: tuple[int | None, ...] | None = None,
    preserves: Preserves = "exact",
) -> Seed:
    """Return the parent, grown to the child's shape."""
    weights, provenance = grow(parent.config, parent.weights, birth.config, birth.fresh, layers)
    return Seed(
        weights=weights,
        provenance=provenance,
        preserves=preserves,
        opt_state=opt_state,
        rewarm_steps=rewarm_steps,
        decay_fraction=decay_fraction,
        note=note,
    )


class Heir:
    """What strategies that continue a parent have in common.

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    inherits = True

    def __init__(
        self,
        *,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
        last_decay_fraction: float | None = COOLING,
    ) -> None:
        if rewarm_steps < 0:
            raise ValueError(f"rewarm_steps must not be negative, not {rewarm_steps}")
        if last_decay_fraction is not None and not 0 <= last_decay_fraction <= 1:
            raise ValueError(f"last_decay_fraction must lie in [0, 1], not {last_decay_fraction}")
        self.opt_state: OptState = opt_state
        self.rewarm_steps = rewarm_steps
        self.last_decay_fraction = last_decay_fraction

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why the child's shape cannot continue the parent's, or None if it can."""
        return refusal(parent, child)

    def decay_fraction(self, birth: Birth) -> float | None:
        """Return the share of the child's steps in which ``wsd`` decays; None for the run's."""
        return None if birth.heirs else self.last_decay_fraction

    def continued(self, parent: Parent, birth: Birth, note: str) -> Seed:
        """Return the parent, grown to the child's shape."""
        return continuation(
            parent,
            birth,
            opt_state=self.opt_state,
            rewarm_steps=self.rewarm_steps,
            decay_fraction=self.decay_fraction(birth),
            note=note,
        )


class Progressive(Heir):
    """Each child begins as an exact continuation of its parent's cooled weights.

    Same shape: a copy, so the family is a chain of fine-tunes. Deeper or wider: identity blocks
    spread evenly and zero-padded width (:mod:`ars_kit_plugins.growth`), which leave every logit as
    it was. The optimizer's moments follow the weights they belong to.

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
        new_lr: multiplies the learning rate of tensors that are new altogether.
        new_decay_from: optimizer steps before the weight decay of such tensors begins.
    """

    def __init__(
        self,
        *,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
        last_decay_fraction: float | None = COOLING,
        new_lr: float = 1.0,
        new_decay_from: int = 0,
    ) -> None:
        super().__init__(
            opt_state=opt_state,
            rewarm_steps=rewarm_steps,
            last_decay_fraction=last_decay_fraction,
        )
        if not 0 < new_lr < math.inf:
            raise ValueError(f"new_lr must be greater than 0 and finite, not {new_lr}")
        if new_decay_from < 0:
            raise ValueError(f"new_decay_from must not be negative, not {new_decay_from}")
        self.new = Hint(lr=new_lr, decay_from=new_decay_from)

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, grown to the child's shape."""
        seed = self.continued(parent, birth, lineage_of(parent, birth))
        new = [name for name, blocks in seed.provenance.items() if not blocks]
        return replace(seed, hints=dict.fromkeys(new, self.new) if self.new != Hint() else {})


def lineage_of(parent: Parent, birth: Birth) -> str:
    """Say which of the two a chain is at this birth."""
    if same_structure(parent.config, birth.config):
        return "chain of fine-tunes"
    return "grown cooled lineage"


class Scratch:
    """Every member alone, from its own fresh weights: the control.

    Where a pretrained base was named, every member starts from that base instead.
    """

    inherits = False

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why the child cannot start from the base, or None if it can."""
        return refusal(parent, child)

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the base, grown to the child's shape."""
        weights, provenance = grow(parent.config, parent.weights, birth.config, birth.fresh)
        note = "each from the base"
        return Seed(weights=weights, provenance=provenance, preserves="exact", note=note)


class Jump(Heir):
    """Each member is one exact growth from the family's *first*, whatever lies between them.

    The first member is trained once; every other one inherits its cooled weights, not its
    predecessor's. So a member's lineage holds two trainings, its own and the first's, and the
    members are siblings: none depends on how those between turned out. With two members, such as
    ``--members d10,d18``, it is the single late jump (2511.04981).

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    def descents(self, configs: Sequence[PretrainedConfig]) -> Sequence[Descent]:
        """Return every member but the first as an heir of the first."""
        return [Descent(i, 0 if i else None) for i in range(len(configs))]

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the first member, grown to the child's shape."""
        return self.continued(parent, birth, "one growth from the first member")


class Trunk(Heir):
    """A trunk whose learning rate never falls grows from member to member; each member is a branch.

    Each child continues its parent as it was before the learning rate fell (the stable phase of
    ``wsd``), with its moments and at its learning rate. The parent's last ``train.decay_fraction``
    of steps cools a branch, which is judged and kept as the member and from which nothing descends
    (WSD: 2404.06395).

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
    """

    def __init__(self, *, opt_state: OptState = "derive", rewarm_steps: int = 0) -> None:
        # Its members are cooled branches: how long they cool is the run's to say.
        super().__init__(opt_state=opt_state, rewarm_steps=rewarm_steps, last_decay_fraction=None)

    def descents(self, configs: Sequence[PretrainedConfig]) -> Sequence[Descent]:
        """Return a chain through the stable phases."""
        chain = range(1, len(configs))
        return [Descent(0, None), *(Descent(i, i - 1, phase="stable") for i in chain)]

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the trunk, grown to the child's shape."""
        note = "grown trunk" if parent.phase == "stable" else "trunk from the base"
        return self.continued(parent, birth, note)

"""The built-in inheritance strategies, as offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ars_kit.spec import Birth, InheritanceStrategy, Offer, Parent, Seed, hookimpl
from ars_kit_plugins.architecture import refusal
from ars_kit_plugins.growth import grow

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Progressive:
    """Each child begins as an exact continuation of its parent's cooled weights.

    Same shape: a copy, so the family is a chain of fine-tunes. Deeper or wider: identity blocks
    spread evenly and zero-padded width (:mod:`ars_kit_plugins.growth`), which leave every logit as
    it was. The optimizer's moments follow the weights they belong to.

    Args:
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
    """

    inherits = True

    def __init__(
        self, *, opt_state: Literal["derive", "reset"] = "derive", rewarm_steps: int = 10
    ) -> None:
        if rewarm_steps < 0:
            raise ValueError(f"rewarm_steps must not be negative, not {rewarm_steps}")
        self.opt_state: Literal["derive", "reset"] = opt_state
        self.rewarm_steps = rewarm_steps

    def supports(self, parent: PretrainedConfig, child: PretrainedConfig) -> str | None:
        """Return why the child's shape cannot continue the parent's, or None if it can."""
        return refusal(parent, child)

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, grown to the child's shape."""
        weights, provenance = grow(parent.config, parent.weights, birth.config, birth.fresh)
        return Seed(
            weights=weights,
            provenance=provenance,
            preserves="exact",
            opt_state=self.opt_state,
            rewarm_steps=self.rewarm_steps,
        )


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
        return Seed(weights=weights, provenance=provenance, preserves="exact")


@hookimpl
def arskit_strategies() -> list[Offer[InheritanceStrategy]]:
    """Offer the built-in strategies."""
    return [
        Offer("progressive", "each member continues its predecessor exactly, grown", Progressive),
        Offer("scratch", "each member alone from fresh weights: the control", Scratch),
    ]

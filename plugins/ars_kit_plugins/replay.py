"""Reading again what a lineage read before its text changed (Robins 1995; Rolnick, 1811.11682)."""

from __future__ import annotations

from dataclasses import replace

from ars_kit.spec import Birth, Parent, Seed
from ars_kit_plugins.lineages import COOLING, Heir, OptState


class Replay(Heir):
    """Each child continues its parent exactly, and goes on reading the texts of its ancestors.

    For a family whose members read different texts (``data`` in a file of shapes): a share of each
    batch comes from those that the lineage has read and the member itself does not, in turns, from
    their beginning and no further than they were read. It takes the place of new text, so a step
    costs what it costs otherwise. Where all members read one text it is ``progressive``.

    Args:
        share: of the sequences, that are read again.
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    def __init__(
        self,
        *,
        share: float = 0.125,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
        last_decay_fraction: float | None = COOLING,
    ) -> None:
        super().__init__(
            opt_state=opt_state,
            rewarm_steps=rewarm_steps,
            last_decay_fraction=last_decay_fraction,
        )
        if not 0 < share < 1:
            raise ValueError(f"share must lie in (0, 1), not {share}")
        self.share = share

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, grown to the child's shape, and the share to replay."""
        grown = self.continued(parent, birth, "grown, reading on in the texts of its ancestors")
        return replace(grown, replay=self.share)

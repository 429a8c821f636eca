"""Learning from a parent's logits beside the text's next tokens (Hinton et al., 1503.02531)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ars_kit.spec import Birth, Descent, Lesson, Parent, Seed
from ars_kit_plugins.lineages import COOLING, Heir, OptState

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class TaughtLoss:
    """``CE + weight * T^2 * KL(teacher || student)``, both softened by the temperature T.

    T squared keeps the second term's gradient of one size whatever the temperature, as Hinton et
    al. have it. The divergence is a mean over tokens, in nats.
    """

    weight: float
    temperature: float

    def __call__(self, lesson: Lesson) -> Tensor:
        """Return the objective; the cross-entropy alone where nobody teaches."""
        if lesson.teacher is None:
            return lesson.loss
        teacher = (lesson.teacher.float() / self.temperature).log_softmax(-1)
        student = (lesson.logits.float() / self.temperature).log_softmax(-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
        return lesson.loss + self.weight * self.temperature**2 * divergence


def taught_loss(weight: float, temperature: float) -> TaughtLoss:
    """Return the loss for settings that make sense.

    Raises:
        ValueError: they make none.
    """
    for name, value in (("weight", weight), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0 and finite, not {value}")
    return TaughtLoss(weight, temperature)


class Distill(Heir):
    """Each child continues its parent exactly, and goes on learning from the parent's logits.

    The loss is the cross-entropy plus ``weight`` times the divergence from the parent. The parent
    stays in memory; its forward passes are counted in the child's ``loss_flops``.

    Args:
        weight: of the divergence, against 1 for the cross-entropy.
        temperature: by which both distributions are softened.
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
        last_decay_fraction: float | None = COOLING,
    ) -> None:
        super().__init__(
            opt_state=opt_state,
            rewarm_steps=rewarm_steps,
            last_decay_fraction=last_decay_fraction,
        )
        self.loss = taught_loss(weight, temperature)

    def descents(self, configs: Sequence[PretrainedConfig]) -> Sequence[Descent]:
        """Return a chain in which each parent stays to teach; a base teaches the first."""
        return [Descent(i, i - 1 if i else None, taught=True) for i in range(len(configs))]

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, grown to the child's shape, with the loss that has it teach."""
        grown = self.continued(parent, birth, "grown, and taught by its predecessor")
        return replace(grown, loss=self.loss)

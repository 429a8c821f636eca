r"""Holding on to what a parent learned: a penalty on how far inherited weights move.

.. math:: \Phi(W, \Delta W) = \tfrac12 \sum_i \Omega_i \Delta W_i^2
          + \gamma \operatorname{Tr}((I - P_s) \Delta W^2)

* :math:`\Delta W` is a weight's distance from what it was at birth, on inherited slices alone.
* :math:`\Omega` is the diagonal of the parent's Fisher information per token (Kirkpatrick et al.,
  1612.00796), times ``strength``. Labels are drawn from the parent's own predictions, so that it is
  the Fisher information and not the squared gradient of the data's loss. The scores of a window's
  tokens are then uncorrelated, so a window of T tokens with mean score g contributes
  :math:`T g^2`.
* :math:`P_s = U_s U_s^T` projects onto the leading left singular vectors of an inherited matrix, as
  many as hold ``energy`` of its squared singular values. :math:`\Delta W^2` is read as
  :math:`\Delta W \Delta W^T`, which is square for every matrix; the term is then
  :math:`\lVert (I - P_s) \Delta W \rVert_F^2`, what of the change leaves the space that the parent
  writes to. It is taken over the projections of attention and MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ars_kit.errors import ConfigError
from ars_kit.spec import Birth, Block, Lesson, Parent, Seed
from ars_kit_plugins.lineages import COOLING, Heir, OptState

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROJECTION = "_proj.weight"


def fisher_information(model: Any, windows: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information per token, by parameter name, on the CPU.

    Args:
        model: runnable; its gradients are spent.
        windows: int64, shape (n, length + 1).
        rng: draws the labels, on the CPU.
    """
    import torch  # noqa: PLC0415 -- slow to import

    parameters = dict(model.named_parameters())
    found = {name: torch.zeros_like(p, device="cpu") for name, p in parameters.items()}
    for window in windows[:, :-1]:
        model.zero_grad()
        inputs = window[None].to(model.device)
        scores = model(input_ids=inputs, use_cache=False).logits[0].float().log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp().cpu(), 1, generator=rng)
        scores.gather(1, labels.to(scores.device)).mean().backward()
        for name, p in parameters.items():
            if p.grad is not None:
                found[name] += p.grad.detach().square().cpu() * (len(window) / len(windows))
    model.zero_grad()
    return found


@dataclass(slots=True)
class Anchor:
    """What of one child tensor was inherited, and how dear it is.

    Attributes:
        inherited: 1 where it was, else 0.
        value: at birth; 0 where nothing was inherited.
        dear: Omega, in the child's coordinates; 0 where nothing was inherited.
        basis: U_s, columns of the space that stays free; None for what is no projection.
    """

    inherited: Tensor
    value: Tensor
    dear: Tensor
    basis: Tensor | None

    def to(self, device: torch.device) -> Anchor:
        """Return it on another device."""
        return Anchor(
            self.inherited.to(device),
            self.value.to(device),
            self.dear.to(device),
            None if self.basis is None else self.basis.to(device),
        )


def anchor(
    weight: Tensor, blocks: Sequence[Block], fisher: Mapping[str, Tensor], *, energy: float | None
) -> Anchor:
    """Return the anchor of one child tensor.

    A weight that is c times its parent's has 1/c of the parent's gradient, so its Fisher
    information is the parent's over c squared.

    Args:
        weight: at birth.
        blocks: what of it was inherited.
        fisher: of the parent, by the parent's names.
        energy: as above; None for no basis.
    """
    inherited, dear = weight.new_zeros(weight.shape), weight.new_zeros(weight.shape)
    for block in blocks:
        inherited[block.target] = 1.0
        dear[block.target] = block.source(fisher[block.parent]) / block.coefficient**2
    value = weight * inherited
    return Anchor(inherited, value, dear, None if energy is None else leading(value, energy))


def leading(matrix: Tensor, energy: float) -> Tensor:
    """Return the left singular vectors that hold a share of the squared singular values.

    Args:
        matrix: shape (m, n).
        energy: the share, in (0, 1].

    Returns:
        Shape (m, s), orthonormal columns, the fewest that hold the share.
    """
    import torch  # noqa: PLC0415 -- slow to import

    left, values, _ = torch.linalg.svd(matrix.float(), full_matrices=False)
    squares = values.square()
    # Of a matrix of zeros no direction holds anything.
    count = int((squares.cumsum(0) < (energy - 1e-6) * squares.sum()).sum()) + bool(squares.any())
    basis: Tensor = left[:, :count].to(matrix.dtype).contiguous()
    return basis


@dataclass(slots=True)
class Consolidation:
    """The cross-entropy plus the penalty."""

    anchors: dict[str, Anchor]
    strength: float
    gamma: float

    def __call__(self, lesson: Lesson) -> Tensor:
        """Return the objective."""
        return lesson.loss + self.penalty(lesson.weights)

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of both terms, 0-d.

        Args:
            weights: the child's live parameters.
        """
        total: Any = 0.0
        for name, held in self.anchors.items():
            live = weights[name]
            if held.value.device != live.device:
                held = self.anchors[name] = held.to(live.device)  # noqa: PLW2901 -- moved once
            change = live * held.inherited - held.value
            if self.strength:
                total = total + 0.5 * self.strength * (held.dear * change.square()).sum()
            if self.gamma and held.basis is not None:
                within = held.basis.T @ change
                total = total + self.gamma * (change.square().sum() - within.square().sum())
        return total if hasattr(total, "backward") else next(iter(weights.values())).new_zeros(())


class Ewc(Heir):
    """Each child continues its parent exactly, and is held near what it inherited (EWC).

    The penalty is half the sum of Omega times the squared change, plus gamma times the squared part
    of the change that leaves the parent's leading left singular space. Omega is measured at birth
    and counted in ``setup_flops``. Meant for a family whose text changes; where it does not, to
    hold on only hinders.

    Args:
        strength: multiplies the Fisher information; 1 weighs an old token like a new one.
        gamma: weight of the second term.
        energy: share of the squared singular values that spans the protected space.
        sequences: windows of training text that the Fisher information is measured on.
        opt_state: derive carries the parent's optimizer moments over; reset starts them at zero.
        rewarm_steps: optimizer steps in which the learning rate climbs back after birth.
        last_decay_fraction: share of the steps in which ``wsd`` decays of an heir that has no heirs
            itself; 1 lets its rate fall from birth on, none is the run's share.
    """

    def __init__(
        self,
        *,
        strength: float = 1.0,
        gamma: float = 1e-3,
        energy: float = 0.9,
        sequences: int = 64,
        opt_state: OptState = "derive",
        rewarm_steps: int = 10,
        last_decay_fraction: float | None = COOLING,
    ) -> None:
        super().__init__(
            opt_state=opt_state,
            rewarm_steps=rewarm_steps,
            last_decay_fraction=last_decay_fraction,
        )
        if not (0 <= strength < math.inf and 0 <= gamma < math.inf):
            raise ValueError(
                f"strength and gamma must be 0 or more, and finite, not {strength}, {gamma}"
            )
        if not 0 < energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], not {energy}")
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, not {sequences}")
        self.strength, self.gamma, self.energy = strength, gamma, energy
        self.sequences = sequences

    def inherit(self, parent: Parent, birth: Birth) -> Seed:
        """Return the parent, grown to the child's shape, with the loss that holds it there."""
        if birth.windows is None or parent.model is None:
            raise ConfigError("ewc measures on training text what is dear; use it in arskit run")
        seed = self.continued(parent, birth, "grown, and held near its predecessor")
        fisher = fisher_information(parent.model(), birth.windows(self.sequences), birth.rng)
        anchors = {
            name: anchor(
                seed.weights[name],
                blocks,
                fisher,
                energy=self.energy if name.endswith(PROJECTION) and self.gamma else None,
            )
            for name, blocks in seed.provenance.items()
            if blocks
        }
        return replace(seed, loss=Consolidation(anchors, self.strength, self.gamma))

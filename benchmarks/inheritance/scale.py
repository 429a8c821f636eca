"""The families that are compared: their shapes, and the budget that each member is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ars_kit.models import count_parameters, flops_per_token
from ars_kit.roster import Member
from ars_kit.shapes import embedded_config

VOCABULARY = 257
"""Bytes and an end of text: no tokenizer to train, and a small text lasts longest."""


@dataclass(frozen=True)
class Scale:
    """A family from small to large, and how well it is fed.

    Attributes:
        shapes: (layers, width) of each member.
        ratio: tokens that a member of the scratch arm trains on, for each of its parameters.
        seeds: how many are reported on, from 1 on.
        kappas: family budgets that are tried, as multiples of what the largest member alone costs.
        rates: peak learning rates that are tried, at width 32.
        inits: scales of fresh weights that are tried.
        vocabulary: of the byte-level BPE.
        arms: that run where none are named; empty for all.
    """

    shapes: tuple[tuple[int, int], ...]
    ratio: float
    head_dim: int
    batch: int
    context: int
    seeds: int
    kappas: tuple[float, ...]
    rates: tuple[float, ...] = (6e-3, 12e-3, 24e-3)
    inits: tuple[float, ...] = (0.5,)
    vocabulary: int = VOCABULARY
    arms: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """The members, named by their order where two are equally deep."""
        return tuple(
            Member(f"m{i + 1}-{layers}x{width}", layers, width)
            for i, (layers, width) in enumerate(self.shapes)
        )

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """Of each member."""
        return tuple(count_parameters(c) for c in self._configs)

    @cached_property
    def per_token(self) -> tuple[float, ...]:
        """FLOPs of a trained token, forward and backward, of each member."""
        return tuple(flops_per_token(c, self.context) for c in self._configs)

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """FLOPs of each member trained from scratch, in whole steps."""
        return tuple(
            f * self.whole(self.ratio * n)
            for f, n in zip(self.per_token, self.parameters, strict=True)
        )

    @property
    def ceiling(self) -> float:
        """What is saved at most where the whole family costs what its largest member costs."""
        return 1 - self.costs[-1] / sum(self.costs)

    def whole(self, tokens: float) -> int:
        """Return ``tokens`` in whole steps, at least ten."""
        step = self.batch * self.context
        return max(10, round(tokens / step)) * step

    @cached_property
    def _configs(self) -> Sequence[object]:
        return [
            embedded_config(
                layers,
                vocab_size=self.vocabulary,
                context=self.context,
                head_dim=self.head_dim,
                sizes={"hidden_size": width},
            )
            for layers, width in self.shapes
        ]


_SMALL = ((2, 24), (3, 24), (3, 32), (4, 32), (4, 40), (5, 40), (6, 40))

SCALES = {
    "tiny": Scale(
        shapes=((1, 8), (2, 8), (2, 16)),
        ratio=0.3,
        head_dim=8,
        batch=2,
        context=16,
        seeds=2,
        kappas=(0.8, 1.2),
        rates=(12e-3,),
    ),
    "quick": Scale(
        shapes=((2, 16), (2, 24), (3, 24), (3, 32)),
        ratio=25,
        head_dim=8,
        batch=16,
        context=128,
        seeds=2,
        kappas=(0.8, 1.05),
        rates=(12e-3,),
        inits=(0.7,),
        arms=("scratch", "lineage", "no-growth", "even-duplicate"),
    ),
    "full": Scale(
        shapes=_SMALL,
        ratio=15,
        head_dim=8,
        batch=16,
        context=128,
        seeds=3,
        kappas=(0.8, 1.0, 1.25),
        inits=(0.35, 0.7),
    ),
    "gpu": Scale(
        shapes=tuple((d, 64 * d) for d in range(6, 13)),
        ratio=2,
        head_dim=64,
        batch=64,
        context=1024,
        seeds=3,
        kappas=(0.8, 1.0, 1.25),
        rates=(6e-3, 12e-3),
        vocabulary=8192,
    ),
}
"""``full``: parameters grow by 1.2 to 1.7 from one member to the next, as from d10 to d18 under
nanochat's rule of one knob (width 64 x d), and 6.4-fold in all; ``gpu`` follows that rule.
``quick``: members so small and so well fed that within minutes the largest beats the smallest."""

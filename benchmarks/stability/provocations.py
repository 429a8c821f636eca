"""What is done to a run: each a pure function of (seed, step), the same for every method.

Their sizes are round numbers, but for the full batch's learning rate: on a tuning seed ten times
the tuned rate was the lowest of 1, 2, 4 and 10 times at which AdamW settled neither with clip nor
without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from stability.task import Bytes

_SALTS = {"corrupt": 1, "burst": 2, "spike": 3, "nonfinite": 4, "cipher": 5}
"""Keep the draws of different provocations apart, and all of them apart from the data's order."""

BURST_EVERY, BURST_LENGTH = 50, 6
SPIKE_SIZE = 100.0


@dataclass(frozen=True, slots=True)
class Moment:
    """A step of a run.

    Attributes:
        calm: first step that may be provoked by chance.
    """

    seed: int
    step: int
    steps: int
    calm: int

    def draw(self, what: str) -> np.random.Generator:
        """Return this step's generator for one kind of provocation."""
        return np.random.default_rng((self.seed, _SALTS[what], self.step))


@dataclass(frozen=True, slots=True)
class Provocation:
    """One way of making training harder.

    Attributes:
        alter: the step's batch, shape (batch, context + 1), to the one that is trained on.
        ruins: whether the step's batch holds nothing to learn; what an oracle would be told.
        strike: changes the gradients in place, after the backward pass and before the method.
        lr: multiplies the base learning rate.
        reverse: judged on held-out sequences read backwards.
        full_batch: every step reads the batch of step 0 at a constant rate, and the run is judged
            by its mean training loss over the last sixth of its steps.
    """

    name: str
    summary: str
    alter: Callable[[Moment, Bytes], Bytes] | None = None
    ruins: Callable[[Moment], bool] | None = None
    strike: Callable[[Moment, Sequence[Tensor]], None] | None = None
    lr: float = 1.0
    reverse: bool = False
    full_batch: bool = False


def corrupted(moment: Moment, *, share: float) -> bool:
    """Return whether this step is one of a share drawn by chance."""
    return moment.step >= moment.calm and moment.draw("corrupt").random() < share


def corrupt(moment: Moment, batch: Bytes, *, share: float) -> Bytes:
    """Replace a share of the batches by uniformly random bytes."""
    if not corrupted(moment, share=share):
        return batch
    draw = moment.draw("corrupt")
    draw.random()  # what corrupted() has drawn
    return draw.integers(0, 256, batch.shape, dtype=np.uint8)


def in_burst(moment: Moment) -> bool:
    """Return whether this step is one of six in a row, once in every fifty."""
    begin = moment.step - moment.step % BURST_EVERY
    offset = replace(moment, step=begin).draw("burst").integers(0, BURST_EVERY - BURST_LENGTH)
    within = offset <= moment.step - begin < offset + BURST_LENGTH
    return bool(within) and moment.step >= moment.calm


def burst(moment: Moment, batch: Bytes) -> Bytes:
    """Replace six batches in a row, once in every fifty steps, by uniformly random bytes."""
    if not in_burst(moment):
        return batch
    return moment.draw("corrupt").integers(0, 256, batch.shape, dtype=np.uint8)


def reverse(moment: Moment, batch: Bytes, *, at: float) -> Bytes:
    """Read every sequence backwards from the given share of the run on."""
    return batch[:, ::-1] if moment.step >= at * moment.steps else batch


def cycle(moment: Moment, batch: Bytes, *, period: int) -> Bytes:
    """Read two sources in turn, half a period each: the text, and the text in a cipher.

    The cipher permutes the lower-case letters; it is drawn from the seed.
    """
    if moment.step % period < period // 2:
        return batch
    table = np.arange(256, dtype=np.uint8)
    letters = table[97:123].copy()
    table[97:123] = replace(moment, step=0).draw("cipher").permutation(letters)
    return table[batch]


def spike(moment: Moment, gradients: Sequence[Tensor], *, share: float) -> None:
    """Add to every gradient normal noise of a hundred times its norm, at a share of the steps."""
    draw = moment.draw("spike")
    if moment.step < moment.calm or draw.random() >= share:
        return
    source = torch.Generator().manual_seed(int(draw.integers(2**62)))
    for gradient in gradients:
        noise = torch.randn(gradient.shape, generator=source).to(gradient.device)
        gradient.add_(noise * (SPIKE_SIZE * gradient.norm() / noise.norm()))


def nonfinite(moment: Moment, gradients: Sequence[Tensor], *, share: float) -> None:
    """Make one element of one gradient NaN or infinite, at a share of the steps."""
    draw = moment.draw("nonfinite")
    if moment.step < moment.calm or draw.random() >= share:
        return
    gradient = gradients[int(draw.integers(len(gradients)))]
    value = (torch.nan, torch.inf, -torch.inf)[int(draw.integers(3))]
    gradient.view(-1)[int(draw.integers(gradient.numel()))] = value


PROVOCATIONS = {
    p.name: p
    for p in (
        Provocation("clean", "nothing is done"),
        Provocation(
            "corrupt-10",
            "10 % of the batches are random bytes",
            partial(corrupt, share=0.1),
            partial(corrupted, share=0.1),
        ),
        Provocation(
            "corrupt-2",
            "2 % of the batches are random bytes",
            partial(corrupt, share=0.02),
            partial(corrupted, share=0.02),
        ),
        Provocation("bursts", "6 random batches in a row, once in 50 steps", burst, in_burst),
        Provocation(
            "spikes",
            "noise of 100 times its norm on every gradient at 2 % of the steps",
            strike=partial(spike, share=0.02),
        ),
        Provocation(
            "nonfinite",
            "one gradient element NaN or infinite at 2 % of the steps",
            strike=partial(nonfinite, share=0.02),
        ),
        Provocation(
            "shift",
            "sequences reversed from 30 % of the run on; judged on reversed text",
            partial(reverse, at=0.3),
            reverse=True,
        ),
        Provocation("period-8", "two sources in turn, 4 steps each", partial(cycle, period=8)),
        Provocation("period-40", "two sources in turn, 20 steps each", partial(cycle, period=40)),
        Provocation(
            "oscillation",
            "one batch, always the same, at 10 times the learning rate, held constant; "
            "judged by the training loss of the last sixth",
            lr=10.0,
            full_batch=True,
        ),
        Provocation("lr-x10", "10 times the tuned learning rate", lr=10.0),
    )
}

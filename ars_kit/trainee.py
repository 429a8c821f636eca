"""A member in training: everything that its loop needs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from ars_kit.feed import Feed
from ars_kit.measure import Meter
from ars_kit.memory import whole_loss
from ars_kit.recovery import Recovery
from ars_kit.teaching import Teaching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ars_kit.curve import Curve
    from ars_kit.damping import DampedOptimizer
    from ars_kit.members import MemberPlan
    from ars_kit.settings import Settings
    from ars_kit.store import RunFolder
    from ars_kit.tokens import Batches
    from ars_kit.watching import Watcher


@dataclass(slots=True)
class Stop:
    """Whether the user or the machine asked the run to end."""

    signal: int | None = None
    _hears: bool = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one ends the process at once.

        Who listens already goes on doing so: a family and its controls may share one.
        """
        if self._hears:
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: FrameType | None) -> None:
            self.signal = number
            for s in before:
                signal.signal(s, signal.SIG_DFL)

        for s in before:
            signal.signal(s, note)
        self._hears = True
        try:
            yield
        finally:
            self._hears = False
            for s, handler in before.items():
                signal.signal(s, handler)


@dataclass(slots=True)
class Trainee:
    """Everything the loop needs of one member.

    Attributes:
        warmup: optimizer steps in which the learning rate climbs from ``start_lr`` of its peak.
        decay_fraction: share of the steps in which it falls; None for the run's.
        branch: steps after which the state is also kept for an heir; None where no heir wants it.
        curve: when the held-out text is judged along the way; None for never.
        loss: of the wrapped model on a window and positions in it: logits, or None, and the mean
            cross-entropy.
        accumulation: micro-batches of a step: more than the run's once memory ran out.
    """

    plan: MemberPlan
    settings: Settings
    model: PreTrainedModel
    optimizer: DampedOptimizer
    batches: Batches
    accelerator: Accelerator
    folder: RunFolder
    watcher: Watcher
    stop: Stop
    warmup: int
    recovery: Recovery = field(default_factory=Recovery)
    teaching: Teaching = field(default_factory=Teaching)
    start_lr: float = 0.0
    decay_fraction: float | None = None
    branch: int | None = None
    curve: Curve | None = None
    loss: Callable[[Any, Tensor, Tensor | None], tuple[Tensor | None, Tensor]] = whole_loss
    meter: Meter = field(default_factory=Meter)
    bad_in_a_row: int = 0
    saved: int = 0  # steps after which the newest training state was kept
    accumulation: int = 0
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        self.split(max(self.accumulation, self.settings.train.accumulation))

    @property
    def cooling(self) -> float:
        """Share of its steps in which ``wsd`` lets the learning rate fall."""
        own = self.decay_fraction
        return self.settings.train.decay_fraction if own is None else own

    def split(self, parts: int) -> None:
        """Have each step read its batch in so many micro-batches."""
        device, apart = self.accelerator.device, self.settings.data.document_mask
        self.accumulation = parts
        self.feed = Feed(self.batches, parts, device, apart=apart)


def what_is_kept(job: Trainee) -> str:
    """Say what of a member is kept if it ends here, and how to go on."""
    kept = f"the state after {job.saved} steps is kept" if job.saved else "nothing was kept yet"
    return f"{kept}. Once it is mended, run the same command again to go on with {job.plan.name}"


def branch_of(member: str) -> str:
    """Return the name under which a member's state lies before its learning rate fell."""
    return f"{member}.stable"

"""What a run does about long instability: which training states it keeps, where it goes back to.

Everything here is a function of the losses and of the steps at which states are saved, so that a
run that was interrupted goes back to the same state and passes over the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ars_kit.instability import WINDOW, Instability, Watch
from ars_kit.settings import TrainSettings


@dataclass(slots=True)
class Recovery:
    """One member's watch, the states it may go back to, and what it has gone back from.

    Attributes:
        watch: of the losses; None where the run looks on.
        most: times that a member goes back, at most.
        anchor: step of the saved state that is known to be from before any trouble.
        candidate: step of a later one that becomes the anchor if the losses stay calm.
        passed_over: batches left out so far.
        events: each time it went back, JSON-ready.
        found: an instability that nobody has acted on yet.
    """

    watch: Watch | None = None
    most: int = 0
    anchor: int | None = None
    candidate: int | None = None
    passed_over: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    found: Instability | None = None

    @classmethod
    def of(cls, train: TrainSettings) -> Recovery:
        """Make what the settings ask for; a run that only stops goes back no time at all."""
        if train.on_instability == "ignore":
            return cls()
        watch = Watch(limit=train.instability_limit, steps=train.instability_steps)
        return cls(watch, train.max_rollbacks if train.on_instability == "rollback" else 0)

    def look(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in what the steps have recorded."""
        if self.watch is not None and self.found is None:
            self.found = self.watch.look(rows)

    def keep(self, step: int, *, regular: bool) -> list[int]:
        """Return the steps whose states stay beside the one that is saved after ``step`` steps.

        A state is good once a whole window of losses after it has a calm median. Two are kept: the
        newest good one, and the oldest that is not known yet.

        Args:
            step: optimizer steps done.
            regular: it is saved where an undisturbed run saves too; others come and go with
                signals, and must not decide anything.
        """
        watch = self.watch
        if watch is None:
            return []
        if regular:
            if not watch.calm:
                self.candidate = None
            elif self.candidate is not None and watch.read >= self.candidate + WINDOW - 1:
                self.anchor, self.candidate = self.candidate, None
            if watch.calm and self.candidate is None:
                self.candidate = step
        return sorted({s for s in (self.anchor, self.candidate) if s is not None})

    def undo(self, found: Instability, step: int) -> dict[str, Any]:
        """Go on as the state after ``step`` steps remembers it, but past the batches since.

        Args:
            found: what is gone back from.
            step: of the state that is gone back to, whose memory this is.

        Returns:
            The event.
        """
        batches = found.noticed + 1 - step
        middle = found.median if math.isfinite(found.median) else None  # JSON has no infinity
        event = {**asdict(found), "median": middle, "back_to": step, "batches": batches}
        self.passed_over += batches
        self.events.append(event)
        self.anchor, self.candidate = step, None
        return event

    def events_at(self, step: int) -> list[dict[str, Any]]:
        """Return those that this step is the first after."""
        return [event for event in self.events if event["back_to"] == step]

    def state_dict(self) -> dict[str, Any]:
        """Return what restores this exactly, but for the settings."""
        return {
            "watch": None if self.watch is None else self.watch.state_dict(),
            "anchor": self.anchor,
            "candidate": self.candidate,
            "passed_over": self.passed_over,
            "events": self.events,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        A state saved by a run that looked on knows of no losses, and of no state to go back to;
        what was passed over stays so in any case.
        """
        watched = self.watch is not None and state["watch"] is not None
        if self.watch is not None:
            self.watch.load_state_dict(state["watch"] or Watch().state_dict())
        self.anchor = state["anchor"] if watched else None
        self.candidate = state["candidate"] if watched else None
        self.passed_over, self.events = state["passed_over"], list(state["events"])
        self.found = None

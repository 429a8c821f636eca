"""Who looks on while a family trains: the display, and the trackers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ars_kit.measure import Meter


class Watcher(Protocol):
    """Told what happens, so that somebody can look on."""

    def steps(self, member: str, done: int, rows: list[dict[str, Any]], meter: Meter) -> None:
        """Hear of steps that were read from the device: ``done`` of the member's are over."""
        ...

    def went_back(self, member: str, event: Mapping[str, Any]) -> None:
        """Hear that steps were undone, and why."""
        ...

    def judged(self, member: str, point: Mapping[str, Any]) -> None:
        """Hear of a new point of the held-out curve."""
        ...

    def aside(self, line: str) -> None:
        """Hear of something that is done otherwise than it was asked for, and why."""
        ...


class FamilyWatcher(Watcher, Protocol):
    """Told what happens to the family."""

    def born(self, member: str, facts: Mapping[str, Any]) -> None:
        """Hear that a member starts (or goes on) training."""
        ...

    def finished(self, metrics: Mapping[str, Any]) -> None:
        """Hear a committed member's metrics."""
        ...

"""Trackers that follow a run: told what the watcher is told, in figures, and never in the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ars_kit.errors import PluginError
from ars_kit.host import Host
from ars_kit.schema import Choice
from ars_kit.settings import Settings, spelled
from ars_kit.spec import TrackedRun, Tracker
from ars_kit.store import CONTROLS, TRACKERS, RunFolder
from ars_kit.watching import FamilyWatcher

if TYPE_CHECKING:
    from ars_kit.measure import Meter
    from ars_kit.plan import RunPlan


@contextmanager
def tracking(
    plan: RunPlan, host: Host, folder: RunFolder, watcher: FamilyWatcher, chosen: Sequence[Choice]
) -> Iterator[FamilyWatcher]:
    """Lend a watcher that tells the chosen trackers too; they end when this does.

    Raises:
        PluginError: a tracker could not begin; nothing was trained.
    """
    left = [m for m in plan.members if not folder.holds(m.name)]
    if not chosen or not left:  # a finished run has nothing to tell
        yield watcher
        return
    tracked = Tracked(plan, host, folder, watcher)
    try:
        for choice in chosen:
            tracked.begin(choice)
        yield tracked
    finally:
        tracked.finish()


class Tracked:
    """A watcher that hands figures on to trackers.

    Steps are counted over the whole family, so that its members stand one behind the other.
    """

    def __init__(
        self, plan: RunPlan, host: Host, folder: RunFolder, watcher: FamilyWatcher
    ) -> None:
        self.watcher, self._host, self._folder = watcher, host, folder
        self._settings = plan.settings
        self._trackers: dict[str, Tracker] = {}
        self._first: dict[str, int] = {}
        at = 0
        for member in plan.members:
            self._first[member.name] = at
            at += member.steps
        self._told = {m.name for m in plan.members if folder.holds(m.name)}
        member = next(m for m in plan.members if m.name not in self._told)
        self._start = self._first[member.name] + max(folder.states(member.name).steps(), default=0)
        self._at = self._start

    def begin(self, choice: Choice) -> None:
        """Make and start a tracker.

        Raises:
            PluginError: it failed.
        """
        tracker: Tracker = self._host.make("trackers", choice)
        home = self._folder.path / TRACKERS / choice.name
        home.mkdir(parents=True, exist_ok=True)
        run = TrackedRun(name_of(self._folder.path), home, told(self._settings), self._start)
        with self._host.blaming("trackers", choice.name, "when it was started"):
            tracker.start(run)
        self._trackers[choice.name] = tracker

    def finish(self) -> None:
        """End every tracker that began."""
        for name, tracker in list(self._trackers.items()):
            self._ask(name, tracker.finish)
        self._trackers.clear()

    def born(self, member: str, facts: Mapping[str, Any]) -> None:
        """Hand on that a member starts."""
        self.watcher.born(member, facts)

    def steps(self, member: str, done: int, rows: list[dict[str, Any]], meter: Meter) -> None:
        """Hand on steps: loss, damping, each gate, whether it was skipped."""
        self.watcher.steps(member, done, rows, meter)
        for row in rows:
            values = {f"train/{k}": v for k, v in row.items() if k not in {"step", "went_back"}}
            values["train/damping"] = row["gradient"] * row["step_size"]
            self._log(values, self._first[member] + row["step"])

    def went_back(self, member: str, event: Mapping[str, Any]) -> None:
        """Hand on that steps were undone."""
        self.watcher.went_back(member, event)

    def judged(self, member: str, point: Mapping[str, Any]) -> None:
        """Hand on a point of the held-out curve."""
        self.watcher.judged(member, point)
        self._log({"heldout/loss": point["loss"]}, self._first[member] + point["step"])

    def finished(self, metrics: Mapping[str, Any]) -> None:
        """Hand on the figures of a member that was committed in this sitting."""
        self.watcher.finished(metrics)
        name = str(metrics["model_id"])
        if name not in self._told:
            self._told.add(name)
            self._log({f"member/{k}": v for k, v in metrics.items()}, self._at)

    def aside(self, line: str) -> None:
        """Hand on what is done otherwise than it was asked for."""
        self.watcher.aside(line)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        self._at = step
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        figures = {k: v for k, v in numbers.items() if math.isfinite(v)}
        for name, tracker in list(self._trackers.items()):
            self._ask(name, partial(tracker.log, figures, step))

    def _ask(self, name: str, act: Callable[[], object]) -> None:
        """Let a tracker do something; one that fails is put aside, and the run goes on."""
        try:
            with self._host.blaming("trackers", name, "while it was told of the run"):
                act()
        except PluginError as error:
            self._trackers.pop(name, None)
            self.watcher.aside(f"{error}; the run goes on without it")


def name_of(path: Path) -> str:
    """Return what a run is called: its folder, and a control's name behind that of its run."""
    path = path.resolve()
    return f"{path.parents[1].name}-{path.name}" if path.parent.name == CONTROLS else path.name


def told(settings: Settings) -> dict[str, bool | int | float | str]:
    """Return every setting as a tracker can keep it."""
    return {
        key: value if isinstance(value, bool | int | float) else spelled(value)
        for key, value in settings.flat().items()
    }

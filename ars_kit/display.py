"""What a person sees while a family trains: a table that fills, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ars_kit.measure import Meter
    from ars_kit.members import MemberPlan
    from ars_kit.plan import RunPlan

HEADINGS = ("member", "parent", "step", "loss", "held-out", "damping", "tokens/s", "left", "cost $")
SPARE = ("parent", "tokens/s", "damping", "cost $", "held-out", "left")
"""Columns that a terminal too narrow for all goes without, the first of them first."""
PLAIN_EVERY = 5.0
"""Seconds between the lines of a display that is no terminal."""


class Display:
    """Follows a family on stderr; a terminal gets a live table, anything else plain lines.

    Args:
        plan: what was planned.
        console: where to; whether it is a terminal that can move its cursor decides the form.
    """

    def __init__(self, plan: RunPlan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.rows: dict[str, list[str]] = {
            m.name: [m.name, parent_of(m, plan), f"0/{m.steps}", *["-"] * 6] for m in plan.members
        }
        self._seconds = dict.fromkeys(self.rows, 0.0)
        self._share = dict.fromkeys(self.rows, 0.0)  # of each member's steps, done so far
        self._live: Live | None = None
        self._spoke = 0.0
        self._preparing = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the table for as long as this lasts."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            yield
            return
        with Live(self._table(), console=self.console, refresh_per_second=4) as live:
            self._live = live
            yield
            live.update(self._table())
            self._live = None

    def preparing(self, stage: str, count: int) -> None:
        """Hear of the text's preparation."""
        if stage != self._preparing:
            self._preparing = stage
            self._say(f"{stage} ...")
        elif time.monotonic() - self._spoke > PLAIN_EVERY:
            self._say(f"{stage}: {count:,}")

    def born(self, member: str, facts: Mapping[str, Any]) -> None:
        """Hear that a member starts, or goes on."""
        if facts["parent"] is None:
            self._say(f"{member}: from fresh weights")
            return
        change, share = facts["birth_logits_difference"], facts["inherited_share"]
        self._say(
            f"{member}: from {facts['parent']}, {share:.0%} inherited, "
            f"largest change of a logit {change:.2g}"
        )

    def steps(
        self, member: str, done: int, rows: Sequence[Mapping[str, Any]], meter: Meter
    ) -> None:
        """Hear of steps that are over."""
        if not rows:
            return
        planned = next(m for m in self.plan.members if m.name == member)
        loss = rows[-1]["loss"]
        taken = [r["gradient"] * r["step_size"] for r in rows if not r["skipped"]]
        damping = sum(taken) / len(taken) if taken else None
        seconds = meter.elapsed()
        rate = meter.tokens / seconds if seconds else 0.0
        # By steps: the meter's tokens count those that were undone too.
        tokens = (planned.steps - done) * planned.tokens / planned.steps
        left = tokens / rate if rate else 0.0
        self._seconds[member], self._share[member] = seconds, done / planned.steps
        self.rows[member][2:] = [
            f"{done}/{planned.steps}",
            f"{loss:.3f}",
            self.rows[member][4],
            _figure(damping, "{:.3f}"),
            f"{rate:,.0f}",
            duration(left),
            self._cost(seconds),
        ]
        self._update()
        if self._live is None and time.monotonic() - self._spoke > PLAIN_EVERY:
            row = self.rows[member]
            self._say(
                f"{member}: step {row[2]}, loss {row[3]}, damping {row[5]}, {row[6]} tokens/s, "
                f"{row[7]} left; {self._family()}"
            )

    def went_back(self, member: str, event: Mapping[str, Any]) -> None:
        """Hear that steps were undone, and why."""
        median = _figure(event["median"], "{:.3f}")
        self._say(
            f"{member}: unstable since step {event['since']} or later (median loss {median}, "
            f"best {event['best']:.3f}); back to step {event['back_to']}, past "
            f"{event['batches']} batches"
        )

    def judged(self, member: str, point: Mapping[str, Any]) -> None:
        """Hear of a new point of the held-out curve."""
        self.rows[member][4] = _figure(point["loss"], "{:.3f}")
        self._update()

    def aside(self, line: str) -> None:
        """Hear of something that is done otherwise than it was asked for, and why."""
        self._say(line)

    def finished(self, metrics: Mapping[str, Any]) -> None:
        """Hear that a member is committed."""
        heldout, damping = metrics.get("heldout_loss"), metrics["ars_damping_avg"]
        name = str(metrics["model_id"])
        self._seconds[name], self._share[name] = metrics["training_time"], 1.0
        # What a strategy makes of finished members was in no plan.
        row = self.rows.setdefault(name, [name, str(metrics["parent_model"]), *["-"] * 7])
        row[2:] = [
            f"{metrics['steps']}/{metrics['steps']}",
            _figure(metrics["final_loss"], "{:.3f}"),
            _figure(heldout, "{:.3f}"),
            _figure(damping, "{:.3f}"),
            _figure(metrics["tokens_per_second"], "{:,.0f}"),
            "done",
            f"{metrics['cost']:.4f}",
        ]
        self._update()
        steps, skipped = metrics["steps"], metrics["skipped_steps"]
        if 2 * skipped > steps:
            trained = "hardly" if skipped < steps else "not"
            self._say(
                f"{name}: {skipped} of its {steps} steps were skipped, so it is {trained} trained"
            )
        if self._live is None:
            self._say(f"{name}: done, held-out loss {row[4]} nats per token; {self._family()}")

    def family_left(self) -> float | None:
        """Return the family's training time still to come, in seconds.

        The plan's estimates, corrected by how wrong they were for what is done; None before the
        first steps, or where nothing was estimated.
        """
        estimates = {m.name: m.seconds for m in self.plan.members}
        if None in estimates.values():
            return None
        foreseen = sum((e or 0.0) * self._share[name] for name, e in estimates.items())
        if not foreseen:
            return None
        rest = sum((e or 0.0) * (1 - self._share[name]) for name, e in estimates.items())
        return rest * sum(self._seconds.values()) / foreseen

    def _family(self) -> str:
        left = self.family_left()
        ahead = "" if left is None else f"{duration(left)} left, "
        return f"family: {ahead}{self._cost(sum(self._seconds.values()))} $ so far"

    def _cost(self, seconds: float) -> str:
        return f"{seconds / 3600 * self.plan.settings.run.price_per_hour:.4f}"

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        say(self.console, line)

    def _update(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        left = self.family_left()
        steps = sum(m.steps for m in self.plan.members)
        done = sum(round(m.steps * self._share[m.name]) for m in self.plan.members)
        times = duration(left) if done < steps else "done"
        cost = self._cost(sum(self._seconds.values()))
        family = ["family", "", f"{done}/{steps}", "", "", "", "", times, cost]
        return fitted(self.console, HEADINGS, [*self._shown(), family], SPARE)

    def _shown(self) -> list[list[str]]:
        """Return the rows that the terminal has room for, those about the member in training."""
        rows = list(self.rows.values())
        room = max(3, self.console.height - 5)  # headings, family, and a line for the cursor
        if len(rows) <= room:
            return rows
        active = sum(share >= 1.0 for share in self._share.values())
        first = min(max(0, active - room // 2), len(rows) - room)
        dots = ["...", *[""] * (len(HEADINGS) - 1)]
        above, below = [dots] * (first > 0), [dots] * (first + room < len(rows))
        return [*above, *rows[first : first + room], *below]


class JudgingDisplay:
    """Follows judges on stderr; a terminal gets a bar, anything else plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._preparing = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the bar for as long as this lasts."""
        with self._bar:
            yield

    def preparing(self, stage: str, count: int) -> None:  # noqa: ARG002 -- Progress's form
        """Hear of the text's preparation."""
        if stage != self._preparing:
            self._preparing = stage
            self._begin(f"{stage} ...")

    def judging(self, model: str, evaluator: str) -> None:
        """Hear that an evaluator starts."""
        self._begin(f"{model}: {evaluator} ...")

    def share(self, done: float) -> None:
        """Hear how much of its work is done, 0 to 1."""
        self._bar.update(self._task, total=1.0, completed=done)

    def judged(self, model: str, evaluator: str, *, cached: bool) -> None:
        """Hear that its figures are there."""
        if cached:
            say(self.console, f"{model}: {evaluator} from the cache; --fresh measures again")

    def unkept(self, reason: str) -> None:
        """Hear why figures are not in the cache."""
        say(
            self.console,
            f"arskit: these figures were not kept, and select will not find them: {reason}. "
            "Make room or make it writable, or name another cache with ARSKIT_CACHE",
        )

    def _begin(self, what: str) -> None:
        if self._bar.disable:
            say(self.console, what)
        self._bar.reset(self._task, total=None, description=what)


def parent_of(member: MemberPlan, plan: RunPlan) -> str:
    """Return a parent as a table has room for it: a base by that word, whatever its path."""
    if member.parent is None:
        return "-"
    return member.parent if member.parent in {m.name for m in plan.members} else "base"


def say(console: Console, text: str) -> None:
    """Print text: wrapped at words on a terminal, in whole lines for anybody else."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def fitted(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    spare: Sequence[str],
    *,
    names: int = 2,
) -> Table:
    """Return a table that fits the console: narrower gaps if need be, then columns left out.

    Args:
        console: where it will be shown.
        headings: of the columns.
        rows: their cells.
        spare: headings that may go, the first of them first.
        names: columns at the left that are names, not figures.
    """
    dropped = 0
    made = table(headings, rows, names=names)
    endless = console.options.update_width(10_000)
    while Measurement.get(console, endless, made).maximum > console.width:
        if dropped > len(spare):
            break
        keep = [i for i, heading in enumerate(headings) if heading not in spare[:dropped]]
        cells = [[row[i] for i in keep] for row in rows]
        made = table([headings[i] for i in keep], cells, gap=1, names=sum(i < names for i in keep))
        dropped += 1
    return made


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, gap: int = 2, names: int = 2
) -> Table:
    """Return a table whose first columns are names and whose rest are figures."""
    made = Table(box=None, pad_edge=False, padding=(0, gap // 2, 0, gap - gap // 2))
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < names else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def duration(seconds: float | None) -> str:
    """Return a time as a person says it: ``48 s``, ``3.2 min``, ``5.1 h``."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _figure(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)

"""Runs side by side: a family and its controls, or runs of their own, over any number of seeds.

The first run named is the family; whatever else there is is compared with it. Runs whose settings
differ in nothing but the seed are one group, and a group's figures have a spread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ars_kit.errors import ConfigError
from ars_kit.reach import Spent, first_at, path_to, points
from ars_kit.records import MemberRecord, RunRecord, read_run
from ars_kit.rules import unalike
from ars_kit.schema import did_you_mean
from ars_kit.settings import NEUTRAL, differences
from ars_kit.spread import Spread

FAMILY = "family"
SAME_TEXT = ("data.heldout_fraction", "data.heldout_tokens")
"""Settings that decide, beside the text, what is judged."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        name: ``family``, a control's, or what it does otherwise than the family.
    """

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return [run.settings.family.seed for run in self.runs]

    def spread(self, key: str, member: str | None = None) -> Spread | None:
        """Return a member's figure, or that of whole runs summed over their members."""
        if member is None:
            return Spread.of([run.total(key) for run in self.runs if run.is_complete])
        records = [run.member(member) for run in self.runs]
        return Spread.of([r.metrics.get(key) for r in records if r is not None])


@dataclass(frozen=True, slots=True)
class Reached:
    """What a family spent until it was as good as a member of a control.

    Attributes:
        group: the control's.
        seed: of both runs.
        member: of the control.
        against: the family's member whose line of descent is compared: the one of the same name, or
            the largest where the control trained one member alone.
        target: the last point of the control's curve, nats per token; None without a curve.
        control: what the control had spent by then.
        reached: where the line first came down to it, its ancestors' cost counted; None: nowhere.
        own: the same from the member's own birth on, as if its ancestors had cost nothing; None
            also where the control has no member of this name.
        control_own: what the control had spent on its member alone, counted likewise.
        loss: the last point of the family's curve.
        control_reached: where the control first came down to that; None: nowhere.
        why: what is missing, where nothing can be said.
    """

    group: str
    seed: int
    member: str
    against: str
    target: float | None = None
    control: Spent | None = None
    reached: Spent | None = None
    own: Spent | None = None
    control_own: Spent | None = None
    loss: float | None = None
    control_reached: Spent | None = None
    why: str | None = None

    def saved(self, what: str = "flops", *, own: bool = False) -> float | None:
        """Return the share of the control's FLOPs, seconds or cost that was not needed.

        Negative where more was needed; None where the loss was not reached. Of a member alone what
        its ancestors cost is left out on both sides.
        """
        found, control = (self.own, self.control_own) if own else (self.reached, self.control)
        if found is None or control is None or not getattr(control, what):
            return None
        return float(1 - getattr(found, what) / getattr(control, what))

    def facts(self) -> dict[str, Any]:
        """Return it JSON-ready, with the shares that were saved."""
        kinds = ("flops", "seconds", "cost")
        saved = {k: self.saved(k) for k in kinds}
        return {
            **asdict(self),
            "saved": saved,
            "saved_own": {k: self.saved(k, own=True) for k in kinds},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that can be said of runs side by side.

    Attributes:
        groups: the family's first.
        notes: what a reader must know before believing the figures.
    """

    groups: tuple[Group, ...]
    reached: tuple[Reached, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def family(self) -> Group:
        """The group that the others are compared with."""
        return self.groups[0]

    @property
    def members(self) -> list[str]:
        """Every member's name, in the order of the runs."""
        return list(dict.fromkeys(m.name for g in self.groups for r in g.runs for m in r.members))

    def saved(self, group: str, member: str, what: str = "flops") -> Spread | None:
        """Return the share saved over the seeds; None unless every seed reached the loss."""
        found = [r for r in self.reached if (r.group, r.member) == (group, member)]
        shares = [r.saved(what) for r in found]
        return None if None in shares else Spread.of(shares)

    def require(self, metric: str) -> None:
        """Refuse a figure that no member has.

        Raises:
            ConfigError: it is one.
        """
        there = {
            key: None
            for group in self.groups
            for run in group.runs
            for member in run.finished
            for key, value in member.metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if there and metric not in there:
            raise ConfigError(
                f"no member has a figure named {metric!r}{did_you_mean(metric, there)}. "
                f"There are: {', '.join(there)}"
            )

    def facts(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {
            "groups": [_group_facts(g, self.members) for g in self.groups],
            "reached": [r.facts() for r in self.reached],
            "notes": list(self.notes),
        }


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare run folders, and the controls that they hold.

    Raises:
        ConfigError: a folder holds no run, is named twice, was judged on other text, or has the
            seed of another with the same settings.
        IntegrityError: a lineage is damaged.
    """
    folders = [Path(os.path.realpath(path)) for path in paths]  # resolve() chokes on a loop
    if len({*folders}) < len(folders):
        raise ConfigError("a run folder is named twice")
    names = [folder.name for folder in folders]
    labels = names if len({*names}) == len(names) else [str(p) for p in paths]
    return compare_runs([read_run(p, label) for p, label in zip(paths, labels, strict=True)])


def compare_runs(runs: Sequence[RunRecord]) -> Comparison:
    """Compare runs that were read, the first of them the family.

    Raises:
        ConfigError: one was judged on other text than the first, or is another once more.
    """
    first, groups, notes = runs[0], dict[str, list[RunRecord]](), list[str]()
    for run in runs:
        notes += _comparable(first, run)
        group = groups.setdefault(_name(first, run), [])
        _require_other_seed(group, run)
        group.append(run)
    for run in runs:
        for control in run.controls:
            notes += _comparable(first, control)
            known = run is first or _name(first, run) == FAMILY
            name = control.label if known else f"{control.label} of {run.label}"
            groups.setdefault(name, []).append(control)
    notes += [f"{run.label}: {p}" for run in _all(runs) for p in run.problems]
    notes += _judged_otherwise(first, runs)
    notes += [f"{run.label} is not finished" for run in _all(runs) if not run.is_complete]
    made = tuple(Group(name, tuple(found)) for name, found in groups.items())
    one_seed = [g.name for g in made if len(g.runs) == 1]
    if one_seed:
        notes.append(
            f"One seed of {', '.join(one_seed)}: no spread, and no interval, can be given; a "
            "difference may be chance"
        )
    reached = [r for group in made[1:] for run in group.runs for r in _reached(made[0], group, run)]
    return Comparison(made, tuple(reached), tuple(dict.fromkeys(notes)))


def _judged_otherwise(first: RunRecord, runs: Sequence[RunRecord]) -> list[str]:
    """Return how members were judged, where the same tokens were judged in different ways."""

    def tokens(run: RunRecord) -> tuple[Any, int]:
        return run.data.get("tokenizer"), run.settings.data.sequence_length

    same = [run for run in _all(runs) if tokens(run) == tokens(first)]
    judged = [(f"{run.label}/{m.name}", m.metrics) for run in same for m in run.finished]
    told = unalike(judged, "heldout_loss")
    return [told] if told else []


def _all(runs: Sequence[RunRecord]) -> Iterator[RunRecord]:
    for run in runs:
        yield run
        yield from run.controls


def _name(first: RunRecord, run: RunRecord) -> str:
    # Within a run a remedy may be chosen when there is trouble; between runs it makes a difference.
    changed = differences(first.settings, run.settings, free=NEUTRAL | {"family.seed"})
    return "; ".join(changed) or FAMILY


def _require_other_seed(group: Sequence[RunRecord], run: RunRecord) -> None:
    """Refuse what would count one sample twice.

    Raises:
        ConfigError: the group holds a run with this run's seed.
    """
    seed = run.settings.family.seed
    again = next((r for r in group if r.settings.family.seed == seed), None)
    if again is not None:
        raise ConfigError(
            f"{run.label} has the settings of {again.label}, its seed {seed} too: both are one "
            "sample, and tell nothing of chance together; leave one out"
        )


def _comparable(first: RunRecord, run: RunRecord) -> list[str]:
    """Refuse a run that was judged on other text; returns what else there is to say.

    Raises:
        ConfigError: it was.
    """
    ours, theirs = first.data, run.data
    if ours and theirs and ours["data"] != theirs["data"]:
        raise ConfigError(
            f"{run.label} was trained on other text than {first.label} (data sha256 "
            f"{theirs['data'][:12]}, not {ours['data'][:12]}): their figures cannot be compared"
        )
    mine, yours = ours.get("others") or {}, theirs.get("others") or {}
    if moved := [source for source in mine if yours.get(source, mine[source]) != mine[source]]:
        raise ConfigError(
            f"members of {run.label} were trained on other text than those of {first.label}: "
            f"{moved[0]!r} had changed between them; their figures cannot be compared"
        )
    before, after = first.settings.flat(), run.settings.flat()
    for key in SAME_TEXT:
        if before[key] != after[key]:
            raise ConfigError(
                f"{run.label} was judged on other text than {first.label} ({key}: {after[key]}, "
                f"not {before[key]}): their figures cannot be compared"
            )
    notes = []
    if ours and theirs and ours["tokenizer"] != theirs["tokenizer"]:
        notes.append(
            f"{run.label} has another tokenizer than {first.label}: compare bits per byte, not "
            "loss per token; what it took to reach a loss is left out"
        )
    if before["data.sequence_length"] != after["data.sequence_length"]:
        notes.append(f"{run.label} was judged with another context than {first.label}")
    members = [m for r in (first, run) for m in r.finished]
    for key, at, what, told in (
        ("device", "on", "device", "time"),
        ("price_per_hour", "at", "price", "cost"),
    ):
        if len({m.metrics[key] for m in members if key in m.metrics}) > 1:
            how = f"several {what}s" if run is first else f"another {what} than {first.label}"
            notes.append(f"{run.label} ran {at} {how}: {told} is not comparable")
    return notes


def _reached(family: Group, group: Group, run: RunRecord) -> Iterator[Reached]:
    """Yield what the family's run of the same seed spent until it was as good as this one."""
    beside = [f for f in family.runs if run in f.controls]
    same = [f for f in family.runs if f.settings.family.seed == run.settings.family.seed]
    ours = next(iter(beside or same), None)
    for member in run.finished:
        if ours is None or not ours.finished:
            why = f"the family was not trained with seed {run.settings.family.seed}"
            yield Reached(group.name, run.settings.family.seed, member.name, "-", why=why)
            continue
        named = run.control is None or run.control.get("budget_flops") is None
        against = ours.member(member.name) if named else ours.largest
        yield _row(group.name, run, member, ours, against)


def _row(
    group: str, run: RunRecord, member: MemberRecord, ours: RunRecord, against: MemberRecord | None
) -> Reached:
    seed = run.settings.family.seed
    why = None
    if against is None or not against.metrics:
        why = f"the family has no finished member {member.name}"
    elif ours.data.get("tokenizer") != run.data.get("tokenizer"):
        why = "another tokenizer"
    elif ours.settings.data.sequence_length != run.settings.data.sequence_length:
        why = "another context"
    elif not member.curve or not against.curve:
        why = "no held-out curve was drawn"
    elif not all(m.metrics for m in (*path_to(run, member.name), *path_to(ours, against.name))):
        why = "an ancestor's figures are damaged, so what it spent is not known"
    elif member.curve[-1]["judged_tokens"] != against.curve[-1]["judged_tokens"]:
        why = "the curves were judged on different samples"
    if why or against is None or member.last_heldout is None or against.last_heldout is None:
        name = against.name if against else "-"
        return Reached(group, seed, member.name, name, why=why or "a loss was not finite")
    theirs = points(run, member.name, ancestors=True)
    line = points(ours, against.name, ancestors=True)
    alone = points(ours, against.name, ancestors=False) if against.name == member.name else []
    return Reached(
        group=group,
        seed=seed,
        member=member.name,
        against=against.name,
        target=member.last_heldout,
        control=theirs[-1],
        reached=first_at(line, member.last_heldout),
        own=first_at(alone, member.last_heldout),
        control_own=points(run, member.name, ancestors=False)[-1],
        loss=against.last_heldout,
        control_reached=first_at(theirs, against.last_heldout),
    )


def _group_facts(group: Group, members: Sequence[str]) -> dict[str, Any]:
    def plain(spread: Spread | None) -> dict[str, Any] | None:
        return None if spread is None else asdict(spread)

    keys = ("heldout_loss", "bits_per_byte")
    return {
        "name": group.name,
        "runs": [str(run.path) for run in group.runs],
        "seeds": group.seeds,
        "members": {
            name: {key: plain(group.spread(key, name)) for key in keys}
            for name in members
            if any(run.member(name) for run in group.runs)
        },
        "total_flops": plain(group.spread("total_flops")),
        "training_time": plain(group.spread("training_time")),
        "cost": plain(group.spread("cost")),
        "control": [run.control for run in group.runs if run.control],
    }

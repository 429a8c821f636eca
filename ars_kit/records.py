"""A run folder read back, finished or not: what is missing or damaged is named, never made up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ars_kit.durable import MANIFEST, check_file, read_manifest, sha256
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.history import read_history
from ars_kit.lineage import Entry
from ars_kit.outcome import frozen_settings, read_metrics, trained_otherwise
from ars_kit.roster import parse_roster
from ars_kit.settings import Settings
from ars_kit.states import CURVE, HISTORY
from ars_kit.store import BEST, CONTROLS, RunFolder

CONTROL_RECORD = "control.json"
PLAN_RECORD = "plan.json"
SAMPLES = "quality/samples.json"

NEEDED: Mapping[str, Sequence[str]] = {
    HISTORY: ("loss", "gradient", "step_size", "skipped"),
    CURVE: ("loss", "flops", "seconds", "judged_tokens", "judging_seconds", "judging_flops"),
}
"""What a report takes from each row of a record, beside its step."""

State = Literal["done", "training", "waiting"]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """What a folder holds of one member.

    Attributes:
        state: ``done`` once it is committed, ``training`` once it has a history.
        metrics: its figures; empty until it is committed, or where they are damaged.
        history: a row for each recorded step; empty where there is none, or where it is damaged.
        curve: the points of its held-out curve; empty where none was drawn.
        samples: prompts and what the member made of them.
        manifest: sha256 of its manifest; None until it is committed.
        parent_manifest: likewise of its parent's, as it was born from it.
    """

    name: str
    state: State
    metrics: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Row, ...] = ()
    curve: tuple[Row, ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    parent: str | None = None
    manifest: str | None = None
    parent_manifest: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps recorded so far."""
        return int(self.metrics["steps"]) if self.metrics else len(self.history)

    @property
    def last_heldout(self) -> float | None:
        """The last point of the held-out curve, in nats per token; None without one."""
        losses = [row["loss"] for row in self.curve if row["loss"] is not None]
        return float(losses[-1]) if losses else None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        label: how a table calls it.
        control: what ``control.json`` says; None for a run that is no control.
        controls: the run's own, in the order they were asked for.
        data: hashes of its text and its tokenizer; empty until the text was prepared.
        best: the member recorded as best, and the rule.
        plan: what was estimated before the start; None where it was not kept.
        born: names of the committed members in order of birth, which is not that of ``members``
            where the largest is trained first.
        problems: what is missing or damaged, a line each.
    """

    path: Path
    label: str
    settings: Settings
    members: tuple[MemberRecord, ...]
    control: Mapping[str, Any] | None = None
    controls: tuple[RunRecord, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    best: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    born: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def by_birth(self) -> list[MemberRecord]:
        """The members as they came one after another; those that are not finished behind."""
        place = {name: i for i, name in enumerate(self.born)}
        states: tuple[State, ...] = ("done", "training", "waiting")
        return sorted(
            self.members, key=lambda m: (place.get(m.name, len(place)), states.index(m.state))
        )

    @property
    def finished(self) -> list[MemberRecord]:
        """The members that are committed and whose figures are whole."""
        return [m for m in self.members if m.metrics]

    @property
    def is_complete(self) -> bool:
        """Whether every member is there."""
        return len(self.finished) == len(self.members)

    @property
    def largest(self) -> MemberRecord | None:
        """The finished member with the most parameters; None where none is finished.

        Of equals it is the one whose weights cost the most: in a chain of one shape the last. What
        was made of other members without training counts only where there is nothing else.
        """
        return max(
            self.finished,
            key=lambda m: (
                m.metrics["steps"] > 0,
                m.metrics["parameters"],
                m.metrics["lineage_flops"],
            ),
            default=None,
        )

    def member(self, name: str) -> MemberRecord | None:
        """Return a member by its name."""
        return next((m for m in self.members if m.name == name), None)

    def total(self, key: str) -> float:
        """Return a figure summed over the finished members."""
        return float(sum(m.metrics[key] for m in self.finished))


def read_run(out: Path, label: str | None = None) -> RunRecord:
    """Read a run folder and its controls.

    Args:
        out: the folder.
        label: how a table calls it; the folder's name if left out.

    Raises:
        ConfigError: there is no run in it.
        IntegrityError: its lineage is damaged.
    """
    settings = frozen_settings(out)
    folder, problems = RunFolder(out), list[str]()
    entries = {e.member: e for e in folder.lineage()}
    planned = [m.name for m in parse_roster(settings.family.members)]
    names = [*planned, *(n for n in folder.members() if n not in planned)]
    members = tuple(_member(folder, name, entries, problems) for name in names)
    problems += trained_otherwise(out, settings)
    return RunRecord(
        path=out,
        label=label or out.resolve().name,
        settings=settings,
        members=members,
        control=_table(out / CONTROL_RECORD, problems),
        controls=tuple(_controls(out, settings, problems)),
        data=_table(folder.private / "data.json", problems) or {},
        best=_table(out / BEST, problems),
        plan=_table(folder.private / PLAN_RECORD, problems),
        born=tuple(entries),
        problems=tuple(problems),
    )


def _controls(out: Path, settings: Settings, problems: list[str]) -> Iterator[RunRecord]:
    known = list(settings.run.controls)
    there = sorted(p.name for p in (out / CONTROLS).glob("*") if p.is_dir())
    for name in [*known, *(n for n in there if n not in known)]:
        try:
            yield read_run(out / CONTROLS / name, name)
        except ConfigError:
            problems.append(f"control {name} has not begun")
        except IntegrityError as error:
            problems.append(f"control {name}: {error}")


def _member(
    folder: RunFolder, name: str, entries: Mapping[str, Entry], problems: list[str]
) -> MemberRecord:
    done = folder.holds(name)
    metrics: Mapping[str, Any] = {}
    manifest: Mapping[str, Any] = {}
    if done:
        try:
            metrics = read_metrics(folder, name)
            manifest = read_manifest(folder.path / name)
        except (IntegrityError, OSError, ValueError) as error:
            problems.append(str(error))
    elif name in entries:
        problems.append(f"{name} was committed, but {folder.path / name} is gone")
    history = _rows(folder, name, HISTORY, problems, expected=bool(metrics.get("steps")))
    drawn = metrics.get("heldout_curve") is not None
    curve = _rows(folder, name, CURVE, problems, expected=drawn)
    if metrics and curve and (curve[0]["step"], curve[-1]["step"]) != (0, metrics["steps"]):
        problems.append(
            f"{name}: its held-out curve does not go from birth to end, as run.heldout_every was "
            "changed under way; it is left out"
        )
        curve = ()
    entry = entries.get(name)
    return MemberRecord(
        name=name,
        state="done" if done else "training" if history or curve else "waiting",
        metrics=metrics,
        history=history,
        curve=curve,
        samples=_samples(folder.path / name, manifest, problems),
        parent=metrics.get("parent_model") or (entry.parent if entry else None),
        manifest=entry.manifest if entry else None,
        parent_manifest=manifest.get("parent_manifest"),
    )


def _rows(
    folder: RunFolder, member: str, name: str, problems: list[str], *, expected: bool
) -> tuple[Row, ...]:
    """Return a member's record, while it trains or after; nothing where it is not to be trusted."""
    path = folder.history_path(member) if name == HISTORY else folder.curve_path(member)
    if not path.exists():
        if expected:
            problems.append(f"{member}: {name} is missing; what follows from it is left out")
        return ()
    if (path.parent / MANIFEST).exists() and (problem := check_file(path.parent, path.name)):
        problems.append(f"{member}: {problem}; what follows from it is left out")
        return ()
    try:
        rows = read_history(path)
    except (IntegrityError, OSError) as error:
        problems.append(f"{member}: {error}; what follows from it is left out")
        return ()
    for number, row in enumerate(rows, start=1):
        if lacking := [key for key in NEEDED[name] if key not in row]:
            problems.append(
                f"{member}: {path}, line {number} is damaged (it lacks {lacking[0]!r}); what "
                "follows from it is left out"
            )
            return ()
    return tuple(rows)


def _samples(
    member: Path, manifest: Mapping[str, Any], problems: list[str]
) -> tuple[Mapping[str, Any], ...]:
    path = member / SAMPLES
    found = _json(path, problems)
    if found is None:
        return ()
    committed = manifest.get("files", {}).get(SAMPLES)
    if (committed and sha256(path) != committed["sha256"]) or not isinstance(found, list):
        problems.append(f"{member.name}: {SAMPLES} is not what was committed")
        return ()
    return tuple(s for s in found if isinstance(s, dict) and {"prompt", "text"} <= s.keys())


def _table(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return a record of names and values; None where there is none, or something else."""
    found = _json(path, problems)
    if found is None or isinstance(found, dict):
        return found
    problems.append(f"{path.name} is damaged: it holds a {type(found).__name__}")
    return None


def _json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} is damaged: {error}")
        return None

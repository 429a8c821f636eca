"""A whole run: check, freeze, prepare, train, report. The one call behind ``arskit run``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ars_kit.choosing import choose, record_best, usual_metric
from ars_kit.controls import Control
from ars_kit.data import Corpus
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.family import Family, run_family
from ars_kit.host import Host
from ars_kit.inputs import identify_inputs, require_unchanged
from ars_kit.outcome import (
    DATA_RECORD,
    FROZEN,
    newer_than_best,
    read_metrics,
    text_hashes,
    trained_otherwise,
)
from ars_kit.plan import RunPlan
from ars_kit.ranks import make_accelerator, not_alone, require_equal_parts, require_seen
from ars_kit.records import CONTROL_RECORD, PLAN_RECORD
from ars_kit.reporting import write_report
from ars_kit.resolving import resolve
from ars_kit.roster import parse_roster
from ars_kit.rules import Aim, Rule
from ars_kit.settings import Settings, differences, to_toml
from ars_kit.shardable import require_shardable
from ars_kit.source import parse_source
from ars_kit.spool import Progress
from ars_kit.store import RunFolder, control_folder
from ars_kit.texts import open_texts
from ars_kit.tracking import tracking
from ars_kit.trainee import Stop
from ars_kit.watching import FamilyWatcher


def execute(  # noqa: PLR0913 -- what a run is told, and by whom it is watched and stopped
    plan: RunPlan,
    host: Host,
    out: Path,
    cache: Path,
    *,
    watcher: FamilyWatcher,
    progress: Progress | None = None,
    restart: bool = False,
    note: str | None = None,
    stop: Stop | None = None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Run a plan to its end, or on from where it stopped.

    Args:
        plan: what to train.
        host: the installed plugins.
        out: the run folder.
        cache: of prepared data.
        watcher: told what happens.
        progress: told of the text's preparation.
        restart: throw away what the folder holds first.
        note: of a control, kept as ``control.json``.
        stop: hears of signals, of this run's alone where it is left out. A signal that it has heard
            already, when there was nothing left to stop, stops this run after a step.

    Returns:
        All metrics, and the member with the lowest held-out loss, if any was measured.

    Raises:
        ConfigError: the folder is in use, or holds a run of another plan.
        DataError: the text cannot be had.
        Preempted: a signal came; the state is saved.
        ArsKitError: another process of the run is gone.
    """
    stop = stop or Stop()
    accelerator = make_accelerator(plan)
    require_equal_parts(plan.settings, accelerator.num_processes)
    with not_alone(accelerator):
        require_shardable(host, plan.settings.optimizer, accelerator)
    folder = RunFolder(out)
    guard = folder.lock() if accelerator.is_main_process else nullcontext()
    with not_alone(accelerator), guard, stop.listening():
        if accelerator.is_main_process:
            if restart:
                folder.start_anew()
            _require_same_plan(folder, plan.settings)
            folder.preflight(
                plan.disk_bytes_for([m for m in plan.members if not folder.holds(m.name)])
            )
            _tell_of_curves(folder, plan, watcher)
        with accelerator.main_process_first():
            texts = open_texts(plan.settings, host, cache, progress)
        if accelerator.is_main_process:
            _freeze(folder, plan.settings, texts, is_control=note is not None)
            if not (folder.private / PLAN_RECORD).exists():
                _keep(folder, PLAN_RECORD, plan.facts())
            if note is not None:
                folder.write_text(CONTROL_RECORD, note)
        accelerator.wait_for_everyone()
        require_seen(folder.path / FROZEN, accelerator)
        corpus = texts[plan.settings.data.source]
        trackers = plan.settings.run.trackers if accelerator.is_main_process else ()
        with tracking(plan, host, folder, watcher, trackers) as told:
            family = Family(plan, host, folder, corpus, texts, told, stop, accelerator)
            metrics = run_family(family)
        measured = any(m.get("heldout_loss") is not None for m in metrics)
        rule = Rule((Aim(usual_metric(metrics)),))
        chosen = choose(folder, metrics, rule) if measured else None
        if accelerator.is_main_process:
            if chosen is not None:
                _record(folder, chosen, watcher)
            write_report(out)
        return metrics, None if chosen is None else chosen["member"]


def _record(folder: RunFolder, chosen: dict[str, Any], watcher: FamilyWatcher) -> None:
    """Record the best, unless a choice was made among the very members that there are."""
    if chosen["unalike"]:
        watcher.aside(f"{chosen['member']} is no certain best: {chosen['unalike']}")
    if newer_than_best(folder.path):
        record_best(folder, chosen)


def _tell_of_curves(folder: RunFolder, plan: RunPlan, watcher: FamilyWatcher) -> None:
    """Say what controls cannot be compared by, where members were finished without a curve."""
    if not plan.settings.run.controls:
        return
    done = [m.name for m in plan.members if folder.holds(m.name)]
    flat = [name for name in done if read_metrics(folder, name).get("heldout_curve") is None]
    if flat:
        watcher.aside(
            f"{', '.join(flat)}: finished without a held-out curve, so controls are compared with "
            "what came out alone, and not by what it took; for that, start anew with --restart"
        )


def train_control(
    control: Control, host: Host, out: Path, cache: Path, *, watcher: FamilyWatcher, stop: Stop
) -> list[dict[str, Any]]:
    """Train a control in the run folder of its family, or go on where it was stopped.

    It is an ordinary run in ``OUT/controls/NAME``, and raises what :func:`execute` does.
    """
    folder = RunFolder(control_folder(out, control.name))
    record = json.dumps(control.record(), indent=2) + "\n"
    metrics, _ = execute(
        control.plan, host, folder.path, cache, watcher=watcher, note=record, stop=stop
    )
    return metrics


def check_folder(out: Path, settings: Settings, host: Host, *, restart: bool) -> None:
    """Refuse a folder before any text is prepared for it; :func:`execute` asks again.

    Raises:
        ConfigError: the folder cannot be written to, is in use, holds a run of another plan, or is
            that of the text.
    """
    folder = RunFolder(out)
    members = parse_roster(settings.family.members)
    for text in {settings.data.source, *(m.data for m in members if m.data)}:
        path = parse_source(text, host).settings.get("path")
        if isinstance(path, str) and _same_folder(Path(path).expanduser(), out):
            raise ConfigError(
                f"{out} is the folder of the text, which members would become a part of; choose "
                "another --out"
            )
    if not str(out.absolute()).isprintable():  # safetensors opens no path that is not UTF-8
        raise ConfigError(f"{str(out)!r} is no path in UTF-8; choose another --out")
    _require_place(out)
    folder.require_free()
    if not restart:
        _require_same_plan(folder, settings)


def _require_place(out: Path) -> None:
    """Refuse a folder that can neither be made nor written to."""
    place = out.absolute()
    while not os.path.lexists(place):
        place = place.parent
    why = None if place.is_dir() else "is no directory"
    if why is None and not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written to"
    if why:
        raise ConfigError(f"cannot write to {out}: {place} {why}; choose another --out")


def _same_folder(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _require_same_plan(folder: RunFolder, settings: Settings) -> None:
    path = folder.path / FROZEN
    if not path.exists() or not folder.holds_work():  # a plan that came to nothing binds nobody
        return
    changed = differences(resolve({}, {}, path), settings)
    if changed:
        raise ConfigError(
            f"{folder.path} holds a run of another plan: {'; '.join(changed)}. Go on with the old "
            "one by --resume, throw it away by --restart, or choose another --out"
        )
    if otherwise := trained_otherwise(folder.path, settings):
        raise ConfigError(f"{otherwise[0]}. Put the file back, or start anew with --restart")
    began = folder.private / FROZEN
    if began.exists() and (edited := differences(resolve({}, {}, began), settings)):
        raise ConfigError(
            f"{path} was edited since the run began: {'; '.join(edited)}. Put that back, or start "
            "anew with --restart"
        )


def _freeze(
    folder: RunFolder, settings: Settings, texts: Mapping[str, Corpus], *, is_control: bool
) -> None:
    """Write what must not change over the run; refuse if a text or the base did."""
    known = _began_with(folder)
    family = text_hashes(folder.path.parents[1]) if is_control else {}
    now = identify_inputs(settings, texts, known or family)
    if family:  # else they could not be compared
        require_unchanged(family, now, settings, folder.path.parents[1])
    if not folder.holds_work():
        folder.start_anew()
    if known is not None:
        require_unchanged(known, now, settings, folder.path)
    _keep(folder, DATA_RECORD, now)
    for name in (FROZEN, f"{folder.private.name}/{FROZEN}"):  # an edit of the first is seen
        folder.write_text(name, to_toml(settings))


def _began_with(folder: RunFolder) -> dict[str, Any] | None:
    """Return what the run in a folder began with, None where there is none yet.

    Raises:
        IntegrityError: the record of it is damaged.
    """
    record = folder.private / DATA_RECORD
    if not folder.holds_work() or not record.exists():
        return None
    try:
        return dict(json.loads(record.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{record} is damaged: {error}; start anew with --restart") from error


def _keep(folder: RunFolder, name: str, facts: Mapping[str, Any]) -> None:
    folder.write_text(f"{folder.private.name}/{name}", json.dumps(facts))

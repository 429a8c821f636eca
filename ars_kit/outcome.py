"""What a run's folder says: how far it is, each member's metrics, the best. Light to import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ars_kit.durable import check_file
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.roster import parse_roster
from ars_kit.settings import Settings, resolve
from ars_kit.store import BEST, RunFolder, control_folder, read_history

FROZEN = "run.toml"


def frozen_settings(out: Path, flags: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings a folder's run was started with, ``flags`` over them.

    Raises:
        ConfigError: there is no run.
    """
    path = out / FROZEN
    if not path.exists():
        raise ConfigError(f"no run in {out}; name its folder with --out, or start one: arskit run")
    return resolve(flags or {}, {}, path)


def read_metrics(folder: RunFolder, name: str) -> dict[str, Any]:
    """Return a committed member's metrics.

    Raises:
        IntegrityError: they are not what was committed.
    """
    path = folder.path / name / "metrics.json"
    problem = check_file(path)
    if problem:
        raise IntegrityError(f"{path.parent}: {problem}. For all there is: arskit verify")
    metrics: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return metrics


def best_of(metrics: Iterable[Mapping[str, Any]], metric: str = "heldout_loss") -> str:
    """Return the member with the lowest ``metric``; the earlier of two equals.

    Raises:
        ConfigError: no member has it.
    """
    scored = [(m[metric], m["model_id"]) for m in metrics if isinstance(m.get(metric), int | float)]
    if not scored:
        raise ConfigError(
            f"no member has a figure named {metric!r}; see metrics.json for those it has"
        )
    lowest = min(score for score, _ in scored)
    return next(str(name) for score, name in scored if score == lowest)


def select(out: Path, metric: str) -> dict[str, Any]:
    """Choose the committed member with the lowest ``metric`` and record it as ``best``.

    Raises:
        ConfigError: there is no run, or no member has such a figure.
    """
    folder = RunFolder(out)
    names = folder.members()
    if not names:
        raise ConfigError(f"no member is committed in {out} yet")
    metrics = [read_metrics(folder, name) for name in names]
    best = best_of(metrics, metric)
    return record_best(folder, best, metric)


def record_best(folder: RunFolder, best: str, metric: str) -> dict[str, Any]:
    """Write ``best.json``: the member, and the rule by which it was chosen."""
    value = read_metrics(folder, best)[metric]
    record = {"member": best, "metric": metric, "value": value, "rule": f"lowest {metric}"}
    folder.write_text(BEST, json.dumps(record, indent=2) + "\n")
    return record


def status(out: Path) -> list[dict[str, Any]]:
    """Return each planned member's state, then those of the run's controls, from the folder alone.

    A control's rows name it; one that has not begun has a single row without a member.
    """
    rows = _status(out)
    for control in frozen_settings(out).run.controls:
        folder = control_folder(out, control)
        if (folder / FROZEN).exists():
            rows += [{"control": control, **row} for row in _status(folder)]
        else:
            rows.append({"control": control, "model_id": None, "state": "waiting", "steps": 0})
    return rows


def _status(out: Path) -> list[dict[str, Any]]:
    settings = frozen_settings(out)
    folder = RunFolder(out)
    rows = []
    planned = [m.name for m in parse_roster(settings.family.members)]
    for name in [*planned, *(m for m in folder.members() if m not in planned)]:
        if folder.has(name):
            rows.append({"state": "done", **read_metrics(folder, name)})
            continue
        path = folder.history_path(name)
        history = read_history(path) if path.exists() else []
        last = history[-1] if history else {}
        rows.append(
            {
                "model_id": name,
                "state": "training" if history else "waiting",
                "steps": len(history),
                "last_loss": last.get("loss"),
            }
        )
    return rows

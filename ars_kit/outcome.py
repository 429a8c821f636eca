"""What a run's folder says: how far it is, each member's metrics, the best. Light to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ars_kit.durable import check_file
from ars_kit.errors import ConfigError, IntegrityError
from ars_kit.history import last_row
from ars_kit.lineage import PRIVATE
from ars_kit.resolving import resolve
from ars_kit.roster import parse_roster
from ars_kit.settings import Settings, differences
from ars_kit.store import BEST, RunFolder, control_folder

FROZEN = "run.toml"
DATA_RECORD = "data.json"
DOCUMENTS = "quality/documents.jsonl"


def frozen_settings(out: Path, flags: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings a folder's run was started with, ``flags`` over them.

    Raises:
        ConfigError: there is no run.
    """
    path = out / FROZEN
    if not path.exists():
        raise ConfigError(f"no run in {out}; name its folder with --out, or start one: arskit run")
    return resolve(flags or {}, {}, path)


def trained_otherwise(out: Path, settings: Settings) -> list[str]:
    """Return which members were finished under other settings than the run's are now, and which.

    A run's settings file is a plain one, and somebody may have edited it; each member keeps those
    that it was trained under.
    """
    found = []
    for name in RunFolder(out).members():
        try:
            changed = differences(resolve({}, {}, out / name / FROZEN), settings)
        except ConfigError:  # it is gone or damaged, which is for verify to say
            continue
        changed = [line for line in changed if not line.startswith("run.")]
        if changed:
            found.append(
                f"{name} was trained under other settings than {out / FROZEN} holds: "
                f"{'; '.join(changed)}"
            )
    return found


def text_hashes(out: Path) -> dict[str, Any]:
    """Return the hashes of a run's text (``data``) and tokenizer (``tokenizer``).

    Empty where none are kept, or what is kept is damaged: a run says that, who only looks does not.
    """
    try:
        found = json.loads((out / PRIVATE / DATA_RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(folder: RunFolder, name: str) -> dict[str, Any]:
    """Return a committed member's metrics.

    Raises:
        IntegrityError: they are not what was committed.
    """
    path = folder.path / name / "metrics.json"
    problem = check_file(path.parent, path.name)
    if problem:
        raise IntegrityError(f"{path.parent}: {problem}. For all there is: arskit verify")
    metrics: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return metrics


def read_documents(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    """Return what each held-out document cost a committed member; nothing where it was not kept.

    Raises:
        IntegrityError: the file is not what was committed.
    """
    home = folder.path / name
    if not (home / DOCUMENTS).exists():
        return []
    problem = check_file(home, DOCUMENTS)
    if problem:
        raise IntegrityError(f"{home}: {problem}. For all there is: arskit verify")
    return [json.loads(line) for line in (home / DOCUMENTS).read_text("utf-8").splitlines()]


def manifests(folder: RunFolder) -> dict[str, str]:
    """Return the sha256 of each committed member's manifest, by name, in order of birth.

    Raises:
        IntegrityError: the lineage is damaged.
    """
    return {e.member: e.manifest for e in folder.lineage() if folder.holds(e.member)}


def newer_than_best(out: Path) -> list[str]:
    """Return the members that were not there, or were others, when the best one was recorded.

    A run may be killed after a member is committed and before it chooses. All where there is no
    record that can be read; none where it is of a version that did not say what it chose from.

    Raises:
        IntegrityError: the lineage is damaged.
    """
    now = manifests(RunFolder(out))
    try:
        among = dict(json.loads((out / BEST).read_text(encoding="utf-8"))).get("among")
    except (OSError, ValueError, TypeError):
        return list(now)
    known = among if isinstance(among, dict) else now
    return [name for name in now if known.get(name) != now[name]]


def kept_judgements(cache: Path, checkpoint: str) -> Path:
    """Return where the cache keeps what evaluators found of a checkpoint, one file for each.

    Args:
        cache: the folder.
        checkpoint: its hash: sha256 of a member's manifest.
    """
    return cache / "evaluations" / checkpoint[:24]


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
    planned = [m.name for m in parse_roster(settings.family.members)]
    names = [*planned, *(m for m in folder.members() if m not in planned)]
    return [_progress(folder, name) for name in names]


def _progress(folder: RunFolder, name: str) -> dict[str, Any]:
    if not folder.has(name):
        try:
            steps, last = last_row(folder.history_path(name))
        except FileNotFoundError:  # it has not begun; or it was committed this moment
            steps, last = 0, {}
        if not folder.has(name):
            return {
                "model_id": name,
                "state": "training" if steps else "waiting",
                "steps": steps,
                "last_loss": last.get("loss"),
            }
    return {"state": "done", **read_metrics(folder, name)}

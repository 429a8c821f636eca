"""Which member: by a rule that can be said, with the margin, and whether it is more than chance."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ars_kit.durable import sha256
from ars_kit.errors import ConfigError
from ars_kit.outcome import kept_judgements, manifests, read_documents, read_metrics, text_hashes
from ars_kit.resampling import CONFIDENCE, difference_interval
from ars_kit.rules import DEFAULT_METRIC, PAIRED, Rule, task_note, unalike
from ars_kit.schema import did_you_mean
from ars_kit.store import BEST, RunFolder

FEWEST = 6
"""Documents from which on a lead can be more than chance: of five that all favour one model a sign
test still says 1 in 16 (Dixon & Mood 1946), while the interval of any that agree excludes zero."""


def usual_metric(family: Iterable[Mapping[str, Any]]) -> str:
    """Return the figure that decides unless another is named: of text without a byte, the loss."""
    measured = any(_is_figure(m.get(DEFAULT_METRIC)) for m in family)
    return DEFAULT_METRIC if measured else "heldout_loss"


def select(out: Path, rule: Rule, cache: Path) -> dict[str, Any]:
    """Choose a committed member and record it as ``best``.

    Args:
        out: the run folder.
        rule: how.
        cache: where later judgements are, for figures that a member's own metrics lack.

    Raises:
        ConfigError: there is no member, none has such a figure, or none meets the limits.
        IntegrityError: what would be read is not what was committed.
    """
    folder = RunFolder(out)
    names = folder.members()
    if not names:
        raise ConfigError(f"no member is committed in {out} yet")
    family = [_known(folder, name, cache) for name in names]
    return record_best(folder, choose(folder, family, rule))


def choose(folder: RunFolder, family: Sequence[Mapping[str, Any]], rule: Rule) -> dict[str, Any]:
    """Return which member the rule chooses, and how clearly.

    Args:
        folder: the run.
        family: the members' figures, in order of birth; the earlier of two equals wins.
        rule: how.

    Returns:
        ``member``, ``among`` (all there are, with the hashes of their manifests), ``metric``
        (``score`` of several), ``value``, ``rule``, ``left_out`` (why, by member), ``runner_up``,
        ``margin`` (None without one), ``interval`` of the difference in bits per byte and its
        ``confidence``, ``documents`` it was drawn from, ``distinguishable`` (None where nothing is
        kept document by document), ``unalike`` (where what decides was not measured alike, and
        how), and ``words``.

    Raises:
        ConfigError: no member has such a figure, none meets the limits, or they are of a task that
            was not put to all alike.
        IntegrityError: what would be read is not what was committed.
    """
    _require_figures(folder, family, rule)
    left_out = {str(m["model_id"]): why for m in family if (why := _objection(m, rule))}
    candidates = [m for m in family if m["model_id"] not in left_out]
    if not candidates:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ConfigError(f"no member is left to choose from. {reasons}")
    pairs = [(str(m["model_id"]), m) for m in candidates]
    _require_same_tasks(folder, pairs, rule)
    (best, value), *others = rule.ranked(candidates)
    mixed = [told for aim in rule.aims if (told := unalike(pairs, aim.figure))]
    record: dict[str, Any] = {
        "member": best["model_id"],
        "among": manifests(folder),
        "metric": rule.metric,
        "value": value,
        "rule": str(rule),
        "left_out": left_out,
        "runner_up": None,
        "margin": None,
        "interval": None,
        "confidence": CONFIDENCE,
        "documents": 0,
        "distinguishable": None,
        "unalike": "; ".join(mixed) or None,
    }
    if others:
        runner_up, next_value = others[0]
        record["runner_up"] = runner_up["model_id"]
        record["margin"] = abs(next_value - value)
        if rule.metric in PAIRED and not mixed:
            record |= _paired(folder, str(best["model_id"]), str(runner_up["model_id"]))
    return {**record, "words": _words(record)}


def record_best(folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """Write ``best.json``: the member, the rule by which it was chosen, and how clearly."""
    folder.write_text(BEST, json.dumps(record, indent=2) + "\n")
    return record


def _known(folder: RunFolder, name: str, cache: Path) -> dict[str, Any]:
    """Return a member's own figures, and those it lacks of later judgements.

    Those count that were made on the held-out side of the run's text, as its own figures are,
    whatever text it was trained on. A task asks the same of every member, so of one that was put
    again the last answers count.
    """
    metrics = read_metrics(folder, name)
    text = text_hashes(folder.path).get("data", metrics["data_hash"])
    later: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    checkpoint = sha256(folder.path / name / "manifest.json")
    for file in sorted(kept_judgements(cache, checkpoint).glob("*.json"), key=_age):
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            identity = tree["identity"]
            if identity["data"] == text and identity["heldout_fraction"] < 1:
                later |= tree["figures"]
                notes |= tree.get("notes", {})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or of another version: as if it had never been measured
    again = {figure: v for figure, v in later.items() if task_note(figure, notes)}
    put = {note: how for note, how in notes.items() if ":" in note}
    notes = {**notes, **metrics.get("notes", {}), **put}
    return {**later, **metrics, **again, "notes": notes}


def _age(file: Path) -> float:
    return file.stat().st_mtime


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_figures(folder: RunFolder, family: Sequence[Mapping[str, Any]], rule: Rule) -> None:
    known = sorted({k for m in family for k, v in m.items() if _is_figure(v)})
    for name in rule.figures:
        if name in known:
            continue
        measures = {"decode_tokens_per_second": "speed", "bleu": "bleu", "chrf": "bleu"}
        if name in measures:
            names = " ".join(str(m["model_id"]) for m in family)
            raise ConfigError(
                f"no member has {name} yet; measure it first: arskit evaluate "
                f"{names} --eval {measures[name]} --out {shlex.quote(str(folder.path))}"
            )
        raise ConfigError(
            f"no member has a figure named {name!r}{did_you_mean(name, known)}. "
            f"There are: {', '.join(known)}"
        )


def _require_same_tasks(
    folder: RunFolder, members: Sequence[tuple[str, Mapping[str, Any]]], rule: Rule
) -> None:
    """Refuse scores of a task that members were asked different questions of."""
    for aim in rule.aims:
        notes = [task_note(aim.figure, m.get("notes") or {}) for _, m in members]
        evaluator = next((note.partition(":")[0] for note in notes if note), None)
        if evaluator and (told := unalike(members, aim.figure)):
            names = " ".join(name for name, _ in members)
            raise ConfigError(
                f"{told}; put the task to all with one limit: arskit evaluate {names} --eval "
                f"{evaluator.removeprefix('own_')}:tasks=...,limit=N "
                f"--out {shlex.quote(str(folder.path))}"
            )


def _objection(metrics: Mapping[str, Any], rule: Rule) -> str | None:
    """Return why a member cannot be chosen."""
    for limit in rule.limits:
        value = metrics.get(limit.figure)
        if not _is_figure(value):
            return f"{limit.figure} was not measured"
        if not limit.holds(value):  # type: ignore[arg-type]  # a figure: the line above
            return f"{limit.figure} is {value:,.6g}"
    missing = (a.figure for a in rule.aims if not _is_figure(metrics.get(a.figure)))
    return next((f"{figure} was not measured" for figure in missing), None)


def _paired(folder: RunFolder, best: str, other: str) -> dict[str, Any]:
    """Return the interval of what a byte costs ``other`` more than ``best``, by document."""
    one, two = (_by_document(read_documents(folder, name)) for name in (best, other))
    if one.keys() != two.keys() or len(one) < 2:
        return {}
    nats, sizes, other_nats, other_sizes = (
        np.array([rows[key][i] for key in one])
        for rows, i in ((two, 0), (two, 1), (one, 0), (one, 1))
    )
    found = difference_interval(nats, sizes, other_nats, other_sizes)
    if found is None:
        return {}
    clear = len(one) >= FEWEST and not found[0] <= 0 <= found[1]
    return {"interval": list(found), "documents": len(one), "distinguishable": clear}


def _by_document(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], tuple[float, float]]:
    """Return nats and bytes by document and place in it."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    seen: dict[int, int] = {}
    for row in rows:
        document = int(row["document"])
        place = seen[document] = seen.get(document, -1) + 1
        found[document, place] = float(row["nats"]), float(row["bytes"])
    return found


def _words(record: Mapping[str, Any]) -> str:
    best, other, metric = record["member"], record["runner_up"], record["metric"]
    head = f"{best}: {record['rule']}, {record['value']:,.6g}."
    if other is None:
        return f"{head} There is no other to choose from."
    margin = f"{other} comes next, {record['margin']:,.4g} away"
    if record["unalike"]:
        return f"{head} {margin}; {record['unalike']}."
    if record["interval"] is None:
        why = "is not kept by document" if metric not in PAIRED else "has too few documents"
        return f"{head} {margin}; {metric} {why}, so chance cannot be told from merit."
    low, high = record["interval"]
    # As many decimals as it takes for an end beside zero not to be told as zero.
    ends = [x for x in (low, high) if x]
    shown = next((n for n in range(4, 10) if all(round(x, n) for x in ends)), 10)
    interval = (
        f"95 % interval of the difference {low:+.{shown}f} to {high:+.{shown}f} bits per byte, "
        f"over {record['documents']} documents or passages"
    )
    if record["distinguishable"]:
        return f"{head} {margin} ({interval}): more than chance."
    if record["documents"] < FEWEST:
        return f"{head} {margin} ({interval}): too few to tell chance from merit."
    return f"{head} {margin} ({interval}): {best} is best, but not distinguishable from {other}."

"""What ARS is worth under provocation, and what its period detector finds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured.tables import figure, read, table

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from stability.figures import paired


def conditions(name: str) -> str:
    """Return what a stability result was measured on."""
    facts = read(name)["facts"]
    size = facts["size"]
    shape = f"Qwen2, {size['layers']} layers, width {size['width']}, bytes as tokens"
    length = f"{size['batch']} x {size['context']} a step, {size['steps']} steps"
    seeds = ", ".join(map(str, facts["seeds"]))
    tuned = "tuned once for AdamW with clip 1.0 on other seeds and another text"
    rate = f"{tuned} ({facts['tuning_text']})" if facts["tuning"] else "given"
    lines = [
        f"{facts['parameters']:,} parameters: {shape}; {length}",
        f"reported on {facts['text']}, seeds {seeds}; learning rate {facts['lr']:g}, {rate}",
        f"`{facts['command']}`",
        ", ".join(f"{k} {v}" for k, v in facts["environment"].items()),
        *facts["notices"],
    ]
    return "\n".join(f"- {line}" for line in lines)


def verdicts(name: str) -> str:
    """Return what ARS was worth under each provocation."""
    tree = read(name)
    rows = []
    for v in tree["verdicts"]:
        clip = f"clip dead {v['clip_dead']}/{v['score']['n']}" if v["clip_dead"] else ""
        rest = v["against_peer"]
        rows.append(
            [
                v["provocation"],
                tree["provocations"][v["provocation"]],
                figure(v["against_clip"]) or clip,
                f"**{v['word']}**" if v["word"] != "no difference shown" else v["word"],
                v["peer"] or "none lived",
                figure(rest) if rest else "-",
            ]
        )
    heads = [
        "provocation",
        "what is done",
        "ARS minus clip",
        "verdict",
        "best peer",
        "ARS minus it",
    ]
    return table(heads, rows)


def _scores(tree: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, float | None]]:
    """Return the scores by seed of each provocation and method."""
    return {(r["provocation"], r["method"]): r["scores"] for r in tree["results"]}


def gates(name: str) -> str:
    """Return what leaving one gate out costs, seed by seed against all of ARS."""
    tree = read(name)
    scores = _scores(tree)
    left_out = [m for m in tree["methods"] if m.startswith("ars-without-")]
    rows = []
    for provocation in tree["provocations"]:
        whole = scores.get((provocation, "ars"), {})
        found = [paired(scores.get((provocation, m), {}), whole) for m in left_out]
        cells = ["-" if not f.n else figure(asdict(f)) or f"dead {f.dead}/{f.n}" for f in found]
        rows.append([provocation, *cells])
    return table(["provocation", *(m.replace("ars-", "") for m in left_out)], rows)


def named(name: str) -> str:
    """Return what ARS as planned and as published is worth beside ARS, minus clip."""
    tree = read(name)
    scores = _scores(tree)
    rows = []
    for provocation in tree["provocations"]:
        clip = scores.get((provocation, "clip"), {})
        cells = []
        for method in ("ars-plan", "ars-paper", "ars"):
            own = scores.get((provocation, method), {})
            dead = sum(v is None for v in own.values())
            words = f"dead {dead}/{len(own)}" if dead else f"{len(own)} of {len(own)} live"
            cells.append(figure(asdict(paired(own, clip))) or words)
        rows.append([provocation, *cells])
    return table(["provocation", "ars-plan", "ars-paper", "ars"], rows)


def level(name: str) -> str:
    """Return what a level norm memory is worth, minus clip and minus ARS as it is."""
    tree = read(name)
    scores = _scores(tree)
    rows = []
    for provocation in tree["provocations"]:
        own = scores.get((provocation, "ars-level"), {})
        cells = []
        for other in ("clip", "ars"):
            theirs = scores.get((provocation, other), {})
            dead = sum(v is None for v in theirs.values())
            cells.append(
                figure(asdict(paired(own, theirs))) or f"{other} dead {dead}/{len(theirs)}"
            )
        rows.append([provocation, *cells])
    return table(["provocation", "level, minus clip", "level, minus ARS"], rows)


def scores(name: str) -> str:
    """Return every method's mean score under each provocation, and its difference to clip."""
    tree = read(name)
    rows = []
    for r in tree["results"]:
        clip = "-" if r["method"] == "clip" else figure(r["against_clip"]) or "clip dead"
        rows.append([r["provocation"], r["method"], figure(r["score"]).lstrip("+"), clip])
    return table(["provocation", "method", "held-out loss", "minus clip"], rows)


def detector(_: str) -> str:
    """Return what the period detector finds, and what it imagines."""
    tree = read("detector")
    found = tree["detection_at_snr_1"]
    periods = list(next(iter(found.values())))
    seen = table(
        ["pattern of period", *periods],
        [[kind, *(f"{row[p]:.1%}" for p in periods)] for kind, row in found.items()],
    )
    calm = tree["false_alarms_per_window"]
    false = table(["calm losses", "false alarms"], [[k, f"{v:.2%}"] for k, v in calm.items()])
    return f"{seen}\n\n{false}\n\n{tree['windows']:,} windows of 64 losses for each figure."

"""The report: Markdown for readers, JSON for the documentation that is built from it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stability.bars import PEERS, Bar, bars, shown
from stability.figures import Figure, Scores, Table
from stability.methods import DAMPED, Method
from stability.plot import differences_svg
from stability.provocations import PROVOCATIONS
from stability.runner import Key, Outcome
from stability.task import Size

REFERENCE = "clip"


def environment(device: str = "cpu") -> dict[str, str]:
    """Return the versions and the processor that results depend on."""
    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    found = {"python": platform.python_version(), "machine": machine}
    for package in ("torch", "transformers", "numpy", "pytorch_optimizer", "ars-kit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{platform.machine()}, {line.split(':', 1)[1].strip()}, one thread a run"
    return f"{platform.machine()}, one thread a run"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reader must know to repeat the runs.

    Attributes:
        tuning: mean held-out loss by learning rate, on the tuning seeds and text.
    """

    command: str
    model: str
    size: Size
    parameters: int
    text: str
    seeds: Sequence[int]
    lr: float
    tuning_text: str
    tuning_seeds: Sequence[int]
    tuning: Mapping[float, float | None]
    environment: Mapping[str, str]
    notices: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ARS is worth under one provocation.

    Attributes:
        score: of ARS.
        against_clip: paired difference; its interval decides the word.
        word: ``helps``, ``hurts``, or ``no difference shown``.
        peer: the one of lowest mean among those that lived, chosen in hindsight.
        against_peer: paired difference to it.
    """

    provocation: str
    score: Figure
    against_clip: Figure
    clip_dead: int
    word: str
    peer: str | None
    against_peer: Figure | None


def verdicts(table: Table, provocations: Iterable[str]) -> list[Verdict]:
    """Judge ARS under each provocation that both it and the reference ran under."""
    found = []
    for p in provocations:
        pair = table.shared((p, DAMPED), (p, REFERENCE))
        if not pair.of(p, DAMPED) or not pair.of(p, REFERENCE):
            continue
        difference, dead = pair.against(p, DAMPED, REFERENCE), pair.score(p, REFERENCE).dead
        mine = pair.score(p, DAMPED)
        if mine.dead != dead:
            word = "helps" if mine.dead < dead else "hurts"
        elif difference.clear:
            word = "helps" if (difference.mean or 0.0) < 0 else "hurts"
        else:
            word = "no difference shown"
        ran = [m for m in PEERS if table.of(p, m)]
        peers = table.shared(*((p, m) for m in (*ran, DAMPED)))
        best = peers.best(p, ran)
        rest = peers.against(p, DAMPED, best) if best else None
        found.append(Verdict(p, mine, difference, dead, word, best, rest))
    return found


def table_of(outcomes: Mapping[Key, Outcome], keys: Iterable[Key]) -> Table:
    """Return the scores of those keys that have an outcome."""
    scores: dict[tuple[str, str], dict[int, float | None]] = {}
    for key in keys:
        if key in outcomes:
            place = scores.setdefault((key.provocation, key.method), {})
            place[key.seed] = outcomes[key].score
    return Table(scores)


def write(path: Path, facts: Facts, table: Table, methods: Mapping[str, Method]) -> list[Bar]:
    """Write ``path`` with the suffixes .json, .md and .svg; return the bars."""
    provocations, names = _present(table, methods)
    judged = bars(table, provocations)
    tree = {
        "facts": asdict(facts),
        "methods": {m: {"source": methods[m].source, "code": methods[m].code} for m in names},
        "provocations": {p: PROVOCATIONS[p].summary for p in provocations},
        "results": [_row(table, p, m) for p in provocations for m in names if table.of(p, m)],
        "verdicts": [asdict(v) for v in verdicts(table, provocations)],
        "bars": [asdict(b) for b in judged],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    svg = differences_svg(table, provocations, [m for m in names if m != REFERENCE], REFERENCE)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    text = "\n".join(_markdown(path.stem, facts, table, methods, judged))
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return judged


def _present(table: Table, methods: Mapping[str, Method]) -> tuple[list[str], list[str]]:
    """Return the provocations and the methods that were run, in their usual order."""
    return (
        [p for p in PROVOCATIONS if any(p == key[0] for key in table.scores)],
        [m for m in methods if any(m == key[1] for key in table.scores)],
    )


def _row(table: Table, provocation: str, method: str) -> dict[str, Any]:
    scores: Scores = table.of(provocation, method)
    return {
        "provocation": provocation,
        "method": method,
        "scores": {str(seed): score for seed, score in sorted(scores.items())},
        "score": asdict(table.score(provocation, method)),
        "against_clip": asdict(table.against(provocation, method, REFERENCE)),
        "damage": asdict(table.damage(provocation, method)),
    }


def _markdown(
    stem: str,
    facts: Facts,
    table: Table,
    methods: Mapping[str, Method],
    judged: Sequence[Bar],
) -> Iterable[str]:
    provocations, names = _present(table, methods)
    yield f"# Stability, model `{facts.model}`\n"
    yield from _conditions(facts)
    yield from _incomplete(facts, table)
    yield "\n## Bars\n"
    yield "| bar | met | figures |\n|---|---|---|"
    for bar in judged:
        word = {True: "yes", False: "**no**", None: "not measured"}[bar.met]
        yield f"| {bar.claim} | {word} | {bar.figures} |"
    yield (
        "\nThe detector and the overhead have benchmarks of their own "
        "(`detector.py`, `step_overhead.py`).\n"
    )
    yield "## Scores\n"
    yield (
        "Mean held-out loss over the living runs, nats per byte (oscillation: training loss). "
        "A dead run, one whose weights or loss ceased to be finite, is counted and not averaged. "
        "Means over different seeds are not comparable; the paired differences below are.\n"
    )
    yield from _grid(provocations, names, lambda p, m: _plain(table.score(p, m), len(facts.seeds)))
    yield f"\n## Paired differences to {REFERENCE}\n"
    yield (
        "Same seed, same initial weights, same batches; mean and 95 % interval "
        "(Student's t, uncorrected for the number of comparisons). Negative is better.\n"
    )
    others = [m for m in names if m != REFERENCE]
    yield from _grid(
        provocations,
        others,
        lambda p, m: shown(table.against(p, m, REFERENCE), table.deaths(p, m, REFERENCE)),
    )
    yield f"\n![Paired differences to {REFERENCE}]({stem}.svg)\n"
    yield "## Damage: provoked minus clean\n"
    provoked = [p for p in provocations if p != "clean" and not PROVOCATIONS[p].full_batch]
    yield from _grid(provoked, names, lambda p, m: shown(table.damage(p, m)))
    yield "\n## Where leaving a gate out changed nothing\n"
    yield "Scores equal to the last bit on every seed: the gate never acted.\n"
    yield from _idle(table, provocations, names)
    yield "\n## Provocations\n"
    yield from (f"- **{p}**: {PROVOCATIONS[p].summary}" for p in provocations)
    yield "\n## Methods\n"
    yield from (f"- **{m}**: {methods[m].source} (code {methods[m].code})" for m in names)


def _conditions(facts: Facts) -> Iterable[str]:
    size = facts.size
    schedule = "then a cosine to a tenth" if size.cosine else "then constant"
    yield (
        f"{facts.parameters:,} parameters (Qwen2: {size.layers} layers, width {size.width}, "
        f"{size.heads} heads, MLP {size.hidden}), bytes as tokens, {size.batch} x {size.context} "
        f"a step, {size.steps} steps. AdamW (0.9, 0.95), weight decay 0.1 on matrices, learning "
        f"rate {facts.lr:g}, {size.warmup} steps of warm-up, {schedule}. What chance provokes "
        f"begins at step {size.calm}, so that every method's window has filled."
    )
    yield f"\n- command: `{facts.command}`"
    yield f"- reported on: {facts.text}, seeds {', '.join(map(str, facts.seeds))}"
    if facts.tuning:
        rates = ", ".join(
            f"{lr:g}: {'dead' if x is None else f'{x:.4f}'}" for lr, x in facts.tuning.items()
        )
        yield (
            f"- learning rate tuned once, for AdamW with clip 1.0 on clean data, on other seeds "
            f"({', '.join(map(str, facts.tuning_seeds))}) and another text ({facts.tuning_text}): "
            f"{rates}"
        )
    else:
        yield "- learning rate given, not tuned here"
    yield "- constants: the peers' as published, those of ARS the package's defaults"
    yield "- " + ", ".join(f"{k} {v}" for k, v in facts.environment.items())
    yield from (f"- note: {notice}" for notice in facts.notices)


def _idle(table: Table, provocations: Sequence[str], names: Sequence[str]) -> Iterable[str]:
    for name in names:
        if not name.startswith(f"{DAMPED}-without-"):
            continue
        same = [p for p in provocations if _same(table.of(p, name), table.of(p, DAMPED))]
        yield f"- {name}: {', '.join(same) or 'nowhere'}"


def _same(a: Scores, b: Scores) -> bool:
    shared = a.keys() & b.keys()
    return bool(shared) and all(a[seed] == b[seed] for seed in shared)


def _incomplete(facts: Facts, table: Table) -> Iterable[str]:
    short: dict[int, dict[str, None]] = {}
    for (_, method), scores in table.scores.items():
        if len(scores) < len(facts.seeds):
            short.setdefault(len(scores), {})[method] = None
    for n, methods in sorted(short.items()):
        yield f"- on {n} of the {len(facts.seeds)} seeds only ([{n}] below): {', '.join(methods)}"


def _grid(provocations: Sequence[str], names: Sequence[str], cell: Any) -> Iterable[str]:
    yield "| method | " + " | ".join(provocations) + " |"
    yield "|---" * (len(provocations) + 1) + "|"
    for m in names:
        yield f"| {m} | " + " | ".join(cell(p, m) for p in provocations) + " |"


def _plain(f: Figure, seeds: int) -> str:
    dead = f"dead {f.dead}/{f.n}" if f.dead else ""
    if f.mean is None:
        return dead or "-"
    return f"{f.mean:.4f}" + (f" ({dead})" if dead else "") + (f" [{f.n}]" if f.n < seeds else "")

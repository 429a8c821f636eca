"""The report: Markdown for readers, JSON for the documentation that is built from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stability.figures import Figure
from stability.report import environment

from inheritance.arms import ARMS
from inheritance.figures import Results, Rung
from inheritance.plot import picture
from inheritance.runner import Family, Key
from inheritance.scale import Scale


@dataclass(frozen=True, slots=True)
class Facts:
    """What a reader must know to repeat the runs.

    Attributes:
        tuned: learning rate and scale of first weights, by the arm that they were tuned for.
    """

    command: str
    scale: str
    text: str
    characters: int
    optimizer: str
    tuned: Mapping[str, tuple[float, float]]
    environment: Mapping[str, str] = field(default_factory=environment)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar that was set before anything was measured.

    Attributes:
        met: None where too little was run to tell.
    """

    claim: str
    met: bool | None
    figures: str


def write(out: Path, facts: Facts, scale: Scale, families: Mapping[Key, Family]) -> Sequence[str]:
    """Write ``out`` with the suffixes .md, .json and .svg; return the lines that sum it up."""
    results = Results.of(scale, families)
    if not results.scratch:
        return ["no run from scratch yet, so there is nothing to compare with"]
    found = bars(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".svg").write_text(picture(results, _shown(results)), "utf-8")
    out.with_suffix(".json").write_text(
        json.dumps(tree(facts, results, found), indent=1) + "\n", "utf-8"
    )
    out.with_suffix(".md").write_text(markdown(facts, results, found, out.stem), "utf-8")
    word = {True: "met", False: "NOT MET", None: "-"}
    return [f"{word[b.met]:8}{b.claim}: {b.figures}" for b in found]


def _shown(results: Results) -> dict[str, float]:
    """Return the budget at which each arm is drawn: the chosen one, else the one nearest to 1."""
    found = {}
    for arm in ARMS:
        ladder = results.ladder(arm)
        if arm != "scratch" and ladder:
            found[arm] = results.chosen(arm) or min(ladder, key=lambda k: abs(k - 1))
    return found


def bars(results: Results) -> list[Bar]:
    """Return what was promised and what became of it."""
    control = results.rung("no-growth", 1.0)
    gap = next(iter(control.gaps.values())) if control else None
    sigma = results.sigma("reported")
    loses = None if gap is None or gap.mean is None else gap.mean > max(sigma, gap.half or 0.0)
    found = [
        Bar(
            "bigger is better at equal compute: the no-growth control loses",
            loses,
            "not run" if gap is None else f"{shown(gap)} against the largest from scratch",
        )
    ]
    for arm in ("lineage", "even-duplicate", "cooled-last", "exact-cooled-last", "prune"):
        crossing = results.crossing(arm)
        found.append(
            Bar(
                f"{arm}: every member at or below scratch + sigma for at most 1.05 times the cost "
                "of the largest",
                None if crossing is None else crossing.within(1.05),
                "not run" if crossing is None else f"kappa {crossing}, sigma {sigma:.4f}",
            )
        )
    last = len(results.scale.shapes) - 1
    for arm in ("lineage", "even-duplicate", "cooled-last", "exact-cooled-last", "jump"):
        crossing = results.crossing(arm, [last])
        found.append(
            Bar(
                f"{arm}: the largest itself at least 20 % cheaper than from scratch",
                None if crossing is None else crossing.within(0.8),
                "not run" if crossing is None else f"kappa {crossing} for the largest alone",
            )
        )
    return found


def tree(facts: Facts, results: Results, found: Sequence[Bar]) -> dict[str, Any]:
    """Return everything measured, JSON-ready."""
    scale = results.scale
    arms = {}
    for arm, offer in ARMS.items():
        rungs = [r for k in results.ladder(arm) if (r := results.rung(arm, k))]
        arms[arm] = {
            "summary": offer.summary,
            "strategy": offer.strategy,
            "chosen": results.chosen(arm),
            "crossing": str(results.crossing(arm)) if rungs else None,
            "saved_with_probes": results.with_probes(arm),
            "rungs": [asdict(r) for r in rungs],
        }
    return {
        "facts": asdict(facts),
        "members": [m.name for m in scale.members],
        "parameters": scale.parameters,
        "tokens_per_parameter": scale.ratio,
        "costs": scale.costs,
        "ceiling": scale.ceiling,
        "seeds": sorted(results.scratch),
        "sigma": results.sigma("reported"),
        "scratch": {m.name: shown_scratch(results, i) for i, m in enumerate(scale.members)},
        "bars": [asdict(b) for b in found],
        "arms": arms,
    }


def shown_scratch(results: Results, size: int) -> list[float]:
    """Return the held-out losses of a member from scratch, in the order of the seeds."""
    return [results.scratch[seed][size].reported for seed in sorted(results.scratch)]


def markdown(facts: Facts, results: Results, found: Sequence[Bar], stem: str) -> str:
    """Return the report."""
    scale = results.scale
    tuned = "; ".join(
        f"{arm}: learning rate {lr:g}, first weights {init:g} / sqrt(width)"
        for arm, (lr, init) in facts.tuned.items()
    )
    return f"""# What inheritance saves: {facts.scale}, {facts.text}

`{facts.command}`

- {len(scale.shapes)} members, {scale.parameters[0]:,} to {scale.parameters[-1]:,} parameters,
  {scale.ratio:g} tokens for each parameter from scratch, {scale.batch} x {scale.context} a step
- seeds {", ".join(map(str, sorted(results.scratch)))}; {facts.optimizer}; tuned on another seed
  ({tuned})
- {facts.characters:,} characters, a fifth held out: half of it chooses, half is reported here
- {", ".join(f"{k} {v}" for k, v in facts.environment.items())}
- {scale.ceiling:.1%} would be saved if the family cost what its largest member costs

## Bars

| bar | met | figures |
| --- | --- | --- |
{chr(10).join(_bar(b) for b in found)}

## Every arm on every budget

The budget is what the family cost over what the largest member cost from scratch (kappa). A gap is
held-out loss minus that of the same member from scratch, same seed, in nats a token, with a 95 %
interval over seeds. Sigma, the seeds' own spread from scratch, is {results.sigma("reported"):.4f}.

{chr(10).join(_rows(results))}

| member | parameters | from scratch, by seed |
| --- | --- | --- |
{chr(10).join(_member(results, i) for i in range(len(scale.shapes)))}

![losses against cost, and gaps to scratch]({stem}.svg)
"""


def _bar(bar: Bar) -> str:
    word = {True: "yes", False: "**no**", None: "-"}[bar.met]
    return f"| {bar.claim} | {word} | {bar.figures} |"


def _rows(results: Results) -> Iterator[str]:
    heads = (
        "arm", "kappa", "within sigma", "worst gap", "gap of the largest",
        "FLOPs saved", "time / one by one", "time / side by side",
    )  # fmt: skip
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for arm in ARMS:
        for kappa in results.ladder(arm) if arm != "scratch" else ():
            rung = results.rung(arm, kappa)
            if rung is not None:
                yield _row(results, arm, rung)


def _row(results: Results, arm: str, rung: Rung) -> str:
    sigma = results.sigma("reported")
    within = sum((g.mean or 0.0) <= sigma for g in rung.gaps.values())
    names = [m.name for m in results.scale.members]
    cells = [
        arm,
        f"{rung.kappa:.3f}",
        f"{within} of {len(rung.gaps)}",
        f"{shown(rung.gaps[rung.worst])} ({names[rung.worst]})",
        shown(rung.gaps[max(rung.gaps)]),
        "-" if rung.saved is None else f"{rung.saved:.1%}",
        f"{rung.seconds:.2f}",
        f"{rung.parallel:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _member(results: Results, size: int) -> str:
    losses = " ".join(f"{x:.4f}" for x in shown_scratch(results, size))
    member = results.scale.members[size]
    return f"| {member.name} | {results.scale.parameters[size]:,} | {losses} |"


def shown(figure: Figure) -> str:
    """Return a mean with its interval."""
    if figure.mean is None:
        return "-"
    return f"{figure.mean:+.4f}" + ("" if figure.half is None else f" ± {figure.half:.4f}")

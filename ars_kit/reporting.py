"""``report.md`` and ``report.html``: a run folder told in words, tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ars_kit import charts, sections
from ars_kit.comparison import Comparison, compare_runs
from ars_kit.kinship import drawn
from ars_kit.outcome import newer_than_best
from ars_kit.page import (
    Block,
    Code,
    Figure,
    Page,
    Points,
    Sample,
    Section,
    Table,
    Text,
    as_html,
    as_markdown,
)
from ars_kit.records import MemberRecord, RunRecord, read_run
from ars_kit.scenarios import scenarios
from ars_kit.store import RunFolder
from ars_kit.summary import summary
from ars_kit.traces import factors_of, heldout_lines, training_lines, wants_log
from ars_kit.verdicts import RULE, checks

REPORTS = ("report.md", "report.html")


def _nobody(line: str) -> None:
    """Tell nobody."""


def write_report(
    out: Path, beside: Sequence[Path] = (), tell: Callable[[str], object] = _nobody
) -> list[Path]:
    """Write both forms of the report into a run folder; returns where they are.

    Args:
        out: the run folder, finished or not.
        beside: other run folders that the report compares with, such as other seeds.
        tell: told what is missing or damaged, and so left out, a line each.

    Raises:
        ConfigError: there is no run, or one beside it was judged on other text or is it again.
        IntegrityError: the lineage is damaged.
    """
    runs = [read_run(path) for path in (out, *beside)]
    for line in _problems(runs):
        tell(line)
    page = build(runs[0], runs[1:])
    folder = RunFolder(out)
    for name, text in zip(REPORTS, (as_markdown(page), as_html(page)), strict=True):
        folder.write_text(name, text)
    return [out / name for name in REPORTS]


def _problems(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield what is missing or damaged in runs and their controls, named after the first's own."""
    for run in runs:
        for record in (run, *run.controls):
            whose = "" if record is runs[0] else f"{record.label}: "
            yield from (f"{whose}{problem}" for problem in record.problems)


def build(run: RunRecord, beside: Sequence[RunRecord] = ()) -> Page:
    """Return the report on a run.

    Args:
        run: finished or not; what is missing is said.
        beside: runs to compare it with.
    """
    comparison = compare_runs([run, *beside])
    names = [m.name for m in run.members]
    title = f"A family of {len(names)}: {names[0]} to {names[-1]}" if names[1:] else names[0]
    if run.control is not None:
        title = f"Control {run.control['control']}: {title}"
    made = [
        Section("Checklist", list(_checklist(run))),
        Section("The family", list(_family(run))),
        Section("Loss against FLOPs", list(_losses(run, comparison))),
        Section("Quality", list(_quality(run))),
        Section("Damping", list(_damping(run))),
        Section("Controls", list(_controls(run, comparison))),
        Section("Cost", list(_cost(run, comparison))),
        Section("Lineage", [Code(drawn(run)), Text(_LINEAGE)]),
        Section("Samples", list(_samples(run))),
        Section("How this was measured", list(_conditions(run, comparison))),
        Section("How to reproduce", list(_reproduce(run))),
    ]
    return Page(title, summary(run, comparison), made)


_LINEAGE = (
    "Beside each name stands the sha256 of its manifest, shortened, and in brackets that of the "
    "parent's manifest it was born from. arskit lineage --json prints them whole, with the hashes "
    "of configuration, source and data that each figure comes from."
)


def _checklist(run: RunRecord) -> Iterator[Block]:
    rows = [[c.metric, c.expected, c.verdict, c.found] for c in checks(run)]
    heads = ["metric", "the plan expects", "verdict", "measured"]
    yield Table("The plan's six metrics and the trend it expects of each", heads, rows, names=4)
    yield Text(RULE)


def _family(run: RunRecord) -> Iterator[Block]:
    yield sections.family_table(run)
    waiting = [m for m in run.members if m.state != "done"]
    if waiting:
        yield Text(
            f"Not finished: {', '.join(m.name for m in waiting)}. This report says what was there "
            "when it was written; type arskit report again for a newer one."
        )
    if run.problems:
        yield Text("Missing or damaged:")
        yield Points(run.problems)


def _losses(run: RunRecord, comparison: Comparison) -> Iterator[Block]:
    curves = [m for m in run.members if m.curve]
    made = heldout_lines(run, comparison) if curves else training_lines(run)
    if not made:
        yield Text("No step was recorded yet.")
        return
    what = "Held-out loss" if curves else "Smoothed training loss"
    ends = "; ".join(f"{line.name.lstrip('_')} ends at {line.ys[-1]:.3f}" for line in made)
    yield Figure(
        f"{what} against all FLOPs spent so far",
        f"{what} in nats per token over cumulative FLOPs: {ends}.",
        charts.lines(
            what,
            f"{what} in nats per token over cumulative FLOPs: {ends}.",
            made,
            x="FLOPs since the first step of the run",
            y="nats per token",
        ),
    )
    if curves:
        yield sections.curve_table(run)
    else:
        yield Text("No held-out curve was drawn; run.heldout_every asks for one.")


def _quality(run: RunRecord) -> Iterator[Block]:
    if not any(m.metrics for m in run.members):
        yield Text("No member is finished, so none was judged.")
        return
    key = "bits_per_byte"
    names = [m.name for m in run.finished]
    values = [_bounded(m, key) for m in run.finished]
    if any(values):
        told = ", ".join(f"{n} {v[1]:.3f}" for n, v in zip(names, values, strict=True) if v)
        alt = f"Held-out bits per byte of each member: {told}. Lower is better."
        error = any(v and v[0] < v[2] for v in values)
        parts = " or ".join(dict.fromkeys(sections.parts_of(m.metrics) for m in run.finished))
        caption = "Held-out bits per byte; lower is better" + (
            f". Bars: 95 % interval over {parts}" if error else ""
        )
        plot = charts.dots("Quality", alt, names, {"bits per byte": values}, y="bits per byte")
        yield Figure(caption, alt, plot)
    yield sections.judged_table(run)
    if run.best and run.best.get("words"):
        newer = ", ".join(newer_than_best(run.path))
        since = f" Finished since that choice: {newer}." if newer else ""
        yield Text(f"Chosen as best: {run.best['words']}{since}")


def _bounded(member: MemberRecord, key: str) -> tuple[float, float, float] | None:
    value = member.metrics.get(key)
    if value is None:
        return None
    low, high = sections.interval(member.metrics, key) or (value, value)
    return min(low, value), value, max(high, value)


def _damping(run: RunRecord) -> Iterator[Block]:
    factors = factors_of(run)
    if not factors.members:
        yield Text("No step was recorded, so there is nothing to see of damping.")
        return
    made = factors.lines()
    alt = (
        f"Damping of each step over {factors.steps} steps of {len(factors.members)} members; the "
        f"lowest is {factors.lowest:.3f}, {len(factors.skipped)} steps were skipped."
    )
    marks = {"skipped step": factors.skipped, "went back": factors.back}
    plot = charts.lines(
        "Damping", alt, made, x="step of the family", y="factor; 1 is undamped",
        marks={k: v for k, v in marks.items() if v}, labels=factors.members, log=wants_log(made),
    )  # fmt: skip
    yield Figure("Damping over time, smoothed, and the gates that ever acted", alt, plot)
    if quiet := factors.quiet:
        yield Text(f"Gates that changed no step that was taken: {', '.join(quiet)}.")
    yield sections.gates_table(run)


def _controls(run: RunRecord, comparison: Comparison) -> Iterator[Block]:
    if len(comparison.groups) == 1 and run.settings.run.controls:
        yield Text("The controls that were asked for have not begun.")
        return
    if len(comparison.groups) == 1:
        yield Text(
            "No control was trained, so nothing here says what inheritance or damping saved. "
            "arskit run --controls scratch,no-growth,one-long-run,no-ars trains them."
        )
        return
    yield sections.quality_table(comparison, "bits_per_byte")
    if comparison.reached:
        yield sections.reached_table(comparison)
        yield Text(
            "Saved is 1 - (what the family spent) / (what the control spent); negative where the "
            "family spent more. Member alone: from its birth on, as if its ancestors were free."
        )


def _cost(run: RunRecord, comparison: Comparison) -> Iterator[Block]:
    planned = {m["name"]: m.get("seconds") for m in (run.plan or {}).get("members", [])}
    now, names = run.settings.run.price_per_hour, [m.name for m in run.members]
    prices = [m.metrics.get("price_per_hour", now) / 3600 for m in run.members]
    times = [planned.get(name) for name in names]
    foreseen = [None if t is None else t * p for t, p in zip(times, prices, strict=True)]
    actual = [m.metrics.get("cost") for m in run.members]
    if any(v is not None for v in actual):
        told = f"{sum(v or 0 for v in actual):.4g} $ in all"
        pairs = zip(foreseen, actual, strict=True)
        both = [f for f, v in pairs if f is not None and v is not None]
        if both:  # the estimate of what is finished, beside what that was
            told += f", estimated {sum(both):.4g} $"
        alt = f"Cost of each member: {told}."
        series = {"estimated": foreseen, "measured": actual}
        series = {k: v for k, v in series.items() if any(x is not None for x in v)}
        plot = charts.bars("Cost", alt, names, series, y="dollars")
        yield Figure("Cost, estimated before the start and measured", alt, plot)
    spent = sum(m.metrics.get("total_flops") or 0.0 for m in run.members)
    if spent:
        who = "The members" if run.is_complete else "The finished members"
        yield Text(
            f"{who} took {spent:.3g} FLOPs in all; what a strategy computes at a birth and "
            "in a loss of its own is among them."
        )
    yield sections.planned_table(run)
    yield Text(
        "Times and costs are those of this machine, as busy as it was; FLOPs depend on neither."
    )
    yield sections.cost_table(scenarios(comparison))


def _samples(run: RunRecord) -> Iterator[Block]:
    prompts: dict[str, list[tuple[str, str]]] = {}
    for member in run.members:
        for sample in member.samples:
            told = prompts.setdefault(str(sample["prompt"]), [])
            told.append((member.name, str(sample["text"])))
    if not prompts:
        yield Text("No samples were generated; --eval generate asks for some.")
    for prompt, answers in prompts.items():
        yield Sample(prompt, answers)


def _conditions(run: RunRecord, comparison: Comparison) -> Iterator[Block]:
    found, settings = run.finished, run.settings
    lines = [
        f"Strategy {settings.family.strategy}",
        f"Optimizer {settings.optimizer.name} over {settings.optimizer.base}",
        f"Seeds {', '.join(map(str, comparison.family.seeds))}",
        f"Text {settings.data.source}, data sha256 {run.data.get('data', 'not prepared yet')}",
        f"Tokenizer sha256 {run.data.get('tokenizer', 'not made yet')}",
    ]
    for name, key in (("Device", "device"), ("Precision", "precision"), ("Source", "source_hash")):
        values = dict.fromkeys(str(m.metrics[key]) for m in found if m.metrics.get(key))
        lines.append(f"{name} {', '.join(values) or 'not known yet'}")
    if found:
        versions = found[-1].metrics["versions"]
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    yield Points(lines)
    if comparison.notes:
        yield Text("To keep in mind:")
        yield Points([f"{note}." for note in comparison.notes])


def _reproduce(run: RunRecord) -> Iterator[Block]:
    if run.control is not None:
        yield Text(
            "A control is trained by the run that it belongs to, with the same --controls; by "
            "itself, from its own settings:"
        )
    else:
        yield Text("With run.toml from this run's folder, and the same text in its place:")
    yield Code("arskit run --config run.toml --out again")
